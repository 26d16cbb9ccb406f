"""What the documents show runs, and what they point at exists."""

import re
from pathlib import Path
from urllib.parse import unquote

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
DOCUMENTS = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def code_blocks(path, language):
    """The fenced blocks of a language, each with the number of its first line."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    found = re.finditer(rf"^```{language}[ \t]*\n(.*?)^```[ \t]*$", text, flags=re.MULTILINE | re.DOTALL)
    return [(text[: block.start(1)].count("\n") + 1, block[1]) for block in found]


BLOCKS = code_blocks(README, "python")
NAMESPACE = {"__name__": "readme"}
RAN = []


def run_blocks(count):
    """The first blocks in order, each once in a process, in one namespace. An error shows the line of the README."""
    for line, block in BLOCKS[len(RAN) : count]:
        exec(compile("\n" * (line - 1) + block, str(README), "exec"), NAMESPACE)
        RAN.append(line)


def test_readme_has_examples():
    assert BLOCKS


@pytest.mark.parametrize("index", range(len(BLOCKS)), ids=[f"line {line}" for line, _ in BLOCKS])
def test_example_runs_as_it_stands(index, monkeypatch):
    monkeypatch.chdir(ROOT)
    run_blocks(index + 1)


def test_make_targets_exist():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    # As code: `make test` within a line, or at the start of a line of a block.
    named = re.findall(r"(?:`|^(?: {4,}|\$ ))make ([\w-]+)", README.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert set(named) - targets == set()
    assert {"demo", "test"} <= set(named)


def links(path):
    """The targets of a document's links and images, without those of its code."""
    text = path.read_text(encoding="utf-8")
    text = re.sub(r"^(```|~~~).*?^\1", "", text, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"`[^`\n]*`(?!\])", "", text)
    inline = re.findall(r"\]\(<?([^)>\s]+)>?(?:\s+\"[^\"]*\")?\)", text)
    return inline + re.findall(r"^\[[^\]]+\]:\s+<?([^>\s]+)", text, flags=re.MULTILINE)


def anchors(path):
    """The anchors of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ +(.+?)\s*$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(document):
    """The relative links of a document whose file or heading does not exist."""
    for link in links(document):
        if re.match(r"[a-z][a-z0-9+.-]*:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (document.parent / unquote(path)) if path else document
        if not target.exists() or (anchor and target.suffix == ".md" and anchor not in anchors(target)):
            yield link


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_relative_links_lead_somewhere(document):
    assert list(broken_links(document)) == []


def test_broken_links_would_be_seen(tmp_path):
    document = tmp_path / "page.md"
    document.write_text(
        "# One two\n\n[a](page.md) [b](gone.md) ![c](gone.png) [d](https://example.org) [e](#one-two) [f](#three)\n"
        "`[g](code.md)`\n\n```\n[h](code.md)\n```\n\n[i]: gone/too.md\n"
    )
    assert list(broken_links(document)) == ["gone.md", "gone.png", "#three", "gone/too.md"]
