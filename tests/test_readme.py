"""What the documents show runs, each block alone; what they say is printed is printed; what they point at exists."""

import ast
import os
import re
import shutil
import subprocess
import textwrap
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

import pytest
import torch

import attnrewrite

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
DOCUMENTS = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
LINES, WORDS = 120, 1000  # fewer lines than this, and no more words: code, reports and tables are counted

# -- blocks


@dataclass(frozen=True)
class Block:
    """language: what follows the fence; "" for none, and for an indented block."""

    path: Path
    line: int  # of its first line
    language: str
    text: str

    @property
    def is_python(self):
        """What claims to be, by its fence; without a fence's word, what imports this package or PyTorch, or names them in
        what parses as Python."""
        if self.language:
            return self.language.split()[0] == "python"
        if re.search(r"^(import|from) (torch|attnrewrite)\b", self.text, flags=re.MULTILINE):
            return True
        try:
            names = {node.id for node in ast.walk(ast.parse(self.text)) if isinstance(node, ast.Name)}
        except SyntaxError:
            return False
        return bool(names & {"torch", "attnrewrite"})

    @property
    def runs(self):
        return self.is_python and "no-run" not in self.language.split()

    @property
    def is_report(self):
        return not self.language and self.text.startswith("attnrewrite (")

    def __str__(self):
        return f"{self.path.name}:{self.line}"


FENCED = re.compile(
    r"^(?P<fence>```+|~~~+)(?P<language>[^\n]*)\n(?P<fenced>.*?)^(?P=fence)[ \t]*$", re.MULTILINE | re.DOTALL
)
# Behind an empty line: within a paragraph or a list an indented line is no code.
INDENTED = re.compile(r"(?:^|(?<=\n\n))(?P<indented> {4}[^\n]*\n(?:(?: {4}[^\n]*)?\n)*)")


def blocks(path):
    """The blocks of code of a document, in order."""
    text = path.read_text(encoding="utf-8")
    found = [(each.start("fenced"), each["language"].strip(), each["fenced"]) for each in FENCED.finditer(text)]
    rest = FENCED.sub(lambda each: re.sub(r"[^\n]", "-", each[0]), text)
    found += [(each.start(), "", textwrap.dedent(each["indented"])) for each in INDENTED.finditer(rest)]
    return [
        Block(path, text[:start].count("\n") + 1, language, code.rstrip() + "\n")
        for start, language, code in sorted(found)
    ]


ALL = [block for path in DOCUMENTS for block in blocks(path)]
RUNNABLE = [block for block in ALL if block.runs]


def reports_of(block, among=ALL):
    """The reports that a document shows behind a block, before its next one."""
    following = among[among.index(block) + 1 :]
    own = []
    for each in following:
        if each.path != block.path or each.is_python:
            break
        own += [each] if each.is_report else []
    return own


def normal(printed):
    """A report without what differs from run to run and from machine to machine."""
    printed = re.sub(r"\d+\.\d\d s$", "0.00 s", printed, flags=re.MULTILINE)
    return re.sub(r"^on CPU, torch .*$", "on CPU", printed, flags=re.MULTILINE)


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """A folder with the model that the documents name, small."""
    from small_pipelines import save_stable_diffusion_3

    folder = tmp_path_factory.mktemp("models")
    save_stable_diffusion_3(folder / "stabilityai" / "stable-diffusion-3.5-large")
    return folder


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Where a block runs: an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ATTNREWRITE_CACHE", str(tmp_path / "cache"))
    if not os.environ.get("ATTNREWRITE_SLOW"):
        # Inductor's C++ takes minutes, and what it makes of a graph and how long that takes is the matter of other tests.
        monkeypatch.setattr(torch._TorchCompileInductorWrapper, "__call__", lambda self, module, inputs: module.forward)
        monkeypatch.setattr("attnrewrite.measuring.measure_site.SECONDS", 0.1)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the models are small: threads would wait for each other
    yield tmp_path
    torch.set_num_threads(threads)


def run(block):
    """In a namespace of its own. An error shows its line of the document."""
    code = compile("\n" * (block.line - 1) + block.text, str(block.path), "exec")
    exec(code, {"__name__": "__main__"})


@pytest.mark.parametrize("block", RUNNABLE, ids=str)
def test_a_block_runs_alone(block, place, request, capsys):
    if "from_pretrained" in block.text:  # it takes the folder of a model's name that it finds there
        (place / "stabilityai").symlink_to(request.getfixturevalue("models") / "stabilityai")
    run(block)
    printed = capsys.readouterr().out
    for report in () if torch.cuda.is_available() else reports_of(block):  # they are of a CPU
        assert normal(report.text) in normal(printed), f"{report} is not what {block} prints"


def test_every_report_of_the_readme_is_compared():
    shown = [each for each in ALL if each.path == README and each.is_report]
    compared = [report for block in RUNNABLE if block.path == README for report in reports_of(block)]
    assert shown
    assert shown == compared


def test_the_readme_shows_nothing_that_does_not_run():
    assert [str(block) for block in ALL if block.path == README and block.is_python and not block.runs] == []


def test_few_blocks_of_the_documents_do_not_run():
    skipped = [str(block) for block in ALL if block.is_python and not block.runs]
    assert len(skipped) <= 5, skipped


@pytest.mark.parametrize("document", [README, ROOT / "docs" / "kernels.md"], ids=lambda path: path.name)
def test_every_kernel_is_in_the_table(document):
    rows = [line for line in document.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    assert set(attnrewrite.names()) <= set(re.findall(r"`(\w+)`", "\n".join(rows)))


def test_the_readme_is_short():
    text = README.read_text(encoding="utf-8")
    assert len(text.splitlines()) < LINES
    assert len(text.split()) <= WORDS


# -- files, targets and links

# Of a user: no files of this repository.
EXAMPLES = {"script.py", "train.py", "repro.py"}


def unknown_files(text):
    """The Python files that a text names and that are not there: by a path, or the end of one."""
    known = [f"/{path.relative_to(ROOT).as_posix()}" for path in ROOT.rglob("*.py") if ".venv" not in path.parts]
    named = set(re.findall(r"(?<![\w<>/.-])[\w/]+\.py\b", text)) - EXAMPLES
    return sorted(name for name in named if not any(path.endswith(f"/{name}") for path in known))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_files_that_are_named_exist(document):
    assert unknown_files(document.read_text(encoding="utf-8")) == []


def test_make_targets_exist():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    # As code: `make test` within a line, or at the start of a line of a block.
    named = re.findall(r"(?:`|^(?: {4,}|\$ ))make ([\w-]+)", README.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert set(named) - targets == set()
    assert {"demo", "test"} <= set(named)


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_another_torch_has_an_environment_of_its_own():
    """Each command that make would run for it, pip's among them, is that environment's."""
    command = ["make", "-n", "-C", str(ROOT), "test", "TORCH=torch==0.0.1"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert set(re.findall(r"(\S+)/bin/", printed)) == {".venv-torch0.0.1"}
    assert "pip install torch==0.0.1" in printed


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


# -- a test that cannot fail would be no test

PAGE = """# One two

[a](page.md) [b](gone.md) ![c](gone.png) [d](https://example.org) [e](#one-two) [f](#three)
`[g](code.md)`

```
[h](code.md)
```

[i]: gone/too.md
"""


def test_broken_links_would_be_seen(tmp_path):
    document = tmp_path / "page.md"
    document.write_text(PAGE)
    assert list(broken_links(document)) == ["gone.md", "gone.png", "#three", "gone/too.md"]


def test_files_that_are_gone_would_be_seen():
    text = "`kernels/records.py`, records.py, `attnrewrite/kernels/records.py`, `kernels/gone.py`, docs/records.py; script.py"
    assert unknown_files(text) == ["docs/records.py", "kernels/gone.py"]


BLOCKS = """A paragraph
    with an indented line, and then

    make test    # a command

and

    print(attnrewrite.names())    # without its import

and

    import torch
    this is no Python

```
import attnrewrite

attnrewrite.names()
```

* a list

      import attnrewrite  # and a block in it

```python
x = 1 +
```

```text
import torch
```

~~~python no-run
backend = attnrewrite.with_backend("flex")
~~~

    attnrewrite (flex): 1 attention site
"""


def test_blocks_are_told_apart(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(BLOCKS)
    found = blocks(page)
    assert [(each.line, each.is_python, each.runs) for each in found] == [
        (4, False, False),
        (8, True, True),
        (12, True, True),
        (16, True, True),
        (23, True, True),
        (26, True, True),
        (30, False, False),
        (34, True, False),
        (37, False, False),
    ]
    assert [each.is_report for each in found] == [False] * 8 + [True]
    assert reports_of(found[7], found) == [found[8]]
    assert reports_of(found[0], found) == []


@pytest.mark.parametrize(("index", "error"), [(1, NameError), (2, SyntaxError), (5, SyntaxError)])
def test_a_block_that_does_not_run_would_be_seen(tmp_path, index, error):
    page = tmp_path / "page.md"
    page.write_text(BLOCKS)
    with pytest.raises(error):
        run(blocks(page)[index])


def test_another_report_would_be_seen():
    printed = (
        "attnrewrite (flex): 1 attention site in 1 graph: 1 swapped; 0.02 s\non CPU, torch 2.13.0, kernels 0.17.2\n"
    )
    assert normal(printed.replace("0.02", "1.30").replace("2.13.0, kernels 0.17.2", "2.11.0")) == normal(printed)
    assert normal(printed.replace("1 swapped", "0 swapped")) != normal(printed)
