"""The .pt2 archive of torch.export, as torch 2.9 to 2.13 write it: a zip file with one entry for each weight. The graph can
therefore be read and replaced without the weights.

    <name>/models/model.json                         the graph
    <name>/data/weights/model_weights_config.json    dtype, sizes, strides and entry of each weight
    <name>/data/weights/weight_0 ...                 the bytes of one weight
    <name>/extra/...                                 extra files, which PyTorch does not interpret

Only `torch.export.load` and `torch.export.save` read and write the graph itself.
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

from ..files import known_path
from ..graphs.exported import updated
from .programs import RECORD

MODEL = "models/model.json"
CONFIG = "data/weights/model_weights_config.json"
WEIGHTS = "data/weights/"
EXTRA = "extra/"
NAME = (
    "program.pt2"  # of the temporary file: the archive's folder is called after it, so equal programs give equal bytes
)


class ProgramFileError(RuntimeError):
    """A file that is no exported program (or package), or that this machine cannot run. The message names the file, the
    expected content and the content that was found."""


@contextmanager
def opened(path: str | os.PathLike[str]) -> Iterator[Archive]:
    """Opens an archive. Raises `ProgramFileError` if the file does not exist, is not a complete zip archive, or has an entry
    whose checksum does not hold when it is read; `TypeError` for what is no path."""
    known_path(path)
    try:
        source = zipfile.ZipFile(path)
    except FileNotFoundError:
        raise ProgramFileError(f"{path}: there is no such file; expected a .pt2 of torch.export.save") from None
    except (zipfile.BadZipFile, OSError) as error:
        if isinstance(error, zipfile.BadZipFile) and _begins_as_archive(path):
            raise _truncated(path) from error
        raise ProgramFileError(
            f"{path}: expected the .pt2 archive of an exported program, found another file ({error}). Copy or save it again"
        ) from error
    with source:
        # A program holds archives itself: in a truncated file Python finds the end of one of these, and takes it for the whole.
        if _begins_as_archive(path) and all(info.header_offset for info in source.infolist()):
            raise _truncated(path)
        try:
            yield Archive(Path(path), source)
        except zipfile.BadZipFile as error:
            raise ProgramFileError(f"{path}: the archive is damaged ({error}). Copy or save it again") from error


def _begins_as_archive(path: str | os.PathLike[str]) -> bool:
    with open(path, "rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _truncated(path: str | os.PathLike[str]) -> ProgramFileError:
    return ProgramFileError(f"{path}: the archive is truncated: its end is missing. Copy or save it again")


def timeless(name: str) -> zipfile.ZipInfo:
    """An entry to write, without the time of writing, so that equal contents give equal files."""
    return zipfile.ZipInfo(name)


class Archive:
    """An archive that is open for reading. Names of entries omit the top folder, which all entries share."""

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
                f"{self.path}: expected an exported program (an entry {MODEL}), found {kind}. "
                "torch.export.save and attnrewrite.save write exported programs"
            )

    def graph(self) -> ExportedProgram:
        """Returns the program with placeholder weights of the right shapes. Each stores one element and has strides of 0."""
        self.program()
        if CONFIG not in self.entries:  # an older torch stores all weights in one pickle
            return loaded(self.path)
        config = json.loads(self.read(CONFIG) or b"{}")
        small: dict[str, bytes] = {}
        for weight in config["config"].values():
            if not weight["use_pickle"]:
                meta = weight["tensor_meta"]
                meta["strides"] = [{"as_int": 0} for _ in meta["strides"]]
                meta["storage_offset"] = {"as_int": 0}
                entry = self.entries[WEIGHTS + weight["path_name"]]
                small[WEIGHTS + weight["path_name"]] = bytes(min(entry.file_size, 16))  # the widest dtype has 16
        small[CONFIG] = json.dumps(config).encode()
        made = io.BytesIO()
        self.copy(made, small, keep=lambda name: not name.startswith(EXTRA))
        made.seek(0)
        return loaded(made, self.path)

    def copy(self, target: Any, changed: Mapping[str, bytes], keep: Callable[[str], bool] = lambda name: True) -> None:
        """Writes a copy of the archive to `target`.

        changed: entries to replace or to add.
        keep: whether to copy another entry. Entries are copied in chunks, so that no entry is in memory as a whole.
        """
        folder = next(iter(self.source.namelist())).partition("/")[0]
        with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as written:
            for name, info in self.entries.items():
                if name not in changed and keep(name):
                    with (
                        self.source.open(info) as source,
                        written.open(timeless(info.filename), "w", force_zip64=info.file_size > 1 << 30) as copy,
                    ):
                        shutil.copyfileobj(source, copy, 1 << 20)
            for name, content in changed.items():
                written.writestr(timeless(f"{folder}/{name}"), content)


def loaded(file: Any, path: Any = None) -> ExportedProgram:
    """Calls `torch.export.load`. Raises `ProgramFileError`, which names the file, for every error of it."""
    try:
        return torch.export.load(file)
    except Exception as error:
        first = (str(error).strip() or repr(error)).splitlines()[0]
        raise ProgramFileError(
            f"{path or file}: torch {torch.__version__} does not load this program ({type(error).__name__}: {first}). The file "
            "must be complete and written by this torch or an older one, and every op that it calls must be registered"
        ) from error


def graph_text(program: ExportedProgram) -> bytes:
    """Returns the graph of a program as JSON, as `torch.export.save` writes it."""
    with zipfile.ZipFile(_saved(program)) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(MODEL))
        return archive.read(name)


def with_graph(program: ExportedProgram, text: bytes) -> ExportedProgram:
    """Returns the program with another graph (`text`: JSON as of `graph_text`) and the same weights."""
    changed = io.BytesIO()
    with zipfile.ZipFile(_saved(program)) as source:
        Archive(Path(), source).copy(changed, {MODEL: text})
    changed.seek(0)
    read = loaded(changed, "the program's original graph")
    return _with_state(read, {name: program.state_dict[name] for name in read.state_dict})


def _saved(program: ExportedProgram) -> io.BytesIO:
    made = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="No complete tensor found in the group")  # strides of 0
        torch.export.save(light(program), made)
    return made


def light(program: ExportedProgram) -> ExportedProgram:
    """Returns the same program with placeholder weights, which take no memory."""

    def small(tensor: torch.Tensor) -> torch.Tensor:
        made = torch.zeros((), dtype=tensor.dtype, device="cpu").expand(tensor.shape)
        return torch.nn.Parameter(made, tensor.requires_grad) if isinstance(tensor, torch.nn.Parameter) else made

    return _with_state(program, {name: small(tensor) for name, tensor in program.state_dict.items()})


def _with_state(program: ExportedProgram, state: dict[str, Any]) -> ExportedProgram:
    record = program.graph_module.meta.pop(RECORD, None)  # torch.export cannot save it
    try:
        return updated(program, program.graph_module, program.graph_signature, state)
    finally:
        if record is not None:
            program.graph_module.meta[RECORD] = record
