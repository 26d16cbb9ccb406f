"""`attnrewrite run`: a script as it is, with its compiled attention on other kernels, and a report at its end."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import forked
import pytest

from attnrewrite import Report
from attnrewrite.__main__ import main
from attnrewrite.commands import interception
from attnrewrite.commands import run as launching

ROOT = Path(__file__).resolve().parent.parent
PLAIN = ROOT / "examples" / "zero_code" / "plain_script.py"
PATH = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))


def python(*command, cwd, given="", **variables):
    environment = {**os.environ, "PYTHONPATH": PATH, "ATTNREWRITE_BACKEND": "", **variables}
    return subprocess.run(
        [sys.executable, *map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True, input=given
    )


def run_from_the_start(*command, **options):
    return python("-m", "attnrewrite", "run", *command, **options)


def run(*command, cwd, given="", imported=()):
    options = {"environment": {"PYTHONPATH": PATH, "ATTNREWRITE_BACKEND": ""}, "given": given, "imported": imported}
    return forked.python("-m", "attnrewrite", "run", *command, cwd=cwd, **options)


def report_of(folder):
    return json.loads((folder / "report.json").read_text())


def script(folder, text, name="script.py"):
    (folder / name).write_text(text)
    return name


# -- the script is its own


OWN = """
import atexit, inspect, pickle, sys
import helper

class Thing:
    pass

def fail():
    raise LookupError("its own error")

atexit.register(print, "at exit", file=sys.stderr)
print(sys.argv, __name__, __file__, __doc__, sys.path[0] == helper.FOLDER, sys.stdin.read())
print(type(pickle.loads(pickle.dumps(Thing()))) is Thing, inspect.getsource(fail).splitlines()[0])
if "fail" in sys.argv:
    fail()
sys.exit(7)
"""


@pytest.mark.parametrize("how", ["exit", "fail"])
def test_arguments_stdin_exit_code_and_traceback(tmp_path, how):
    folder = tmp_path / "scripts"
    folder.mkdir()
    (folder / "helper.py").write_text("import os\nFOLDER = os.path.dirname(os.path.abspath(__file__))\n")
    name = script(folder, OWN)
    command = (f"scripts/{name}", how, "--backend", "x", "--", "-m")
    plain = python(*command, cwd=tmp_path, given="from outside")
    ours = run("--backend", "native", *command, cwd=tmp_path, given="from outside")
    assert ours.stdout == plain.stdout
    assert "from outside" in plain.stdout
    assert ours.returncode == plain.returncode == {"exit": 7, "fail": 1}[how]
    assert ours.stderr.startswith(plain.stderr)
    assert ours.stderr.removeprefix(plain.stderr).startswith(
        "attnrewrite run: compiled: nothing, so nothing has changed."
    )


def test_a_script_that_does_not_parse(tmp_path):
    name = script(tmp_path, "x = 1\ny = = 2\n")
    plain, ours = python(name, cwd=tmp_path), run("--backend", "native", name, cwd=tmp_path)
    assert (ours.returncode, ours.stderr[: len(plain.stderr)]) == (1, plain.stderr)


def test_an_interrupt_ends_it_as_one(tmp_path):
    name = script(tmp_path, "print('before', flush=True)\nraise KeyboardInterrupt\n")
    ours = run("--backend", "native", "--report", "report.json", name, cwd=tmp_path)
    assert ours.returncode == -signal.SIGINT
    assert "KeyboardInterrupt" in ours.stderr
    assert report_of(tmp_path)["outside"]["calls"] == 0


# -- what it compiles


COMPILES = """
import torch
import torch.nn.functional as F
from torch.nn.functional import scaled_dot_product_attention as attention

def attend(x):
    return F.scaled_dot_product_attention(x, x, x)

class Layer(torch.nn.Module):
    def forward(self, x, mask=None):
        return attention(x, x, x, mask)

x = torch.randn(2, 3, 7, 16)
expected = attend(x)                                                     # outside
runs = [
    torch.compile(attend, backend="eager", fullgraph=True),
    torch.compile(backend="aot_eager")(attend),
    torch.compile(Layer(), backend="eager"),
]
layer = Layer()
layer.compile(backend="eager", dynamic=False)
for run in (*runs, layer):
    torch.testing.assert_close(run(x), expected)
layer(x, torch.ones(7, 7, dtype=torch.bool))
torch.compile(attend, backend="eager", disable=True)(x)                  # outside
try:
    torch.compile(attend, backend="nothing")(x)
except Exception as error:
    print(type(error).__name__)
for _ in range(3):
    F.multi_head_attention_forward                                       # not a call
    F.scaled_dot_product_attention(x, x, x)                              # outside
print(torch.compile.__name__, F.scaled_dot_product_attention.__name__)
"""


def test_calls_of_torch_compile(tmp_path):
    name = script(tmp_path, COMPILES)
    done = run("--backend", "_native_flash,_native_math", "--report", "report.json", name, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["InvalidBackend", "compile", "scaled_dot_product_attention"]
    data = report_of(tmp_path)
    assert (data["script"], data["backend"], data["compile_calls"]) == (name, "_native_flash, _native_math", 4)
    report = Report.from_json(json.dumps(data["attention"]))
    assert [site.chosen for site in report.sites] == ["_native_flash"] * 5
    assert {site.name for site in report.sites} <= {"attend", "forward", "Layer"}
    lines = [COMPILES.splitlines()[place["line"] - 1] for place in data["outside"]["places"]]
    assert data["outside"]["calls"] == 5
    assert [place["calls"] for place in data["outside"]["places"]] == [3, 2]
    assert "outside" in lines[0]
    assert {place["file"] for place in data["outside"]["places"]} == {str(tmp_path / name)}
    assert "attention outside of any compiled graph: 5 calls" in done.stderr
    assert "compiled: 4 calls of torch.compile" in done.stderr


def test_settings_and_rules(tmp_path):
    name = script(
        tmp_path,
        "import torch\nimport torch.nn.functional as F\n"
        "def attend(x, y):\n    return F.scaled_dot_product_attention(x, y, y)\n"
        "run = torch.compile(attend, backend='eager')\n"
        "run(torch.randn(1, 2, 7, 16), torch.randn(1, 2, 9, 16))\n"
        "run(*[torch.full((1, 2, 7, 16), float('nan'))] * 2)\n",
    )
    settings = (
        "--backend",
        "_native_flash",
        "--rule",
        "cross=_native_math",
        "--numerics",
        "sparse",
        "--checks",
        "--strict",
    )
    done = run(*settings, "--report", "report.json", name, cwd=tmp_path)
    assert done.returncode == 1
    assert "AttentionCheckError: the query of attention site 'attend' (_native_flash) is not finite" in done.stderr
    assert [site["chosen"] for graph in report_of(tmp_path)["attention"]["graphs"] for site in graph["sites"]] == [
        "_native_math",
        "_native_flash",
    ]


def test_as_a_module_and_by_the_environment(tmp_path):
    script(tmp_path, "import sys\nprint(__name__, sys.argv[1:], __spec__.name)\n1 / 0\n", "program.py")
    plain = python("-m", "program", "--flag", cwd=tmp_path)
    ours = run_from_the_start("-m", "program", "--flag", cwd=tmp_path, ATTNREWRITE_BACKEND="_native_math")
    assert (ours.stdout, ours.returncode) == (plain.stdout, plain.returncode)
    assert ours.stderr.splitlines()[:3] == [line for line in plain.stderr.splitlines() if "runpy" not in line][:3] or (
        'program.py", line 3' in ours.stderr.splitlines()[1]
    )


# -- diffusers' pipelines

# What takes the time of importing a pipeline: its base class, which `attnrewrite run` looks out for, is not imported by it.
IMPORTED = (
    "transformers.modeling_utils",
    "diffusers.models.autoencoders",
    "diffusers.models.transformers",
    "diffusers.schedulers",
)


def test_the_module_that_is_looked_out_for_is_not_imported_yet(tmp_path):
    code = f"import sys; print({interception.PIPELINES!r} in sys.modules)"
    assert forked.python("-c", code, cwd=tmp_path, imported=IMPORTED).stdout == "False\n"


def test_denoisers_are_compiled_at_their_first_call(tmp_path):
    plain = forked.python(PLAIN, cwd=tmp_path, imported=IMPORTED)
    assert plain.returncode == 0, plain.stderr
    settings = ("--backend", "_native_math", "--compile", "denoiser", "--inner", "eager", "--report", "report.json")
    done = run(*settings, PLAIN, cwd=tmp_path, imported=IMPORTED)
    assert (done.returncode, done.stdout) == (0, plain.stdout), done.stderr
    data = report_of(tmp_path)
    assert (data["compile_calls"], data["compiled_parts"]) == (0, ["transformer"])
    (graph,) = data["attention"]["graphs"]
    names = [f"transformer.transformer_blocks.{index}.attn1" for index in range(2)]
    assert [(site["call"]["site"], site["chosen"]) for site in graph["sites"]] == [
        (name, "_native_math") for name in names
    ]
    assert data["outside"]["calls"] == 1  # the decoder of the VAE
    assert "attention_processor.py" in data["outside"]["places"][0]["file"]


def test_all_models_of_a_pipeline(tmp_path):
    settings = ("--backend", "_native_math", "--compile", "all", "--inner", "eager", "--report", "report.json")
    rules = ("--rule", "vae.*=native", "--rule", "transformer_blocks.0.*=native")
    done = run(*settings, *rules, PLAIN, "--steps", "2", cwd=tmp_path, imported=IMPORTED)
    assert done.returncode == 0, done.stderr
    data = report_of(tmp_path)
    assert data["attention"]["unmatched_rules"] == ["transformer_blocks.0.*"]  # without the component's name
    assert "rule 'transformer_blocks.0.*' matched none" in done.stderr
    assert data["compiled_parts"] == ["transformer", "vae.decoder"]
    assert data["outside"] == {"calls": 0, "places": []}


def test_what_the_script_compiles_itself_is_not_compiled_twice(tmp_path):
    text = PLAIN.read_text().replace(
        "pipe.transformer.compile(fullgraph=True)",
        "[block.compile(backend='eager') for block in pipe.transformer.transformer_blocks]",
    )
    settings = ("--backend", "_native_math", "--compile", "denoiser", "--inner", "eager", "--report", "report.json")
    done = run(*settings, script(tmp_path, text), "--compile", "--steps", "2", cwd=tmp_path, imported=IMPORTED)
    assert done.returncode == 0, done.stderr
    data = report_of(tmp_path)
    assert (data["compiled_parts"], data["parts_compiled_by_the_script"], data["compile_calls"]) == (
        [],
        ["transformer"],
        2,
    )
    assert "transformer: left to the script" in done.stderr
    whole = PLAIN.read_text().replace(
        "pipe.transformer.compile(fullgraph=True)",
        "pipe.transformer = torch.compile(pipe.transformer, backend='eager')",
    )
    done = run(*settings, script(tmp_path, whole), "--compile", "--steps", "2", cwd=tmp_path, imported=IMPORTED)
    assert done.returncode == 0, done.stderr
    data = report_of(tmp_path)
    assert (data["compiled_parts"], data["compile_calls"], data["outside"]["calls"]) == ([], 1, 1)
    assert [graph["unchanged"] for graph in data["attention"]["graphs"]] == [0]


# -- bad input: said before the script runs


BAD = {
    "no backend": ([], "no attention backend is named: give --backend, or set ATTNREWRITE_BACKEND"),
    "unknown backend": (
        ["--backend", "flsh"],
        "--backend: no attention backend is called 'flsh'; did you mean 'flash'",
    ),
    "twice": (["--backend", "flex,flex"], "choices names 'flex' twice"),
    "rule": (["--backend", "flex", "--rule", "self"], "--rule is 'self': write a pattern and its kernels"),
    "wrong rule first": (["--backend", "flex", "--rule", "self", "--rule", "cross=native"], "--rule is 'self'"),
    "rule twice": (
        ["--backend", "flex", "--rule", "self=flex", "--rule", "self=native"],
        "--rule names 'self' twice: self=flex and self=native",
    ),
    "kernel of a rule": (
        ["--backend", "flex", "--rule", "self=flx"],
        "rules['self']: no attention backend is called 'flx'",
    ),
    "inner": (
        ["--backend", "flex", "--inner", "inducter"],
        "inner is 'inducter', which is no backend of torch.compile",
    ),
    "compile": (["--backend", "flex", "--compile", "vae"], "argument --compile: invalid choice: 'vae'"),
    "report": (
        ["--backend", "flex", "--report", "nowhere/r.json"],
        "--report nowhere/r.json: No such file or directory",
    ),
    "script": (["--backend", "flex"], "there is no script 'gone.py'"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ATTNREWRITE_BACKEND", raising=False)
    arguments, said = BAD[name]
    with pytest.raises(SystemExit) as ended:
        main(["run", *arguments, "gone.py"])
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_unknown_backend_in_the_environment(capsys, monkeypatch):
    monkeypatch.setenv("ATTNREWRITE_BACKEND", "_native_mth,native")
    with pytest.raises(SystemExit):
        launching.main(["gone.py"])
    assert "ATTNREWRITE_BACKEND: no attention backend is called '_native_mth'; did you mean" in capsys.readouterr().err


def test_unknown_commands(capsys):
    for arguments in ([], ["rum"], ["info", "more"]):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 2
    assert "invalid choice: 'rum'" in capsys.readouterr().err
