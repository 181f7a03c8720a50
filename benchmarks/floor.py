"""`python -m benchmarks.floor DATA`: how near hidden states come to prototypes, against the floor of distances.

Short runs as in `benchmarks.tied`, of which every pair of a state and a prototype is looked at, on a batch that was
trained on and on one that is held out, after several numbers of updates. Then what a soft floor, d^2 + eps^2 with the
floor for eps, would do in its place: the loss's gradient by a state near a wrong prototype (model.reference, float64),
the updates until it is away, and how much the distances elsewhere would change.
Legend: N states x, V prototypes w, D width. Distances are told in units of |x|.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import starts, tied
from benchmarks.measuring import in_processes, keep, kept, markdown, parser
from common.progress import say
from common.strict_json import to_json

if TYPE_CHECKING:
    from torch import Tensor

WAYS = ("untied", "opposite", "same")  # of benchmarks.tied
TIMES = (1, 2, 10, 100)  # the floor: pairs within so many are counted
SHARES = (0.0, 0.05, 0.25, 0.5, 1.0)  # of all updates: when states are looked at
SEQUENCES = 16  # of each split
WIDTH, PROTOTYPES = 128, 2048  # of the state beside a wrong prototype
APART = (0.0, 1e-4, 1e-3, 1e-2, 1e-1)  # from it
AWAY = 0.1  # where it counts as off
ORDINARY = (1.0, 0.5, 0.25, 0.1, 0.01)
LONGEST = 1000  # updates


def nearness(hidden: Tensor, prototypes: Tensor, targets: Tensor, distance: str) -> dict[str, Any]:
    """States (N, D), prototypes (V, D), targets (N,): of all pairs the least d^2 / |x|^2, own prototypes and wrong ones
    apart, and how many are within TIMES the floor of d; of `cosine`, d^2 is that of rows of length 1.
    """
    import torch

    from model.distances import resolve
    from model.kernels.eager import Tokens

    entry = resolve(distance, {})
    x, w = (entry.transform(rows.double()) for rows in (hidden, prototypes))
    squares = x.square().sum(1, keepdim=True)
    q = (squares + w.square().sum(1) - 2 * x @ w.t()).clamp_min(0) / squares  # (N, V)
    apart = q / 2 if distance == "cosine" else (q * squares).sqrt()
    floor = entry.floor(Tokens(x))[:, None]
    own = torch.zeros_like(q, dtype=torch.bool).scatter_(1, targets[:, None], True)
    return {
        "pairs": q.numel(),
        "least_own": q[own].min().item(),
        "least_wrong": q[~own].min().item(),
        "within": {str(times): int((apart <= times * floor).sum()) for times in TIMES},
    }


def train(way: str, head: str, seed: int, steps: int, data: str, vocab_size: int) -> dict[str, Any]:
    """One short run, with what was seen on the way."""
    import torch

    from data.loader import Windows
    from data.shards import open_split
    from pretrain.modules import hidden_states

    tree = tied.settings(way, head, seed, steps, data, vocab_size)
    stops = {round(share * steps) for share in SHARES}
    seen: list[dict[str, Any]] = []

    @torch.no_grad()
    def look(step: int, decoder: Any, module: Any, cfg: Any) -> None:
        for split in ("train", "val") if step in stops else ():
            batch = torch.from_numpy(Windows(open_split(data, split), cfg.model.seq_len, seed).batch(0, SEQUENCES))
            hidden = hidden_states(decoder, module, batch[:, :-1], cfg, None).flatten(0, 1)
            near = nearness(hidden, module.prototypes[: module.shard.real], batch[:, 1:].flatten(), head)
            seen.append({"step": step, "split": split, **near})

    done = starts.train(tree, look)
    return {"way": way, "head": head, "seed": seed, "steps": steps, **done, "seen": seen}


def loss_near(x: Tensor, w: Tensor, soft: bool) -> Tensor:
    """The loss (1,), Euclidean, of a state (1, D) whose prototype is the first of (V, D); with a soft floor d^2 + eps^2
    or with the one that there is.
    """
    import torch
    from torch.nn import functional as F

    from model.distance_base import RELATIVE_FLOOR
    from model.reference import harmonic_loss_reference

    target, exponent = torch.zeros(1, dtype=torch.long), x.shape[1] ** 0.5
    if not soft:
        return harmonic_loss_reference(x, w, target, exponent=exponent)
    softened = (x[:, None] - w).square().sum(-1) + RELATIVE_FLOOR * x.detach().square().sum(1, keepdim=True)
    return F.cross_entropy(-exponent / 2 * softened.log(), target, reduction="none")


def beside(apart: float, dim: int, count: int) -> tuple[Tensor, Tensor]:
    """A state (1, D) of length 1 and prototypes (V, D) as heads start them; the second of these is `apart` from it."""
    import torch

    draws = torch.Generator().manual_seed(0)
    x, way = (torch.nn.functional.normalize(torch.randn(1, dim, generator=draws).double()) for _ in range(2))
    w = torch.randn(count, dim, generator=draws).double() * dim**-0.5
    w[1] = (x + apart * way)[0]
    return x, w


def push(apart: float, dim: int = WIDTH, count: int = PROTOTYPES) -> dict[str, Any]:
    """By either floor, of a state at `apart` from a wrong prototype: the gradient's length, how much of the descent
    leads straight away from there (None: no way is straight), and the updates by Adam at the rate of the runs until it
    is off.
    """
    import torch

    found: dict[str, Any] = {"apart": apart}
    for kind in ("hard", "soft"):
        x, w = beside(apart, dim, count)
        x.requires_grad_()
        (gradient,) = torch.autograd.grad(loss_near(x, w, kind == "soft").sum(), x)
        off = x.detach() - w[1]
        straight = (-gradient * off).sum().item() / apart if apart else None
        optimizer, updates = torch.optim.Adam([x], lr=tied.RATE), 0
        while (x.detach() - w[1]).norm() < AWAY and updates < LONGEST:
            optimizer.zero_grad()
            loss_near(x, w, kind == "soft").sum().backward()
            optimizer.step()
            updates += 1
        found[kind] = {"gradient": gradient.norm().item(), "straight": straight, "updates": updates}
    return found


def bend(apart: float) -> dict[str, float]:
    """How much longer a soft floor makes the Euclidean distance `apart`: relative, and in roundings of float32."""
    from model.distance_base import RELATIVE_FLOOR

    error = math.sqrt(1 + RELATIVE_FLOOR / apart**2) - 1
    return {"apart": apart, "relative": error, "roundings": error / 2.0**-24}


def run_rows(runs: Sequence[dict[str, Any]]) -> Iterator[list[str]]:
    """Of each run: over all looks the least d^2 / |x|^2, where, pairs within some floors, and all pairs."""
    heading = ["head", "table", "least, wrong", "updates", "split", "least, own", *(f"{t} floors" for t in TIMES)]
    yield [*heading, "pairs", "bits/byte"]
    for run in sorted(runs, key=lambda run: (run["head"], WAYS.index(run["way"]), run["seed"])):
        seen = run["seen"]
        least = min(seen, key=lambda one: one["least_wrong"])
        within = (f"{sum(one['within'][str(times)] for one in seen):,}" for times in TIMES)
        own = min(one["least_own"] for one in seen)
        near = [f"{least['least_wrong']:.3f}", str(least["step"]), least["split"], f"{own:.3f}"]
        pairs = sum(one["pairs"] for one in seen)
        yield [run["head"], run["way"], *near, *within, f"{pairs:,}", f"{run['bits_per_byte']:.3f}"]


def push_rows(pushes: Sequence[dict[str, Any]]) -> Iterator[list[str]]:
    """Of each distance to a wrong prototype, both floors beside each other."""
    columns = ("gradient", "straight", "updates")
    yield ["from a wrong prototype", *(f"{kind}: {column}" for column in columns for kind in ("hard", "soft"))]
    for one in pushes:
        told = (one[kind][column] for column in columns for kind in ("hard", "soft"))
        yield [f"{one['apart']:g}", *("-" if value is None else f"{value:.4g}" for value in told)]


def bend_rows(bends: Sequence[dict[str, float]]) -> Iterator[list[str]]:
    """Of each ordinary distance, what a soft floor adds."""
    yield ["distance", "longer by", "roundings of float32"]
    for one in bends:
        yield [f"{one['apart']:g}", f"{one['relative']:.2g}", f"{one['roundings']:,.0f}"]


def main(argv: Sequence[str] | None = None) -> int:
    """The command: three tables, and with --out everything as JSON, which a second call goes on from."""
    made = parser("floor", __doc__)
    made.add_argument("data", type=Path, help="a prepared folder")
    made.add_argument("--heads", nargs="+", default=["euclidean", "cosine"], choices=["euclidean", "cosine"])
    made.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    made.add_argument("--seeds", nargs="+", type=int, default=[1])
    made.add_argument("--steps", type=int, default=200)
    made.add_argument("--jobs", type=int, default=1)
    made.add_argument("--out", type=Path, help="a JSON file")
    return _run(made.parse_args(argv))


def _run(asked: argparse.Namespace) -> int:
    from data.shards import open_split

    vocab_size = open_split(asked.data, "train").vocab_size
    runs = kept(asked.out)
    known = {(one["way"], one["head"], one["seed"], one["steps"]) for one in runs}
    cells = [(way, head, seed, asked.steps) for seed in asked.seeds for head in asked.heads for way in asked.ways]
    pushes, bends = [push(apart) for apart in APART], [bend(apart) for apart in ORDINARY]
    calls = [(*cell, str(asked.data), vocab_size) for cell in cells if cell not in known]
    for _, run in in_processes(train, calls, asked.jobs):
        runs.append(run)
        say(f"{run['head']} {run['way']}: {to_json(run['seen'][-1])}")
        keep(asked.out, {"runs": runs, "push": pushes, "bend": bends})
    for rows in (run_rows(runs), push_rows(pushes), bend_rows(bends)):
        print("\n".join([*markdown(list(rows)), ""]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
