"""`attnrewrite run script.py`: runs an unedited script with other attention kernels in the models that it compiles."""

from __future__ import annotations

import argparse
import atexit
import builtins
import contextlib
import os
import runpy
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType, TracebackType
from typing import NoReturn

from ..entrances.choices import CASTS, SETTINGS
from ..entrances.compilers import with_backend
from ..kernels.records import Numerics
from ..planning.registry import separate
from .interception import Interception
from .ranks import joined_ranks

BACKEND = "ATTNREWRITE_BACKEND"  # environment variable: the choices where --backend is not given


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="attnrewrite run",
        description="Runs a Python script with other attention kernels in the models that it compiles. A report on stderr at "
        "the end lists the attention that was swapped, the attention that was not and why, and the number of attention calls "
        "outside of compiled graphs. Exit code, arguments, stdin and tracebacks are the script's own.",
    )
    made.add_argument(
        "--backend", help=f"kernels in order of preference: a,b; or auto, or tune (default: the variable {BACKEND})"
    )
    made.add_argument(
        "--rule",
        action="append",
        default=[],
        metavar="PATTERN=A,B",
        help="other kernels for the attention sites that match PATTERN; may be repeated",
    )
    made.add_argument(
        "--compile",
        choices=("existing", "denoiser", "all"),
        default="existing",
        help="existing: the models that the script compiles with torch.compile (default); denoiser: also the denoisers of "
        "diffusers' pipelines, compiled at their first call; all: also all other models of these pipelines",
    )
    made.add_argument("--inner", default="inductor", help="the compiler for models of pipelines (default: inductor)")
    made.add_argument("--report", metavar="FILE", help="write the report to FILE too, as JSON")
    made.add_argument(
        "--strict", action="store_true", help="raise an error for an attention that none of the kernels may take"
    )
    made.add_argument("--numerics", choices=[each.word for each in Numerics], default="reordered")
    made.add_argument("--cast", choices=CASTS)
    made.add_argument(
        "--checks", action="store_true", default=None, help="check values before and after every swapped attention"
    )
    made.add_argument("--trust-remote-code", action="store_true")
    made.add_argument(
        "--context-parallel",
        action="store_true",
        help="the processes of torchrun share each compiled model (docs/context-parallel.md); rank 0 reports",
    )
    made.add_argument("-m", action="store_true", dest="module", help="script is the name of a module, as for python -m")
    made.add_argument("script")
    made.add_argument("arguments", nargs=argparse.REMAINDER, help="arguments of the script")
    return made


def main(arguments: Sequence[str]) -> NoReturn:
    """Runs the script, then ends the process with the script's exit code."""
    options = parser()
    given = options.parse_args(arguments)
    name, choices = ("--backend", given.backend) if given.backend else (BACKEND, os.environ.get(BACKEND, ""))
    if not choices.strip():
        options.error(
            f"no attention backend is named: give --backend, or set {BACKEND} (`attnrewrite info` lists the names)"
        )
    rules: dict[str, str] = {}
    for rule in given.rule:
        pattern, sign, chosen = rule.partition("=")
        if not sign:
            options.error(f"--rule is {rule!r}: write a pattern and its kernels, as 'cross=native'")
        if pattern in rules:
            options.error(f"--rule names {pattern!r} twice: {pattern}={rules[pattern]} and {rule}")
        rules[pattern] = chosen
    if given.context_parallel and int(os.environ.get("WORLD_SIZE", "1")) < 2:
        options.error(
            "--context-parallel needs several processes: torchrun --nproc-per-node 2 -m attnrewrite run --context-parallel ..."
        )
    try:
        backend = with_backend(
            *separate(choices),
            rules={pattern: separate(chosen) for pattern, chosen in rules.items()},
            inner=given.inner,
            **{name: getattr(given, name) for name in SETTINGS},
        )  # fmt: skip
    except ValueError as error:  # errors about other arguments name them
        options.error(f"{name}: {error}" if "attention backend is called" in str(error)[:30] else str(error))
    report = _report_file(given.report, options)
    if not given.module and not os.path.isfile(given.script):
        options.error(f"there is no script {given.script!r}")

    parallel = joined_ranks() if given.context_parallel else None
    interception = Interception(backend.policy, given.compile, given.inner, parallel)
    interception.install()
    # Registered first, so that it runs last: after the script's threads and the script's own atexit functions.
    if parallel is None or parallel.ranks.rank == 0:
        atexit.register(_finish, interception, report, given.script)
    else:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # the script of every rank prints the same
    _run(given.script, given.module, given.arguments)


def _report_file(path: str | None, options: argparse.ArgumentParser) -> Path | None:
    """The file for the report. It is opened once before the script runs, to find errors early. Each rank has its own file."""
    if path is None:
        return None
    file = Path(path).absolute()
    if (rank := os.environ.get("RANK", "0")) != "0":
        file = file.with_name(f"{file.stem}.rank{rank}{file.suffix}")
    try:
        file.open("a").close()
    except OSError as error:
        options.error(f"--report {path}: {error.strerror}")
    return file


def _finish(interception: Interception, report: Path | None, script: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # the script may have closed stderr
        print(interception, file=sys.stderr)
    if report is not None:
        report.write_text(interception.to_json(script=script) + "\n", encoding="utf-8")


def _run(script: str, module: bool, arguments: Sequence[str]) -> NoReturn:
    """Runs the script as `python script.py` or `python -m module` does: same `__main__`, arguments, traceback and exit code."""
    sys.argv = [script, *arguments]
    try:
        if module:
            if not sys.flags.safe_path:
                sys.path[0] = os.getcwd()
            runpy.run_module(script, run_name="__main__", alter_sys=True)
        else:
            if not sys.flags.safe_path:
                sys.path[0] = os.path.dirname(os.path.realpath(script))
            path = os.path.abspath(script)  # absolute in __main__.__file__ since Python 3.9, unlike in sys.argv
            main = ModuleType("__main__")
            vars(main).update(__file__=path, __builtins__=builtins, __cached__=None)
            sys.modules["__main__"] = main
            with open(path, "rb") as file:
                code = compile(file.read(), path, "exec")
            exec(code, vars(main))
    except SystemExit:
        raise
    except BaseException as error:
        error.__traceback__ = _of_the_script(error.__traceback__)
        sys.excepthook(type(error), error, error.__traceback__)
        if isinstance(error, KeyboardInterrupt):  # a shell expects the process to end by the signal
            _flush()
            atexit._run_exitfuncs()
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        sys.exit(1)
    sys.exit(0)


def _of_the_script(traceback: TracebackType | None) -> TracebackType | None:
    """The traceback without the frames of attnrewrite and runpy that started the script."""
    ours = (__file__, runpy.__file__, "<frozen runpy>")
    while traceback is not None and traceback.tb_frame.f_code.co_filename in ours:
        traceback = traceback.tb_next
    return traceback


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
