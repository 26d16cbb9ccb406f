"""The support matrix in docs/ is what the records say, and the command line prints both tables."""

import json
from pathlib import Path

import pytest
import torch

import attnrewrite
from attnrewrite.__main__ import main
from attnrewrite.commands.support import info, matrix
from attnrewrite.planning import registry

CPU = attnrewrite.machine_of(torch.device("cpu"))
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


def test_info_keeps_what_a_kernel_is_and_says_what_it_needs():
    (row,) = [line for line in info("0", CPU).splitlines() if line.startswith("flash ")]
    assert row.split(None, 2)[1:] == ["no", "FlashAttention 2: needs CUDA; none here"]
    (row,) = [line for line in info("0", CPU).splitlines() if line.startswith("_native_flash ")]
    assert row.split()[1] == "yes"


def test_info_for_another_machine(capsys):
    described = {"device": "cuda", "capability": [9, 0], "packages": {"torch": "2.11.0", "fa3-fwd": "0.0.3"}}
    main(["info", "--machine", json.dumps(described)])
    first, *lines = capsys.readouterr().out.splitlines()
    assert first.endswith("for cuda, sm_90, torch 2.11.0, fa3-fwd 0.0.3, as described")
    rows = {line.split()[0]: line.split(None, 2)[1:] for line in lines}
    assert rows["_flash_3"] == ["yes", "FlashAttention 3"]
    assert rows["_native_npu"][1].endswith("needs an Ascend NPU; none there")
    assert rows["flash"][0] == "no"
    assert "MISSING" in rows["flash"][1]
    assert "pip install" not in "".join(lines)


@pytest.mark.parametrize(
    ("packages", "warned"),
    [
        ({"flash-attn-4": "4.0.0b36", "xformers": "0.0.35"}, True),
        ({"flash-attn-4": "4.0.0b36", "xformers": "0.0.35", "flash-attn": "2.8.3"}, False),
        ({"flash-attn-4": "4.0.0b36"}, False),
        ({"xformers": "0.0.35"}, False),
    ],
)
def test_info_names_packages_that_break_each_other(packages, warned):
    """The import of xformers fails beside FlashAttention 4, and with it that of every model class of diffusers."""
    said = info("0", attnrewrite.Machine("cuda", (9, 0), {"torch": "2.11.0", **packages}))
    assert ("every model class of diffusers" in said, "pip uninstall" in said) == (warned, warned)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("h200", "does not describe a machine"),
        ("[9]", "it is no JSON object"),
        ('{"devcie": "cuda"}', "'devcie' is not one of device, capability, packages, name"),
        ('{"device": "gpu"}', "device is 'gpu': give a device type"),
        ('{"device": "cuda", "capability": "9.0"}', "capability is '9.0' (str): give (major, minor)"),
        ('{"device": "cpu", "packages": {"torch": "latest"}}', "packages['torch'] = 'latest': give a version"),
    ],
)
@pytest.mark.parametrize("command", [["info"], ["rewrite", "a.pt2", "b.pt2", "--backend", "native"]])
def test_a_machine_that_is_none(command, text, said, capsys):
    with pytest.raises(SystemExit) as caught:
        main([*command, "--machine", text])
    assert caught.value.code == 2
    assert said in capsys.readouterr().err


def test_version(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert (caught.value.code, capsys.readouterr().out) == (0, f"attnrewrite {attnrewrite.__version__}\n")


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
