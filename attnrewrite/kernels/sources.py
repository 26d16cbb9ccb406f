"""The source of a kernel's library: an installed package, or a repository of the kernels hub.

Nothing here is imported or downloaded until a plan chooses the kernel (`load`). A text identifies a loaded library, as
"flash-attn 2.8.3" or "kernels-community/flash-attn3@<commit>". The text is an argument of the op: it selects the library that
the op calls, and lets PyTorch's caches, which know an op by its name alone, tell versions apart.
"""

from __future__ import annotations

import importlib
import os
import re
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from ..graphs.tracing import without_modes
from .decisions import Code, Refused
from .machines import installed

# Environment variables.
LOCK = "ATTNREWRITE_KERNELS_LOCK"  # the path of a kernels.lock, as `kernels lock` writes it, which fixes every commit
TRUST = "ATTNREWRITE_TRUST_REMOTE_CODE"  # 1 loads kernels of publishers that the hub does not vouch for


class SourceError(RuntimeError):
    """Raised for a library that cannot be loaded. `refused` is the reason as a decision."""

    def __init__(self, refused: Refused) -> None:
        super().__init__(str(refused))
        self.refused = refused


_PACKAGES: set[Package] = set()  # every `Package` of this process: a text in a file imports no other module
# Functions that import plug-ins, which make their packages; called only on demand (planning/registry.py).
PLUG_INS: list[Callable[[], object]] = []


@dataclass(frozen=True)
class Package:
    """A module of an installed distribution. Its text is "flash-attn 2.8.3", with the module where that has another name, as
    in "flash-attn-4 4.0.0b36 (flash_attn.cute)"."""

    distribution: str  # "flash-attn"
    module: str  # "flash_attn"

    def __post_init__(self) -> None:
        _PACKAGES.add(self)

    def __str__(self) -> str:
        return self.distribution

    def on(self, packages: Mapping[str, str]) -> str:
        """The text that identifies the library on a machine with these packages."""
        return self.text(packages.get(self.distribution))

    def text(self, version: str | None) -> str:
        same = self.module.replace("_", "-") == self.distribution.replace("_", "-")
        return f"{self.distribution} {version}" + ("" if same else f" ({self.module})")

    def is_of(self, text: str) -> bool:
        """Whether a text is that of this package in some version."""
        return text == self.text(version_in(text))

    def fetch(self, trust: bool) -> tuple[str, ModuleType]:
        """The text that identifies the library, and its module. Raises `SourceError`, with the import's own message, if the
        module does not import."""
        version = installed(self.distribution)
        try:
            module = importlib.import_module(self.module)
        except Exception as error:  # an ABI mismatch raises OSError, a broken extension anything
            raise SourceError(
                Refused(
                    Code.BROKEN,
                    f"{self.distribution} {version} does not import: {type(error).__name__}: {_first_line(error)}",
                    "Install a build for this PyTorch, CUDA and Python, or choose another kernel",
                )
            ) from error
        return self.text(version), module


@dataclass(frozen=True)
class Hub:
    """A repository of the kernels hub, loaded by the `kernels` library: from LOCAL_KERNELS, its cache, or the network.
    Tried with kernels 0.17.2; 0.14 takes other arguments and trusts other publishers.
    """

    repository: str  # "kernels-community/flash-attn3"
    version: int  # without `revision`, the commit of a lock file replaces it where the environment names one
    revision: str | None = None  # a branch, tag or commit, which replaces `version`

    def __str__(self) -> str:
        return f"{self.repository}@{self.revision or f'v{self.version}'}"

    def on(self, packages: Mapping[str, str]) -> str:
        """The text that identifies the library on another machine; the commit of a branch is known only after loading."""
        return str(self)

    def fetch(self, trust: bool) -> tuple[str, ModuleType]:
        """The text that identifies the library, and its module. Raises `SourceError` if the library is not found or does not
        load. Deletes nothing from the cache, which other programs share: the next download completes one that broke off
        (huggingface_hub)."""
        _, kernels = Package("kernels", "kernels").fetch(trust)
        which: dict[str, Any] = {"revision": self.revision} if self.revision else {"version": self.version}
        get, lock = kernels.get_kernel, os.environ.get(LOCK)
        if lock and not self.revision:
            get, which = kernels.get_locked_kernel, {"lockfile": Path(lock)}
        trust = trust or os.environ.get(TRUST, "").lower() in ("1", "true", "yes")
        try:
            module: ModuleType = get(self.repository, trust_remote_code=trust, **which)
        except Exception as error:
            raise SourceError(self._refused(error)) from error
        return f"{self.repository}@{_commit(module)}", module

    def _refused(self, error: Exception) -> Refused:
        """The reason behind an exception of `kernels` (0.17), by its message: `kernels` has no exception classes."""
        said = f"{self} does not load: {type(error).__name__}: {_first_line(error)}"
        if "not from a trusted publisher" in str(error):
            publisher = self.repository.split("/")[0]
            fix = f"If you trust {publisher}, pass trust_remote_code=True or set {TRUST}=1"
            return Refused(Code.UNTRUSTED, said, fix)
        other = "Ask for another revision, as in 'name@revision', or choose another kernel"
        if isinstance(error, ImportError) or _raised_by_an_import(error):
            return Refused(Code.BROKEN, said, other)
        if "does not support the current device" in str(error):
            return Refused(Code.CAPABILITY, said, other)
        if "build variant" in str(error) or "requires kernels" in str(error):
            return Refused(Code.VERSION, said, other)
        # By the name of the branch: a download by version is not found again offline (kernels 0.17.2).
        install = f"kernels.install_kernel('{self.repository}', revision='{self.revision or f'v{self.version}'}')"
        return Refused(
            Code.MISSING,
            said,
            f'Download it with a network: python -c "import kernels; {install}", then set HF_HUB_OFFLINE=1 to run without one; '
            f"or name a local folder: LOCAL_KERNELS={self.repository}=<folder>",
        )


Source = Package | Hub

# The libraries loaded in this process: a later compilation reads no file and no network again.
_TEXTS: dict[tuple[Source, bool], str] = {}  # the text of a library, by source and trust
_LIBRARIES: dict[str, ModuleType] = {}  # the module of a library, by text


def load(source: Source, trust: bool = False) -> str:
    """Loads a library, once per process, and returns the text that identifies it. Raises `SourceError`."""
    if (source, trust) not in _TEXTS:
        with without_modes():  # tensors that an import makes are not part of the graph being rewritten
            text, module = source.fetch(trust)
        _LIBRARIES.setdefault(text, module)
        _TEXTS[source, trust] = text
    return _TEXTS[source, trust]


def library(text: str, trust: bool = False) -> ModuleType:
    """The module of the library that a text identifies, for an op that is about to call it.

    Loads the library in a process that has not loaded it (a saved program). Raises `SourceError` if the version found is not
    the version that the program was made with.
    """
    if (module := _LIBRARIES.get(text)) is None:
        source = _parsed(text)
        found = load(source, trust)
        pinned = not isinstance(source, Hub) or re.fullmatch("[0-9a-f]{40}|local:.*", source.revision or "")
        if found != text and pinned:
            raise SourceError(
                Refused(
                    Code.VERSION,
                    f"this program was made with {text}, this machine has {found}",
                    f"Install {text}, or make the program again",
                )
            )
        module = _LIBRARIES[text] = _LIBRARIES[found]
    return module


def version_in(text: str) -> str:
    """The version in the text of a package."""
    return text.partition(" ")[2].partition(" ")[0]


def _parsed(text: str) -> Source:
    if "@" in text:
        repository, revision = text.split("@", 1)
        return Hub(repository, 0, revision)
    for load_plug_ins in (lambda: None, *PLUG_INS):
        load_plug_ins()
        if found := next((package for package in _PACKAGES if package.is_of(text)), None):
            return found
    raise SourceError(
        Refused(
            Code.MISSING,
            f"no registered kernel comes from {text}",
            "Install the plug-in that this program needs, or import the module that makes its record",
        )
    )


def _commit(module: ModuleType) -> str:
    """The commit that a hub module was loaded from; for a local folder, the id of the build."""
    found = re.search(r"/snapshots/([^/]+)/", str(Path(module.__file__ or "")).replace(os.sep, "/"))
    return found[1] if found else f"local:{module.__name__}"


def _raised_by_an_import(error: BaseException) -> bool:
    """Whether the code of the kernel raised the error, not the library that was fetching the kernel."""
    frames = [frame.f_code.co_name for frame, _ in traceback.walk_tb(error.__traceback__)]
    return "exec_module" in frames


def _first_line(error: Exception) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0]
