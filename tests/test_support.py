"""The support matrix in docs/ is what the records say, and the command line prints both tables."""

from pathlib import Path

import pytest

import attnrewrite
from attnrewrite.__main__ import main
from attnrewrite.commands.support import matrix
from attnrewrite.planning import registry

ROOT = Path(__file__).parent.parent


def test_docs_are_generated():
    assert (ROOT / "docs/backends.md").read_text() == matrix(), "run: python -m attnrewrite table > docs/backends.md"


def test_every_kernel_has_a_row():
    for name in attnrewrite.names():
        assert f"| `{name}` |" in matrix()


def test_every_record_says_what_it_was_tested_on():
    assert [record.name for record in registry.records() if not record.tested] == []


def test_table_is_the_docs(capsys):
    main(["table"])
    assert capsys.readouterr().out == matrix()


def test_info_names_every_kernel(capsys):
    main(["info"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == list(attnrewrite.names())
    assert "torch" in lines[0]
    assert all(line.split()[1] in ("yes", "no") for line in lines[1:])


def test_a_command_is_asked_for(capsys):
    with pytest.raises(SystemExit):
        main([])
    assert "info" in capsys.readouterr().err


def test_explain_names_what_the_masks_of_the_bundled_model_are(capsys):
    main(["explain", "--backend", "_native_math,flex"])
    printed = capsys.readouterr().out
    for site, words in {
        "causal": "causal",
        "prompt": "key padding (2, 12)",
        "spelled_out": "key padding (2, 12)",
        "joint": "key padding (2, 52)",
        "outer": "padding of queries and keys",
        "positions": "additive (4, 40, 40)",
    }.items():
        (line,) = [line for line in printed.splitlines() if line.startswith(f"{site} ")]
        assert words in line
        assert line.endswith("_native_math")


def test_explain_of_an_unknown_kernel(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["explain", "--backend", "_flash_9"])
    assert caught.value.code == 2
    assert "no attention backend is called '_flash_9'" in capsys.readouterr().err
