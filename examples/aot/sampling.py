"""A DDIM sampler for a model that predicts velocity. It needs torch only, for processes without diffusers."""

import torch


def sample(step, labels, noise, signal, steps=20):
    """Returns images (N, 1, 8, 8) in -1..1.

    step: (images, timestep, labels) -> velocity
    labels: (N,) int64
    noise: (N, 1, 8, 8)
    signal: (1000,), the share of signal at each timestep (`alphas_cumprod` of the scheduler)
    """
    images = noise
    times = torch.arange(steps - 1, -1, -1) * (len(signal) // steps)
    for index, time in enumerate(times):
        velocity = step(images, time.expand(len(labels)), labels)
        now = signal[time]
        before = signal[times[index + 1]] if index + 1 < steps else torch.tensor(1.0)
        clean = (now.sqrt() * images - (1 - now).sqrt() * velocity).clamp(-1, 1)
        rest = (images - now.sqrt() * clean) / (1 - now).sqrt()
        images = before.sqrt() * clean + (1 - before).sqrt() * rest
    return images
