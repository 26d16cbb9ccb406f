"""Every import points down, and no file imports itself in a circle. The order stands here and in docs/architecture.md."""

import ast
import itertools
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# Bottom first. A room may import the rooms before it in this list, itself, and nothing else of this package.
ORDER = (
    "version", "files", "graphs", "kernels", "backends", "masks", "planning", "passes", "parallel", "pipeline", "measuring",
    "reports", "entrances", "aot", "commands", "__init__", "__main__",
)  # fmt: skip
# rglob does not follow the two links in attnrewrite/.
FOLDERS = {
    "attnrewrite": ROOT / "attnrewrite",
    "attnrewrite.passes": ROOT / "passes",
    "attnrewrite.backends": ROOT / "backends",
}


def modules(folders):
    """Every file of the package by its dotted name; "attnrewrite.graphs.__init__" for a package's own file."""
    found = {}
    for package, folder in folders.items():
        for path in sorted(folder.rglob("*.py")):
            found[".".join((package, *path.relative_to(folder).with_suffix("").parts))] = path
    return found


MODULES = modules(FOLDERS)


def imported(path, name):
    """(line, dotted name) of everything that a file imports from this package: at its top, in functions, for types alike."""
    package = name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            target = [*base, *(node.module.split(".") if node.module else [])]
            for alias in node.names:
                yield node.lineno, ".".join((*target, alias.name))
        elif isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)


def module_of(target, known):
    """The module that an import runs: the name itself, its package, or the module that has it as an attribute."""
    for name in (target, f"{target}.__init__", target.rpartition(".")[0], f"{target.rpartition('.')[0]}.__init__"):
        if name in known:
            return name
    return None


def room(name):
    parts = name.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in ORDER else "__init__"


def arrows_up(name, path):
    """What a file imports from above: "file:line imports name", one line each."""
    here = ORDER.index(room(name))
    return [
        f"{path}:{line} ({room(name)}) imports {target} ({room(target)})"
        for line, target in imported(path, name)
        if target.split(".")[0] == "attnrewrite" and ORDER.index(room(target)) > here
    ]


def circles(known):
    """Circles of imports between files, each as "file:line imports name" lines. Packages' own files only describe them."""
    edges = {
        name: {module_of(target, known): line for line, target in imported(path, name)} for name, path in known.items()
    }
    found, done = [], set()

    def visit(name, trail):
        if name in trail:
            circle = [*trail[trail.index(name) :], name]
            found.append("\n".join(f"{known[a]}:{edges[a][b]} imports {b}" for a, b in itertools.pairwise(circle)))
        elif name not in done:
            for other in edges[name].keys() - {None, name}:
                visit(other, [*trail, name])
            done.add(name)

    for name in known:
        visit(name, [])
    return found


def test_every_room_has_a_place():
    """A new file or folder at the top of the package is put into the order first."""
    assert {room(name) for name in MODULES} == set(ORDER)
    top = {path.name.removesuffix(".py") for path in (ROOT / "attnrewrite").iterdir() if path.name != "__pycache__"}
    assert top == {*ORDER, "py.typed"}


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_down(name):
    wrong = arrows_up(name, MODULES[name])
    assert not wrong, "\n".join(wrong)


def test_no_file_imports_itself_in_a_circle():
    found = circles(MODULES)
    assert not found, "\n\n".join(found)


ROOMS = [folder for folder in (ROOT / "attnrewrite").iterdir() if folder.is_dir() and folder.name in ORDER]


@pytest.mark.parametrize("folder", ROOMS, ids=lambda folder: folder.name)
def test_each_room_says_what_lives_there(folder):
    text = ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8")))
    assert "mports" in text, "and what it may import"


# -- what is private to PyTorch, and to others, stands in graphs/

# Where else, and why.
EXCEPTIONS = {
    ("aot/packages.py", "torch._inductor"): "aoti_compile_and_package and aoti_load_package: documented under this name",
    ("entrances/graph_pass.py", "torch._inductor.custom_graph_pass"): "CustomGraphPass: PyTorch's documented class for passes",
    ("commands/interception.py", "sys._getframe"): "Python's own way to the caller's line",
    ("commands/run.py", "atexit._run_exitfuncs"): "a process that ends by a signal runs them as Python would",
    ("backends/flash_attention_2.py", "library.flash_attn_interface._flash_attn_backward"): "it has no public one",
    ("backends/flash_attention_2.py", "library.flash_attn_interface._flash_attn_varlen_backward"): "the same",
    ("backends/flash_attention_4.py", "library.interface._flash_attn_bwd"): "the same",
}  # fmt: skip


def is_private(name):
    return name.startswith("_") and not name.startswith("__")


def own_names(known):
    """Private names that this package gives itself: reading one of them is nobody else's business."""
    found = set()
    for path in known.values():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                found.add(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                found |= {node.attr} if isinstance(node.value, ast.Name) and node.value.id == "self" else set()
    return {name for name in found if is_private(name)}


def dotted(node):
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([*([node.id] if isinstance(node, ast.Name) else ["..."]), *reversed(parts)])


def private_uses(path, own):
    """(line, name) of every private module that a file imports, and every private attribute of others that it reads. Operators
    are public, whatever their names: they stand in programs that are saved."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            if any(map(is_private, (node.module or "").split("."))):
                yield node.lineno, node.module
        elif isinstance(node, ast.Attribute) and is_private(node.attr) and node.attr not in own:
            name = dotted(node)
            if not name.startswith(("torch.ops.", "aten.")):
                yield node.lineno, name


def shown(path):
    return path.relative_to(ROOT).as_posix().removeprefix("attnrewrite/")


def test_private_pytorch_is_used_in_graphs():
    own = own_names(MODULES)
    found = [
        (shown(path), line, name)
        for module, path in MODULES.items()
        if room(module) != "graphs"
        for line, name in private_uses(path, own)
    ]
    unknown = [f"{path}:{line} uses {name}" for path, line, name in found if (path, name) not in EXCEPTIONS]
    assert not unknown, "\n".join(unknown)
    assert {(path, name) for path, _, name in found} == set(EXCEPTIONS), "an exception that is not needed any more"


@pytest.mark.parametrize(
    ("statement", "name"),
    [
        ("from torch._dynamo.guards import Guard", "torch._dynamo.guards"),
        ("import torch\ntorch._C._log_api_usage_once('x')", "torch._C._log_api_usage_once"),
        ("def f(program):\n    return program._update()", "program._update"),
        ("import torch\ntorch.ops.aten._scaled_dot_product_flash_attention", None),
        ("from __future__ import annotations\nclass A:\n    def f(self):\n        self._x = 1", None),
    ],
)
def test_a_private_use_would_be_seen(tmp_path, statement, name):
    known = package(tmp_path, planning__plans=statement)
    found = {each for _, each in private_uses(known["attnrewrite.planning.plans"], own_names(known))}
    assert (name in found) if name else not found


# -- a test that cannot fail would be no test


def package(tmp_path, **files):
    """A package with a file for each `room__module`, read as `modules` reads this one."""
    for name, text in files.items():
        path = tmp_path / "attnrewrite" / (name.replace("__", "/") + ".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return modules({"attnrewrite": tmp_path / "attnrewrite"})


@pytest.mark.parametrize(
    "statement",
    [
        "from ..planning.plans import Plan",
        "from ..planning import plans",
        "from attnrewrite.planning.plans import Plan",
        "import attnrewrite.planning.plans",
        "from .. import planning",
        "def f():\n    from ..planning.plans import Plan",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ..planning.plans import Plan",
        "from .. import __version__",
    ],
)
def test_an_arrow_up_would_be_seen(tmp_path, statement):
    known = package(tmp_path, graphs__sizes=statement, planning__plans="class Plan: ...")
    (line,) = arrows_up("attnrewrite.graphs.sizes", known["attnrewrite.graphs.sizes"])
    last = statement.count("\n") + 1
    assert line.startswith(f"{tmp_path}/attnrewrite/graphs/sizes.py:{last} (graphs) imports attnrewrite.")
    assert not arrows_up("attnrewrite.planning.plans", known["attnrewrite.planning.plans"])


def test_a_circle_would_be_seen(tmp_path):
    known = package(
        tmp_path,
        graphs__one="from .two import b",
        graphs__two="import torch\ndef f():\n    from . import three",
        graphs__three="from ..graphs.one import a",
        graphs__four="from .one import a",
    )
    (circle,) = circles(known)
    assert "graphs/one.py:1 imports attnrewrite.graphs.two" in circle
    assert "graphs/two.py:3 imports attnrewrite.graphs.three" in circle
    assert "graphs/three.py:1 imports attnrewrite.graphs.one" in circle
    assert "four" not in circle
