"""What the rows of the sinks cost in Sol-Attn: computed by the kernel (`sink_q`), not at all, and as attnrewrite does.

    python bench/sink_rows.py [--rounds 15]

At HunyuanVideo's self attention, (1, 32896, 24, 128) in bfloat16, of which the last 256 tokens are a text with 100 that are no
padding. Queries and keys are a vector that all tokens of the video share, turned by their frame, plus noise. All variants take
turns in every round. It prints the median time in ms, and the relative error to float64 in the rows of the text.

Needs a CUDA GPU and comfy-kitchen.
"""

import argparse
import statistics
from functools import partial

import comfy_kitchen
import torch
import torch.nn.functional as F

from attnrewrite.backends.comfy_kitchen import HIDDEN, sink_blocks, sol_forward
from attnrewrite.commands.bench.rounds import in_turn
from attnrewrite.measuring.timing import Stopwatch

FRAMES, PLACES, HEADS, DIM = 17, 1920, 24, 128
TEXT, REAL = 256, 100
TAU = 3.0


def data() -> tuple[list[torch.Tensor], torch.Tensor]:
    """Query, key and value (batch, length, heads, head_dim), and the mask (1, length) of the keys that take part."""
    torch.manual_seed(0)
    tokens = FRAMES * PLACES + TEXT
    turns = torch.randn(FRAMES, 1, HEADS, DIM, device="cuda").cumsum(0).expand(-1, PLACES, -1, -1).flatten(0, 1)
    common = F.pad(turns, (0, 0, 0, 0, 0, TEXT)) * FRAMES**-0.5
    query, key, value = (torch.randn(tokens, HEADS, DIM, device="cuda") for _ in range(3))
    tensors = [each[None].to(torch.bfloat16) for each in (common + 0.3 * query, common + 0.3 * key, value)]
    return tensors, (torch.arange(tokens, device="cuda") < tokens - TEXT + REAL)[None]


def by_the_kernel(tensors: list[torch.Tensor], mask: torch.Tensor, rows: bool) -> torch.Tensor:
    blocks = sink_blocks(mask.shape[1], -TEXT)
    bias = torch.where(mask, 0.0, HIDDEN)
    output: torch.Tensor = comfy_kitchen.sol_attn(
        *tensors, tau=TAU, sink_blocks=blocks, sink_q=blocks if rows else None, key_bias=bias
    )
    return output


def exact(tensors: list[torch.Tensor], mask: torch.Tensor) -> torch.Tensor:
    """The rows of the text in float64."""
    query, key, value = (each.transpose(1, 2) for each in tensors)
    found = []
    for head in range(HEADS):
        one, keys, values = (each[:, head].double() for each in (query[:, :, -TEXT:], key, value))
        scores = (one @ keys.mT * DIM**-0.5).masked_fill(~mask[:, None], -torch.inf)
        found.append(scores.softmax(-1) @ values)
    return torch.stack(found, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    given = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("bench/sink_rows.py needs a CUDA GPU: Sol-Attn's kernel runs on no other device")
    tensors, mask = data()
    variants = {
        "by the kernel (sink_q)": partial(by_the_kernel, tensors, mask, True),
        "not at all": partial(by_the_kernel, tensors, mask, False),
        "attnrewrite": partial(sol_forward, comfy_kitchen, *tensors, mask, None, TAU, 0.0, -TEXT),
    }
    reference = exact(tensors, mask)
    errors = {name: float((run()[:, -TEXT:] - reference).norm() / reference.norm()) for name, run in variants.items()}
    watch = Stopwatch(mask.device)
    times = in_turn({name: partial(watch.sample, run, 3) for name, run in variants.items()}, given.rounds)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {given.rounds} rounds")
    for name, taken in times.items():
        print(f"{name:24}{1e3 * statistics.median(taken):6.2f} ms, error of the text's rows {errors[name]:.1e}")


if __name__ == "__main__":
    main()
