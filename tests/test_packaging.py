"""What is installed is what stands in the repository, and importing it is light."""

import ast
import configparser
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import attnrewrite

ROOT = Path(__file__).resolve().parent.parent
# The folder in the repository -> in the package.
ROOMS = (
    *(
        "aot",
        "commands",
        "commands/bench",
        "entrances",
        "graphs",
        "kernels",
        "masks",
        "measuring",
        "parallel",
        "planning",
        "reports",
    ),
)
FOLDERS = {
    "attnrewrite": "attnrewrite",
    **{f"attnrewrite/{room}": f"attnrewrite/{room}" for room in ROOMS},
    "passes": "attnrewrite/passes",
    "backends": "attnrewrite/backends",
}
OTHERS = {"attnrewrite/py.typed", "attnrewrite/aot/program_checks.h"}
NEEDED = ("attnrewrite", "passes", "backends", "tests", "pyproject.toml", "README.md", "LICENSE")


def python_files():
    """Every Python file that must be installed, by its path in the package."""
    return {f"{inside}/{path.name}" for folder, inside in FOLDERS.items() for path in (ROOT / folder).glob("*.py")}


def run(*command, cwd, **variables):
    finished = subprocess.run(command, cwd=cwd, env={**os.environ, **variables}, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stdout[-3000:] + finished.stderr[-3000:]
    return finished.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Builds the sdist, and the wheel of it, in a folder of its own: the checkout gets no build folder."""
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in NEEDED:
        if (ROOT / name).is_dir():
            shutil.copytree(
                ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__", ".*")
            )
        else:
            shutil.copy(ROOT / name, source / name)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", str(built), str(source), cwd=built)
    return built


@pytest.fixture(scope="module")
def wheel(built, tmp_path_factory):
    """The wheel's files, as pip would lay them out."""
    (path,) = built.glob("*.whl")
    folder = tmp_path_factory.mktemp("installed")
    with zipfile.ZipFile(path) as archive:
        archive.extractall(folder)
    return folder


def files_in(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def information(wheel):
    (folder,) = wheel.glob("*.dist-info")
    return folder


def test_wheel_has_every_python_file_and_no_other(wheel):
    found = {name for name in files_in(wheel) if ".dist-info/" not in name}
    assert found == python_files() | OTHERS
    assert {path.name for path in wheel.iterdir()} == {"attnrewrite", information(wheel).name}


def test_wheel_files_are_those_of_the_repository(wheel):
    for folder, inside in FOLDERS.items():
        for path in (ROOT / folder).glob("*.py"):
            assert (wheel / inside / path.name).read_bytes() == path.read_bytes(), path.name


def test_wheel_metadata(wheel):
    folder = information(wheel)
    assert folder.name == f"attnrewrite-{attnrewrite.__version__}.dist-info"
    assert (folder / "licenses" / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
    metadata = (folder / "METADATA").read_text(encoding="utf-8")
    assert "License-Expression: Apache-2.0" in metadata
    assert "Requires-Dist: torch>=2.9" in metadata
    assert metadata.rstrip().endswith((ROOT / "README.md").read_text(encoding="utf-8").rstrip())
    entries = configparser.ConfigParser()
    entries.read(folder / "entry_points.txt")
    assert dict(entries["torch_dynamo_backends"]) == {"attnrewrite": "attnrewrite.entrances.compilers:entry"}
    assert dict(entries["console_scripts"]) == {"attnrewrite": "attnrewrite.__main__:main"}


def test_sdist_can_build_and_has_what_a_reader_needs(built):
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", *OTHERS} <= names
    wanted = {f"{folder}/{path.name}" for folder in FOLDERS for path in (ROOT / folder).glob("*.py")}
    assert wanted <= names


def from_wheel(wheel, folder, code):
    """Runs code far from the checkout, with the wheel's files before all others. Returns what it prints."""
    path = os.pathsep.join(filter(None, (str(wheel), os.environ.get("PYTHONPATH"))))
    return run(sys.executable, "-W", "error", "-c", code, cwd=folder, PYTHONPATH=path).strip()


def test_the_wheel_alone_works_and_its_entry_points_lead_somewhere(wheel, tmp_path):
    code = (
        "from importlib.metadata import distribution; import attnrewrite.entrances.compilers as compilers\n"
        "import attnrewrite, attnrewrite.passes.swap_kernels, attnrewrite.backends.native as native\n"
        "attnrewrite.with_backend('native', *attnrewrite.names()[1:])\n"
        "found = {entry.group: entry.load() for entry in distribution('attnrewrite').entry_points}\n"
        "assert found['torch_dynamo_backends'] is compilers.entry\n"
        "for module in (attnrewrite, native, attnrewrite.passes, compilers): print(module.__file__)\n"
        "found['console_scripts'](['info'])"
    )
    *files, info = from_wheel(wheel, tmp_path, code).splitlines()[:5]
    for file in files:
        assert Path(file).is_relative_to(wheel)
    assert info.startswith(f"attnrewrite {attnrewrite.__version__} on ")


def test_info_from_the_wheel(wheel, tmp_path):
    path = os.pathsep.join(filter(None, (str(wheel), os.environ.get("PYTHONPATH"))))
    lines = run(sys.executable, "-m", "attnrewrite", "info", cwd=tmp_path, PYTHONPATH=path).splitlines()
    assert lines[0].startswith(f"attnrewrite {attnrewrite.__version__} on ")
    assert [line.split()[0] for line in lines[1:]] == list(attnrewrite.names())
    assert {line.split()[1] for line in lines[1:]} <= {"yes", "no"}


# -- the repository


@pytest.mark.parametrize("name", ["passes", "backends"])
def test_links(name):
    """The package as it is imported from the checkout has the same two folders."""
    link = ROOT / "attnrewrite" / name
    assert link.is_symlink()
    assert link.readlink() == Path("..") / name
    assert link.resolve() == ROOT / name


def absolute_imports(path):
    """The names that a file imports by an absolute path."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module


@pytest.mark.parametrize("folder", FOLDERS)
def test_imports_within_the_package_are_relative(folder):
    for path in (ROOT / folder).glob("*.py"):
        for name in absolute_imports(path):
            assert name.split(".")[0] not in FOLDERS, f"{path.name} imports {name}"


# -- weight


def packages_imported_by(statement, folder, imported="torch.utils.flop_counter"):
    """The packages besides PyTorch and the standard library that a statement adds to a process with PyTorch in it, and in it
    what is `imported`."""
    code = (  # flop_counter imports triton, where that is installed
        f"import sys, torch, {imported}; before = set(sys.modules); {statement}\n"
        "print(*{name.split('.')[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names))\n"
        "print(torch.cuda.is_initialized())"
    )
    names, cuda = run(sys.executable, "-c", code, cwd=folder).splitlines()
    return set(names.split()) - {"torch"}, cuda == "True"


def test_importing_is_light(tmp_path):
    assert packages_imported_by("import attnrewrite", tmp_path) == ({"attnrewrite"}, False)


def test_making_a_backend_imports_dynamo_and_nothing_else(tmp_path):
    statement = "import attnrewrite; attnrewrite.with_backend(*attnrewrite.names(), inner=print)"
    assert packages_imported_by(statement, tmp_path, "torch._dynamo") == ({"attnrewrite"}, False)


def test_heavy_imports_would_be_seen(tmp_path):
    assert "pytest" in packages_imported_by("import json, pytest", tmp_path)[0]
