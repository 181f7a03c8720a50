"""Signals after MNIST-1D (Greydanus and Kobak, arXiv:2011.14439): ten shapes, each drawn out of place, size and slope,
under correlated noise. The recipe is theirs; shapes and draws are ours, so that figures of the published data set do
not compare.

A signal is made in this order: a shape of 12 points; zeros behind it up to a length of 48 to 72; a factor of 0.8 to
1.2; a move to the right by 0 to 48 places, around the end; noise that is smooth over 2 places, of deviation 0.25; a
slope of -0.75 to 0.75 over the whole length; 40 points in equal steps, by straight lines; noise of deviation 0.02.
"""

from __future__ import annotations

import numpy as np
import torch

from pretrain.study.vision.examples import Part, Read

LENGTH = 40
PADDED = (48, 72)  # from and to, both included
FACTOR = 0.2
MOVES = 48
SMOOTH, SMOOTH_DEVIATION, DEVIATION = 2.0, 0.25, 0.02
SLOPE = 0.75
SHAPES = np.array(  # (10, 12), of mean about 0 and size about 1
    [
        [-0.8, -0.2, 0.4, 0.8, 1.0, 1.0, 1.0, 1.0, 0.8, 0.4, -0.2, -0.8],  # an arch
        [1.0, -0.8, -0.8, -0.6, -0.4, -0.2, 0.0, 0.2, 0.4, 0.6, 0.6, 0.6],  # a drop, then a rise
        [0.8, 1.0, 0.8, 0.4, 0.0, -0.4, -0.8, -1.0, -0.4, 0.2, 0.6, 0.8],  # a deep valley
        [0.9, 0.9, 0.3, -0.3, -0.9, -0.3, 0.3, -0.3, -0.9, -0.3, 0.3, 0.9],  # two valleys
        [-0.9, -0.5, -0.1, 0.3, 0.7, 1.1, -0.9, -0.9, -0.1, -0.1, -0.1, -0.1],  # a saw's tooth, then level
        [0.8, 0.8, 0.8, 0.8, -0.2, -0.2, -0.2, -0.2, -0.9, -0.9, -0.9, -0.9],  # steps down
        [-0.6, 0.2, 0.9, 0.2, -0.6, -1.0, -1.0, -0.6, 0.2, 0.9, 0.9, 0.9],  # a peak, then a plateau
        [1.0, 1.0, 0.9, 0.7, 0.4, 0.0, -0.4, -0.7, -0.8, -0.9, -0.9, -0.9],  # an even fall
        [-0.8, 0.8, -0.8, 0.8, -0.8, 0.8, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0],  # a ringing that stops
        [-0.2, -0.2, -0.2, -0.2, 1.2, -1.2, 1.0, -0.2, -0.2, -0.2, -0.2, -0.2],  # a pulse
    ]
)


def read(train: int, test: int, seed: int) -> Read:
    """`train` and `test` signals (N, 1, 40) of classes in turn; the same for a seed everywhere."""
    draws = np.random.default_rng(seed)
    parts = []
    for count in (train, test):
        labels = np.arange(count) % len(SHAPES)
        made = np.stack([signal(SHAPES[label], draws) for label in labels])
        parts.append(Part(torch.tensor(made, dtype=torch.float32)[:, None], torch.tensor(labels)))
    keys = [f"signal {place}" for place in range(train)]
    return Read(parts[0], keys, [str(label) for label in range(len(SHAPES))], test=parts[1])


def signal(shape: np.ndarray, draws: np.random.Generator) -> np.ndarray:
    """One signal (40,) of a shape (12,)."""
    from scipy.ndimage import gaussian_filter1d

    padded = np.zeros(draws.integers(PADDED[0], PADDED[1] + 1))
    padded[: len(shape)] = shape * draws.uniform(1 - FACTOR, 1 + FACTOR)
    moved = np.roll(padded, draws.integers(0, MOVES + 1))
    smooth = gaussian_filter1d(draws.standard_normal(len(moved)), SMOOTH, mode="wrap")
    smooth *= SMOOTH_DEVIATION * np.sqrt(2 * SMOOTH * np.sqrt(np.pi))  # a Gaussian's sum of squares, undone
    sloped = moved + smooth + draws.uniform(-SLOPE, SLOPE) * np.linspace(-0.5, 0.5, len(moved))
    at = np.linspace(0, len(sloped) - 1, LENGTH)
    return np.interp(at, np.arange(len(sloped)), sloped) + DEVIATION * draws.standard_normal(LENGTH)
