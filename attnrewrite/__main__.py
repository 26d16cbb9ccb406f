"""attnrewrite at the command line: `info`, `table`, `explain`, `rewrite`, `run` and `bench`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

from .commands import run as launching
from .commands import support
from .kernels.machines import Machine, known_machine
from .kernels.records import Numerics
from .parallel.rates import Rates
from .parallel.settings import DescribedRanks
from .planning.registry import separate
from .version import __version__


def info(arguments: list[str]) -> None:
    """list all kernels: usable on this machine (or one that --machine describes), or the reason why not"""
    parser = argparse.ArgumentParser(prog="attnrewrite info", description=info.__doc__)
    parser.add_argument("--machine", type=_machine, help=MACHINE)
    print(support.info(__version__, parser.parse_args(arguments).machine))


def table(arguments: list[str]) -> None:
    """print the support matrix as Markdown: the calls that each kernel takes"""
    _no_more(arguments, "table")
    print(support.matrix().rstrip())


def explain(arguments: list[str]) -> None:
    """show the plan of a saved program; without a file, the plan of a small demo model with every kind of attention that
    attnrewrite distinguishes"""
    from .aot.archives import ProgramFileError
    from .aot.files import explain_file
    from .commands.demo_model import Demo, inputs
    from .entrances.explaining import explain as explained

    parser = argparse.ArgumentParser(prog="attnrewrite explain", description=explain.__doc__)
    parser.add_argument(
        "file", nargs="?", help="a .pt2 of attnrewrite.save or torch.export.save, or an AOTInductor package"
    )
    parser.add_argument(
        "--backend",
        help="kernel names in order of preference: plan the program for these, instead of showing the plan in the file",
    )
    parser.add_argument(
        "--context-parallel",
        type=int,
        metavar="N",
        help="plan the demo model for N devices that share it: what each of them has a part of, and what they exchange",
    )
    parser.add_argument("--machine", type=_machine, help=MACHINE)
    parser.add_argument(
        "--tflops", type=float, metavar="T", help=f"{SHARED} dense matrix products, in 10**12 FLOPs a second"
    )
    parser.add_argument(
        "--link", type=float, metavar="GB", help=f"{SHARED} what it sends to the others, in 10**9 bytes a second"
    )
    given = parser.parse_args(arguments)
    names = separate(given.backend or "")
    parallel = _described(parser, given)
    if given.machine and given.file and not names:
        parser.error("--machine needs --backend beside a file: without it the plan in the file is shown")
    try:
        if given.file:
            print(explain_file(given.file, *names, machine=given.machine))
        else:
            # The weights of an inference: what is shared has no backward.
            demo = Demo().eval().requires_grad_(parallel is None)
            choices = names or ["_native_flash", "flex"]
            print(explained(demo, *inputs(), backend=choices, machine=given.machine, context_parallel=parallel))
    except ValueError as error:
        parser.error(f"--backend: {error}")
    except ProgramFileError as error:
        parser.error(str(error))


SHARED = "with --context-parallel, for the estimate of what exchanges take: of a device,"


def _described(parser: argparse.ArgumentParser, given: argparse.Namespace) -> DescribedRanks | None:
    """The devices of --context-parallel."""
    size, rates = given.context_parallel, {"tflops": given.tflops, "link": given.link}
    if size is None:
        for name, value in rates.items():
            if value is not None:
                parser.error(f"--{name} needs --context-parallel N: it says what a device that shares the model does")
        return None
    if size < 2:
        parser.error(f"--context-parallel {size}: give 2 devices or more")
    if given.file:
        parser.error(f"--context-parallel plans a model, not a saved program ({given.file})")
    try:
        return DescribedRanks(size, rates=Rates(**rates))
    except ValueError as error:
        parser.error(f"--{error}")


def rewrite(arguments: list[str]) -> None:
    """swap the kernels of a saved program, without its source: attnrewrite rewrite in.pt2 out.pt2 --backend flash_4,native"""
    from .aot.archives import ProgramFileError
    from .aot.files import retarget
    from .planning.planner import AttentionRefusedError

    parser = argparse.ArgumentParser(prog="attnrewrite rewrite", description=rewrite.__doc__)
    parser.add_argument("source", help="a .pt2 of attnrewrite.save or torch.export.save")
    parser.add_argument("target", help="the file to write; it may be the source file")
    parser.add_argument(
        "--backend", required=True, help="kernel names in order of preference; native alone restores the original"
    )
    parser.add_argument("--strict", action="store_true", help="fail if none of the kernels may take an attention")
    parser.add_argument(
        "--numerics", choices=[each.word for each in Numerics], help="how far results may differ from SDPA's"
    )
    parser.add_argument(
        "--machine",
        type=_machine,
        help=MACHINE,
    )
    given = parser.parse_args(arguments)
    try:
        settings = {"numerics": given.numerics} if given.numerics else {}
        names = separate(given.backend)
        report = retarget(given.source, given.target, *names, machine=given.machine, strict=given.strict, **settings)
    except ValueError as error:
        parser.error(f"--backend: {error}")
    except (ProgramFileError, AttentionRefusedError, OSError) as error:
        parser.error(str(error))
    print(report)


MACHINE = 'another machine, as JSON: {"device": "cuda", "capability": [9, 0], "packages": {"torch": "2.11.0"}}'


def _machine(text: str) -> Machine:
    fields: dict[str, Any] = {"device": "", "capability": None, "packages": {}, "name": ""}
    try:
        given = json.loads(text)
        if not isinstance(given, dict):
            raise ValueError("it is no JSON object")
        if unknown := given.keys() - fields:
            raise ValueError(f"{', '.join(map(repr, sorted(unknown)))} is not one of {', '.join(fields)}")
        machine = Machine.from_dict({**fields, **given})
        known_machine(machine)
    except (ValueError, TypeError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} does not describe a machine: {error}") from error
    return machine


def run(arguments: list[str]) -> None:
    """run a script unchanged, with other attention kernels in the models that it compiles (`attnrewrite run --help`)"""
    launching.main(arguments)


def bench(arguments: list[str]) -> None:
    """measure kernels by shape and denoiser steps by variant, side by side (`attnrewrite bench --help`)"""
    from .commands.bench import command

    command.main(arguments)


# Each function gets the arguments after its name. Its docstring is its help text.
COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "info": info,
    "table": table,
    "explain": explain,
    "rewrite": rewrite,
    "run": run,
    "bench": bench,
}


def main(arguments: Sequence[str] | None = None) -> None:
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(prog="attnrewrite", description="Attention kernels for torch.compile.")
    parser.add_argument("--version", action="version", version=f"attnrewrite {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, function in COMMANDS.items():
        commands.add_parser(name, help=function.__doc__, add_help=False)
    command = parser.parse_args(given[:1]).command
    COMMANDS[command](given[1:])


def _no_more(arguments: list[str], command: str) -> None:
    argparse.ArgumentParser(prog=f"attnrewrite {command}", description=COMMANDS[command].__doc__).parse_args(arguments)


if __name__ == "__main__":
    main()
