"""`python -m attnrewrite info`: every kernel, and whether it can run here. `kernels`: what each of them takes."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch

from . import __version__
from .calls import AttentionCall
from .decisions import Refused, decide
from .machines import Machine, machine_of
from .records import Backend, Numerics
from .registry import names, records_of
from .support import matrix


def info() -> str:
    """The machine, and a line for each kernel: usable on its device, or the reason why not."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    machine = machine_of(device)
    lines = [f"attnrewrite {__version__} on {machine}"]
    width = max(map(len, names()))
    for name in names():
        state = usable(name, machine)
        lines.append(f"{name:<{width}}  {'yes' if state is None else 'no':<3}  {state or records_of(name)[0].summary}")
    return "\n".join(lines)


def usable(name: str, machine: Machine) -> str | None:
    """None if the kernel can run here on a plain call, otherwise its refusal."""
    records = records_of(name)
    record = next((each for each in records if machine.device in each.devices), records[0])
    decision = decide(record, plain_call(record, machine.device), machine, Numerics.QUANTISED)
    return str(decision) if isinstance(decision, Refused) else None


def plain_call(record: Backend, device: str) -> AttentionCall:
    """A call that only the machine can stand in the way of: a dtype of the record's own, no mask, 64 wide."""
    dtype = next(each for each in ("bfloat16", "float16", "float32", "float64") if each in record.dtypes)
    return AttentionCall("", 1, 1, 1, 128, 128, 64, 64, dtype, device)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m attnrewrite", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="every kernel: usable here, or why not")
    commands.add_parser("kernels", help="the support matrix as Markdown: what each kernel takes")
    command = parser.parse_args(arguments).command
    print(info() if command == "info" else matrix().rstrip())


if __name__ == "__main__":
    main()
