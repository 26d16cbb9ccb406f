"""attnrewrite at the command line."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from . import __version__, support


def explain(names: str) -> str:
    """The plan for a small model that attends in all the ways that are told apart."""
    from .demo_model import Demo, inputs
    from .explaining import explain as explained

    return str(explained(Demo().eval(), *inputs(), backend=names.split(",")))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m attnrewrite", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="every kernel: usable here, or why not")
    commands.add_parser("table", help="the support matrix as Markdown: what each kernel takes")
    of_explain = commands.add_parser("explain", help="what is found in a small model, and which kernels take it")
    of_explain.add_argument("--backend", default="_native_flash,flex", help="names in order of preference")
    given = parser.parse_args(arguments)
    if given.command == "explain":
        try:
            print(explain(given.backend))
        except ValueError as error:
            parser.error(f"--backend: {error}")
    else:
        print(support.info(__version__) if given.command == "info" else support.matrix().rstrip())


if __name__ == "__main__":
    main()
