"""The .pt2 archive of torch.export: a zip file whose weights are entries of their own, so that a graph can be read and replaced
without them.

    <name>/models/model.json                         the graph
    <name>/data/weights/model_weights_config.json    for each weight its dtype, sizes, strides, and its entry
    <name>/data/weights/weight_0 ...                 the bytes
    <name>/extra/...                                 files that are not PyTorch's

As written by torch 2.9 to 2.13. Reading and writing graphs is left to `torch.export.load` and `save`.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from ..graphs.exported import updated
from .programs import RECORD

MODEL = "models/model.json"
CONFIG = "data/weights/model_weights_config.json"
WEIGHTS = "data/weights/"
EXTRA = "extra/"


class ProgramFileError(RuntimeError):
    """A file that is no such program, or not one for this machine. The message has the file, what is expected and what was
    found."""


@contextmanager
def opened(path: str | os.PathLike[str]) -> Iterator[Archive]:
    """Raises `ProgramFileError` if there is no such file, or it is no whole zip archive."""
    try:
        source = zipfile.ZipFile(path)
    except FileNotFoundError:
        raise ProgramFileError(f"{path}: there is no such file; expected is a .pt2 of torch.export.save") from None
    except (zipfile.BadZipFile, OSError) as error:
        raise ProgramFileError(
            f"{path}: expected is the .pt2 archive of an exported program, found is something else, or a part of one "
            f"({error}). Copy or save it again"
        ) from error
    with source:
        yield Archive(Path(path), source)


class Archive:
    """An archive that is open for reading. Names are without the folder that all entries are in."""

    def __init__(self, path: Path, source: zipfile.ZipFile) -> None:
        self.path = path
        self.source = source
        self.entries = {info.filename.partition("/")[2]: info for info in source.infolist()}

    def read(self, name: str) -> bytes | None:
        return self.source.read(self.entries[name]) if name in self.entries else None

    def program(self) -> None:
        """Raises `ProgramFileError` if the archive holds no exported program."""
        if MODEL not in self.entries:
            kind = "an AOTInductor package" if any(".so" in name for name in self.entries) else "another archive"
            raise ProgramFileError(
                f"{self.path}: expected is an exported program (an entry {MODEL}), found is {kind}. "
                "torch.export.save and attnrewrite.save write one"
            )

    def graph(self) -> ExportedProgram:
        """The program, with weights of the right shapes that take no memory: one element each, with strides of 0."""
        self.program()
        if CONFIG not in self.entries:  # an older torch: all weights in one pickle
            return loaded(self.path)
        config = json.loads(self.read(CONFIG) or b"{}")
        small: dict[str, bytes] = {}
        for weight in config["config"].values():
            if not weight["use_pickle"]:
                meta = weight["tensor_meta"]
                meta["strides"] = [{"as_int": 0} for _ in meta["strides"]]
                meta["storage_offset"] = {"as_int": 0}
                entry = self.entries[WEIGHTS + weight["path_name"]]
                small[WEIGHTS + weight["path_name"]] = bytes(min(entry.file_size, 16))  # as long as the widest dtype
        small[CONFIG] = json.dumps(config).encode()
        made = io.BytesIO()
        self.copy(made, small, keep=lambda name: not name.startswith(EXTRA))
        made.seek(0)
        return loaded(made, self.path)

    def copy(self, target: Any, changed: Mapping[str, bytes], keep: Callable[[str], bool] = lambda name: True) -> None:
        """Writes the archive with some entries changed or added; all others go over in pieces, never as a whole."""
        folder = next(iter(self.source.namelist())).partition("/")[0]
        with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as written:
            for name, info in self.entries.items():
                if name not in changed and keep(name):
                    with (
                        self.source.open(info) as source,
                        written.open(info.filename, "w", force_zip64=info.file_size > 1 << 30) as entry,
                    ):
                        shutil.copyfileobj(source, entry, 1 << 20)
            for name, content in changed.items():
                written.writestr(f"{folder}/{name}", content)


def loaded(file: Any, path: Any = None) -> ExportedProgram:
    """`torch.export.load`, whose errors name the file."""
    try:
        return torch.export.load(file)
    except Exception as error:
        first = (str(error).strip() or repr(error)).splitlines()[0]
        raise ProgramFileError(
            f"{path or file}: torch {torch.__version__} does not load this program ({type(error).__name__}: {first}). Expected "
            "is a whole file, of this torch or an older one, with every op that it calls registered"
        ) from error


def graph_text(program: ExportedProgram) -> bytes:
    """The graph of a program as it stands in its file."""
    with zipfile.ZipFile(_saved(program)) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(MODEL))
        return archive.read(name)


def with_graph(program: ExportedProgram, text: bytes) -> ExportedProgram:
    """The program with another graph, which reads the same weights."""
    changed = io.BytesIO()
    with zipfile.ZipFile(_saved(program)) as source:
        Archive(Path(), source).copy(changed, {MODEL: text})
    changed.seek(0)
    read = loaded(changed, "the program's original graph")
    return _with_state(read, {name: program.state_dict[name] for name in read.state_dict})


def _saved(program: ExportedProgram) -> io.BytesIO:
    made = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="No complete tensor found in the group")  # their strides are 0
        torch.export.save(light(program), made)
    return made


def light(program: ExportedProgram) -> ExportedProgram:
    """The same program, with weights that take no memory."""

    def small(tensor: torch.Tensor) -> torch.Tensor:
        made = torch.zeros((), dtype=tensor.dtype, device="cpu").expand(tensor.shape)
        return torch.nn.Parameter(made, tensor.requires_grad) if isinstance(tensor, torch.nn.Parameter) else made

    return _with_state(program, {name: small(tensor) for name, tensor in program.state_dict.items()})


def _with_state(program: ExportedProgram, state: dict[str, Any]) -> ExportedProgram:
    record = program.graph_module.meta.pop(RECORD, None)  # nothing that torch.export could save
    try:
        return updated(program, program.graph_module, program.graph_signature, state)
    finally:
        if record is not None:
            program.graph_module.meta[RECORD] = record
