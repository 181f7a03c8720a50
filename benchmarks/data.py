"""`python -m benchmarks.data CONFIG [key=value ...]`: how fast prepared data are loaded, against what training takes.

One process reads training batches as a run reads them (shuffled windows over memory-mapped shards, with the fingerprint
of every batch), with warm files; then trains some steps of the configuration on all cores (or one GPU), the reader a
step ahead in its thread. The ratio is that of the two rates; what training still waited is beside it. Medians of steps.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from data.settings import ConfigError
from pretrain.config import RunConfig, check_data, check_layout, load

WARM_UP = 2
READ_SECONDS = 3.0


@dataclass(frozen=True)
class Loading:
    """Rates in tokens/s; `stored_bytes` are those of a token in its shard."""

    read: float
    trained: float
    stored_bytes: int
    waited: float  # share of the training steps' time

    @property
    def ratio(self) -> float:
        return self.read / self.trained


def loading(cfg: RunConfig, steps: int) -> Loading:
    """Reads for READ_SECONDS, then trains `steps` steps."""
    from data.loader import Windows
    from data.shards import open_split
    from pretrain import ranks as process
    from pretrain.batches import Batches
    from pretrain.engine import Trainer

    ranks = process.with_groups(process.start(), 1)
    split = open_split(cfg.data.path, "train")
    batches = Batches(Windows(split, cfg.model.seq_len, cfg.train.seed), cfg, ranks)
    tokens = cfg.train.tokens_per_step
    times: list[float] = []
    while sum(times) < READ_SECONDS or len(times) <= WARM_UP:
        began = time.perf_counter()
        batches.read(len(times))
        times.append(time.perf_counter() - began)
    read = tokens / statistics.median(times[WARM_UP:])

    trainer = Trainer(cfg, ranks)
    times = []
    for step in range(WARM_UP + steps):
        if step == WARM_UP:
            batches.waited_s = 0.0
        began = time.perf_counter()
        trainer.train_step(batches.of(step), cfg.lr_at(step)).loss.item()
        times.append(time.perf_counter() - began)
    spent = times[WARM_UP:]
    process.stop()
    itemsize = {"uint16": 2, "uint32": 4}[split.dtype]
    return Loading(read, tokens / statistics.median(spent), itemsize, batches.waited_s / sum(spent))


def loading_table(found: Loading) -> Table:
    table = Table("loading", "tokens/s", "GB/s of shards", "against training", "training waits")
    table.add_row(
        "read", f"{found.read:,.0f}", f"{found.read * found.stored_bytes / 1e9:.3f}", f"{found.ratio:,.0f}x", ""
    )
    table.add_row("trained", f"{found.trained:,.0f}", "", "1x", f"{found.waited:.2%}")
    return table


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.data", description="How fast data are loaded.")
    parser.add_argument("config", help="a YAML file of configs/, prepared")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--steps", type=int, default=5, help="training steps that are timed (default %(default)s)")
    args = parser.parse_args(argv)
    try:
        cfg = load(args.config, args.overrides)
        check_layout(cfg, 1, 1)
        check_data(cfg)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    import torch

    from benchmarks.head import machine  # torch: --help does without

    found = loading(cfg, args.steps)
    console = Console(width=max(110, Console().width), highlight=False)
    console.print(machine("cuda" if torch.cuda.is_available() else "cpu"))
    console.print(loading_table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
