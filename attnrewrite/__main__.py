"""`python -m attnrewrite info`: every kernel, and whether it can run here. `table`: what each of them takes."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from . import __version__
from .support import info, matrix


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m attnrewrite", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="every kernel: usable here, or why not")
    commands.add_parser("table", help="the support matrix as Markdown: what each kernel takes")
    command = parser.parse_args(arguments).command
    print(info(__version__) if command == "info" else matrix().rstrip())


if __name__ == "__main__":
    main()
