"""Trains the video DiT on one GPU in a fixed time, and writes its weights, and beside them what was printed (.txt).

    python examples/moving_digits/train.py [--seconds 450]
    python examples/moving_digits/train.py --start local --seconds 235 \\
        --weights examples/moving_digits/weights_local.safetensors

Most of the time goes to short videos of 16 x 32 x 32 (4,096 tokens), the last 45 % to those that are sampled, of 32 x 64 x 64
(32,768 tokens): the rotary positions carry over. With `--start local` each token attends its neighbours before training,
and queries and keys learn slowly; otherwise training has to find where to look. Without a GPU give --small, which only shows
that everything runs.
"""

import argparse
import copy
import math
import time
from pathlib import Path

import moving_digits
import torch

from attnrewrite.commands.bench.structure import Rotary, share

RATE, EMA = 1e-3, 0.998
ROPE = 1e4  # the base of diffusers' rotary embedding
TURNS = ((0.1, 1.0), (0.05, 0.7))  # radians a token: from and to, of even heads and of odd ones
LOOSE = 0.07  # the norm of the part from the hidden states, relative to the shared vector, before training
PEAK = 45.0  # the score of a token with itself
SLOW = 0.05  # the learning rate of what makes queries and keys of the hidden states, relative to that of the rest
STAGES = ((0.55, (16, 32, 32), 16), (1.0, moving_digits.SIZE, 2))  # until which part of the time; size; batch
SMALL = ((0.5, (4, 24, 24), 4), (1.0, (6, 24, 28), 2))


def loss_of(model, images, labels, size, generator=None):
    """Mean squared error of the predicted velocity at noise levels of a shifted logit-normal distribution."""
    drawn = moving_digits.videos(images, size, generator)
    noise = torch.randn(drawn.shape, device=drawn.device, generator=generator)
    t = torch.randn(len(drawn), device=drawn.device, generator=generator).sigmoid()
    t = moving_digits.SHIFT * t / (1 + (moving_digits.SHIFT - 1) * t)
    level = t[:, None, None, None, None]
    with torch.autocast(drawn.device.type, torch.bfloat16):
        (velocity,) = model(
            hidden_states=(1 - level) * drawn + level * noise,
            timestep=1000 * t,
            encoder_hidden_states=moving_digits.prompts(labels),
            return_dict=False,
        )
    return torch.nn.functional.mse_loss(velocity.float(), noise - drawn)


def start_local(model):
    """Changes the self attention of an untrained model, in place: each token attends its neighbours in time, height and width.

    Queries and keys become a vector that all tokens of a head share, plus a part from the hidden states. The rotary embedding
    turns the vector by a token's position, so that a score falls with the distance. The vector lies in the channels that turn
    by an angle within `TURNS` from token to token. It is not trained: the biases and the norms' weights stay as they are here.
    """
    rope = model.rope
    angles = torch.cat(Rotary(moving_digits.SIZE, (rope.t_dim, rope.h_dim, rope.w_dim), ROPE).angles())
    for block in model.blocks:
        attention = block.attn1
        turns = [TURNS[head % len(TURNS)] for head in range(attention.heads)]
        pairs = torch.stack([(angles >= least) & (angles <= most) for least, most in turns]).float()
        share(attention, pairs, LOOSE, PEAK)
        for fixed in (attention.to_q.bias, attention.to_k.bias, attention.norm_q.weight, attention.norm_k.weight):
            fixed.requires_grad_(False)


def groups(model, local):
    """The parameters by their learning rate. local: what makes queries and keys of the hidden states learns slowly. At the rate
    of the rest it outgrows the shared vector, and attention looks far."""
    slow = [each.weight for block in model.blocks for each in (block.attn1.to_q, block.attn1.to_k)] if local else []
    rest = [each for each in model.parameters() if not any(each is one for one in slow)]
    return [{"params": rest, "relative": 1.0}, {"params": slow, "relative": SLOW}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=450.0)
    parser.add_argument("--weights", type=Path, default=moving_digits.WEIGHTS)
    parser.add_argument(
        "--start", choices=("random", "local"), default="random", help="what attention is before training"
    )
    parser.add_argument("--small", action="store_true")
    given = parser.parse_args()
    if not (given.small or torch.cuda.is_available()):
        parser.error("training needs a GPU: --small shows on a CPU that everything runs")
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    images, labels = (each.to(device) for each in moving_digits.digits())
    kept = len(images) - moving_digits.HELD_OUT
    model = moving_digits.build(layers=1 if given.small else 4).train()
    if given.start == "local":
        start_local(model)
    model = model.to(device)
    average = copy.deepcopy(model).eval().requires_grad_(False)
    if not given.small:
        model.compile_repeated_blocks(dynamic=False)
    optimizer = torch.optim.AdamW(groups(model, given.start == "local"), lr=RATE, weight_decay=0.01, betas=(0.9, 0.99))
    machine = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    lines = [f"{machine}, torch {torch.__version__}, {sum(each.numel() for each in model.parameters()):,} parameters"]
    print(lines[0], flush=True)

    started, told, step, running = time.perf_counter(), 0.0, 0, torch.zeros((), device=device)
    while (passed := (time.perf_counter() - started) / given.seconds) < 1:
        _, size, batch = next(stage for stage in (SMALL if given.small else STAGES) if passed < stage[0])
        step += 1
        rate = RATE * min(1, step / 200) * (0.02 + 0.98 * (0.5 + 0.5 * math.cos(math.pi * passed)))
        for group in optimizer.param_groups:
            group["lr"] = rate * group["relative"]
        index = torch.randint(0, kept, (batch,), device=device)
        loss = loss_of(model, images[index], labels[index], size)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            weight = 1 - min(EMA, step / (step + 10))
            for mean, now in zip(average.parameters(), model.parameters(), strict=True):
                mean.lerp_(now, weight)
            running.lerp_(loss, 0.02 if step > 1 else 1.0)
        if passed - told > 0.05:
            told = passed
            lines.append(f"{passed * given.seconds:.0f} s, step {step}, {size}: loss {running.item():.5f}")
            print(lines[-1], flush=True)
            moving_digits.save(average, given.weights)

    moving_digits.save(average, given.weights)
    stored = moving_digits.load(given.weights).to(device)
    chosen = torch.arange(kept, kept + (2 if given.small else 40), device=device)
    for name, each in (("in float32", average), ("as stored, in 8 bits", stored)):
        generator = torch.Generator(device).manual_seed(1)
        with torch.no_grad():
            losses = [loss_of(each, images[one : one + 1], labels[one : one + 1], size, generator) for one in chosen]
        lines.append(f"held-out digits, {name}: loss {torch.stack(losses).mean().item():.5f}")
        print(lines[-1], flush=True)
    given.weights.with_suffix(".txt").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
