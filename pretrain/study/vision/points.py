"""Points in a plane, one class in the middle of four others: a toy for the claim of arXiv:2502.01628 that distances
separate what products do not. The points are ours.

A score w . x without a bias is 0 in the middle for every class: what a class wins is a wedge from there, so that a
linear softmax cannot have the middle right. A distance gives the middle to the prototype that lies there. A bias, or
one hidden layer, takes the difference away.
"""

from __future__ import annotations

import numpy as np
import torch

from pretrain.study.vision.examples import Part, Read

PLACES = np.array([[0.0, 0.0], [1.0, 1.0], [1.0, -1.0], [-1.0, -1.0], [-1.0, 1.0]])
DEVIATION = 0.2  # of each coordinate around its class's place


def read(train: int, test: int, seed: int) -> Read:
    """`train` and `test` points (N, 1, 2) of classes in turn, the middle first; the same for a seed everywhere."""
    draws = np.random.default_rng(seed)
    parts = []
    for count in (train, test):
        labels = np.arange(count) % len(PLACES)
        made = PLACES[labels] + DEVIATION * draws.standard_normal((count, 2))
        parts.append(Part(torch.tensor(made, dtype=torch.float32)[:, None], torch.tensor(labels)))
    keys = [f"point {place}" for place in range(train)]
    return Read(parts[0], keys, ["middle", *(f"corner {k}" for k in range(1, len(PLACES)))], test=parts[1])
