"""`python -m benchmarks.starts DATA [--heads dot euclidean ...]`: how a head's start and the learning rate decide what
short runs come to, over widths.

Every run trains a decoder of two layers, with heads 32 wide, from the same draws on the same batches, in float32 and in
one process of one thread, and is scored on the whole val split. A start is told in multiples: `entries` times 1/sqrt(D)
is the deviation of the prototypes' first entries, `features` times sqrt(D) for dot, times 1 for distances, the length
of the first final hidden states. Wider decoders carry the rate over as muP does (`base_dim`), or not (`--plain-rates`).
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from benchmarks.measuring import in_processes, keep, kept, markdown, parser
from common.progress import say

if TYPE_CHECKING:
    from torch import nn

    from model.head import HarmonicHead
    from pretrain.config import RunConfig

Look: TypeAlias = "Callable[[int, nn.Module, HarmonicHead, RunConfig], None]"
SEQUENCE, LAYERS, HEAD_WIDTH, BASE = 128, 2, 32, 64
WARM_UP, FLOOR = 0.1, 0.1  # shares: of the steps, and of the rate at the end


@dataclass(frozen=True)
class Short:
    """One short run."""

    head: str
    dim: int
    entries: float | str
    features: float
    lr: float
    seed: int
    steps: int
    tokens_per_step: int
    mup: bool
    tied: bool = False
    exponent: float | None = None  # times the head's own


def settings(run: Short, data: str, vocab_size: int) -> dict[str, Any]:
    """A run's configuration as plain values."""
    own = run.dim**0.5 if run.head == "dot" else 1.0
    std = run.entries if isinstance(run.entries, str) else run.entries * run.dim**-0.5
    head = {"distance": run.head, "init_std": std, "feature_length": run.features * own}
    if run.exponent is not None:
        head["exponent"] = run.exponent * run.dim**0.5
    model = {"seq_len": SEQUENCE, "layers": LAYERS, "heads": run.dim // HEAD_WIDTH, "dim": run.dim, "tied": run.tied}
    return {
        "run": "unused",
        "data": {"path": data, "source": {"kind": "embedded"}, "tokenizer": {"vocab_size": vocab_size}},
        "model": {**model, "base_dim": BASE if run.mup else None},
        "head": head,
        "train": {
            "steps": run.steps,
            "tokens_per_step": run.tokens_per_step,
            "micro_batch": run.tokens_per_step // SEQUENCE,
            "precision": "float32",
            "seed": run.seed,
        },
        "optim": {"lr": run.lr, "min_lr": FLOOR * run.lr, "warmup_steps": max(1, round(WARM_UP * run.steps))},
    }


def train(tree: dict[str, Any], look: Look | None = None) -> dict[str, Any]:
    """Trains a configuration's modules without an engine: the first loss, the last ones' mean (None: not finite), and
    bits/byte of the val split. `look` gets the updates so far, before the first and after every one.
    """
    import torch

    from data.loader import EvaluationWindows, Windows
    from data.shards import open_split
    from pretrain.analysis.scoring import evaluate
    from pretrain.config import from_tree
    from pretrain.modules import build_modules, hidden_states, score_positions
    from pretrain.optim import adamw
    from pretrain.runtime.ranks import alone

    torch.set_num_threads(1)
    cfg, ranks = from_tree(tree), alone()
    decoder, head = build_modules(cfg, ranks)
    optimizers = [adamw(module, cfg.optim) for module in (decoder, head)]
    windows = Windows(open_split(cfg.data.path, "train"), cfg.model.seq_len, cfg.train.seed)
    parameters = [*decoder.parameters(), *head.parameters()]
    losses: list[float] = []
    for step in range(cfg.train.steps):
        if look is not None:
            look(step, decoder, head, cfg)
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = cfg.lr_at(step) * group["lr_scale"]
        head.progress = cfg.head_progress(step)
        batch = torch.from_numpy(windows.batch(step * cfg.sequences_per_step(), cfg.sequences_per_step()))
        loss = head(hidden_states(decoder, head, batch[:, :-1], cfg, None), batch[:, 1:])
        loss.backward()
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            break
        torch.nn.utils.clip_grad_norm_(parameters, cfg.optim.clip or math.inf)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    if look is not None:
        look(cfg.train.steps, decoder, head, cfg)
    decoder.eval()
    head.eval()

    def score(inputs: torch.Tensor, at: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            return score_positions(head, hidden_states(decoder, head, inputs, cfg, None), at, targets)

    bits = None
    if math.isfinite(losses[-1]):
        held_out = EvaluationWindows(open_split(cfg.data.path, "val"), cfg.model.seq_len)
        bits = evaluate(score, held_out, 16, ranks).bits_per_byte
    tenth = losses[-max(1, len(losses) // 10) :]
    last = statistics.fmean(tenth) if math.isfinite(losses[-1]) else None
    return {"first_loss": losses[0], "last_loss": last, "bits_per_byte": bits}


def _train(run: Short, data: str, vocab_size: int) -> dict[str, Any]:
    return train(settings(run, data, vocab_size))


def grid(asked: argparse.Namespace) -> Iterator[Short]:
    """Every run that was asked for."""
    axes = (asked.dims, asked.heads, asked.entries, asked.features, asked.lrs, asked.seeds)
    for dim, head, entries, features, lr, seed in itertools.product(*axes):
        if entries == "gpt2" and head != "dot":
            continue
        yield Short(head, dim, entries, features, lr, seed, asked.steps, asked.tokens_per_step, not asked.plain_rates)


def best_rates(found: Sequence[dict[str, Any]]) -> Iterator[list[str]]:
    """Rows: of each head, width and start the mean bits/byte over seeds at every rate, the best one first."""
    rates = sorted({one["lr"] for one in found})
    yield ["head", "D", "entries", "features", "first loss", "best rate", *(f"{rate:g}" for rate in rates)]
    groups: dict[tuple[Any, ...], dict[float, list[dict[str, Any]]]] = {}
    for one in found:
        key = tuple(one[name] for name in ("head", "dim", "entries", "features"))
        groups.setdefault(key, {}).setdefault(one["lr"], []).append(one)
    for (head, dim, entries, features), runs in groups.items():
        bits: dict[float, float] = {}
        for rate, several in runs.items():
            known = [one["bits_per_byte"] for one in several if one["bits_per_byte"] is not None]
            if len(known) == len(several):
                bits[rate] = statistics.fmean(known)
        first = statistics.fmean(one["first_loss"] for several in runs.values() for one in several)
        told = [f"{bits[rate]:.4f}" if rate in bits else "diverged" if rate in runs else "" for rate in rates]
        best = f"{min(bits, key=bits.__getitem__):g}" if bits else "-"
        start = entries if isinstance(entries, str) else f"{entries:g}"
        yield [head, str(dim), start, f"{features:g}", f"{first:.3f}", best, *told]


def entries_or_name(given: str) -> float | str:
    """A multiple, or gpt2."""
    return given if given == "gpt2" else float(given)


def main(argv: Sequence[str] | None = None) -> int:
    """The command: a table, and with --out everything as JSON, which a second call goes on from."""
    made = parser("starts", __doc__)
    made.add_argument("data", type=Path, help="a prepared folder")
    made.add_argument("--heads", nargs="+", default=["dot", "euclidean"])
    made.add_argument("--dims", nargs="+", type=int, default=[64, 128, 256])
    made.add_argument("--entries", nargs="+", type=entries_or_name, default=["gpt2", 0.25, 0.5, 1.0, 2.0])
    made.add_argument("--features", nargs="+", type=float, default=[1.0])
    made.add_argument("--lrs", nargs="+", type=float, default=[1e-3, 3e-3, 1e-2])
    made.add_argument("--seeds", nargs="+", type=int, default=[1])
    made.add_argument("--steps", type=int, default=200)
    made.add_argument("--tokens-per-step", type=int, default=2048)
    made.add_argument("--plain-rates", action="store_true", help="without muP's scaling of rates and starts")
    made.add_argument("--jobs", type=int, default=2)
    made.add_argument("--out", type=Path, help="a JSON file")
    asked = made.parse_args(argv)
    from data.shards import open_split

    vocab_size = open_split(asked.data, "train").vocab_size
    found = kept(asked.out)
    known = {tuple(one[name] for name in Short.__dataclass_fields__) for one in found}
    left = [run for run in grid(asked) if tuple(asdict(run).values()) not in known]
    calls = [(run, str(asked.data), vocab_size) for run in left]
    for number, ((run, *_), figures) in enumerate(in_processes(_train, calls, asked.jobs), start=1):
        found.append({**asdict(run), **figures})
        say(f"{number} of {len(left)}: {run.head} {run.dim} {run.entries} {run.lr:g}: {figures['bits_per_byte']}")
        keep(asked.out, {"runs": found})
    print("\n".join(markdown(list(best_rates(found)))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
