"""attnrewrite at the command line: `info`, `table`, `explain`, `run` and `bench`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from . import __version__, launching, support


def info(arguments: list[str]) -> None:
    """every kernel: usable here, or why not"""
    _no_more(arguments, "info")
    print(support.info(__version__))


def table(arguments: list[str]) -> None:
    """the support matrix as Markdown: what each kernel takes"""
    _no_more(arguments, "table")
    print(support.matrix().rstrip())


def explain(arguments: list[str]) -> None:
    """what is found in a small model that attends in all the ways that are told apart, and which kernels take it"""
    from .demo_model import Demo, inputs
    from .explaining import explain as explained

    parser = argparse.ArgumentParser(prog="attnrewrite explain", description=explain.__doc__)
    parser.add_argument("--backend", default="_native_flash,flex", help="names in order of preference")
    names = parser.parse_args(arguments).backend.split(",")
    try:
        print(explained(Demo().eval(), *inputs(), backend=names))
    except ValueError as error:
        parser.error(f"--backend: {error}")


def run(arguments: list[str]) -> None:
    """a script as it is, with other attention kernels in what it compiles (`attnrewrite run --help`)"""
    launching.main(arguments)


def bench(arguments: list[str]) -> None:
    """kernels by shape and steps of denoisers by variant, measured side by side (`attnrewrite bench --help`)"""
    from .benchmarks import command

    command.main(arguments)


# Each gets the arguments behind its name; its docstring is its line of help.
COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "info": info,
    "table": table,
    "explain": explain,
    "run": run,
    "bench": bench,
}


def main(arguments: Sequence[str] | None = None) -> None:
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(prog="attnrewrite", description="Attention kernels for torch.compile.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, function in COMMANDS.items():
        commands.add_parser(name, help=function.__doc__, add_help=False)
    command = parser.parse_args(given[:1]).command
    COMMANDS[command](given[1:])


def _no_more(arguments: list[str], command: str) -> None:
    argparse.ArgumentParser(prog=f"attnrewrite {command}", description=COMMANDS[command].__doc__).parse_args(arguments)


if __name__ == "__main__":
    main()
