"""Trains the demo's model on the CPU (about 25 minutes on two cores) and writes weights/ and figures.txt.

python examples/digits/train.py            # trains, then scores
python examples/digits/train.py --score    # scores the existing weights: the last line of figures.txt
"""

import copy
import math
import sys
import time
from pathlib import Path

import digits
import torch
from sklearn.svm import SVC

STEPS, BATCH, LEARNING_RATE, EMA = 6000, 64, 1e-3, 0.999


def loss_of(model, schedule, images, labels, generator=None):
    """Mean squared error of the predicted velocity at uniformly drawn timesteps."""
    noise = torch.randn(images.shape, generator=generator)
    t = torch.randint(0, schedule.config.num_train_timesteps, (len(images),), generator=generator)
    v = model(schedule.add_noise(images, noise, t), timestep=t, class_labels=labels).sample
    return torch.nn.functional.mse_loss(v, schedule.get_velocity(images, noise, t))


def score(count: int = 500) -> str:
    """The share of generated digits that a classifier of real digits reads as the requested digit."""
    images, labels = digits.data()
    classifier = SVC().fit(images.flatten(1).numpy(), labels.numpy())
    wanted = torch.arange(count) % digits.CLASSES
    noise = torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    made = digits.sample(digits.load(), wanted, noise)
    share = float((torch.from_numpy(classifier.predict(made.flatten(1).numpy())) == wanted).float().mean())
    return f"{count} generated digits, read as the digit asked for by an SVM of the real ones: {share:.1%}"


def main() -> None:
    torch.manual_seed(0)
    images, labels = digits.data()
    kept = len(images) - digits.HELD_OUT
    model, schedule = digits.build().train(), digits.scheduler()
    average = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    lines, started, running = [], time.perf_counter(), 0.0

    for step in range(1, STEPS + 1):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1, step / 200) * (0.5 + 0.5 * math.cos(math.pi * step / STEPS))
        index = torch.randint(0, kept, (BATCH,))
        loss = loss_of(model, schedule, images[index], labels[index])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        decay = min(EMA, step / (step + 10))
        for mean, now in zip(average.parameters(), model.parameters(), strict=True):
            mean.lerp_(now.detach(), 1 - decay)
        running = 0.98 * running + 0.02 * loss.item() if step > 1 else loss.item()
        if step % 500 == 0:
            with torch.no_grad():
                fixed = torch.Generator().manual_seed(2)
                held_out = loss_of(average, schedule, images[kept:], labels[kept:], fixed)
            line = f"step {step}: loss {running:.4f}, held out {held_out:.4f}, {time.perf_counter() - started:.0f} s"
            print(line, flush=True)
            lines.append(line)

    average.half().save_pretrained(digits.WEIGHTS)
    lines.append(score())
    print(lines[-1])
    (Path(__file__).parent / "figures.txt").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    if "--score" in sys.argv:
        print(score())
    else:
        main()
