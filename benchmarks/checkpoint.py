"""`python -m benchmarks.checkpoint`: what a checkpoint costs, against the number of parameters.

For each size, on one process with random tokens: how long training waits for a save (the snapshot), how long until it
is published (written, hashed, flushed, renamed), and a resume (all files verified, then loaded); beside DeepSpeed's own
save_checkpoint and load_checkpoint of the same engine, which hold the trunk but not the head, are not flushed and not
verified. Medians of several.
"""

from __future__ import annotations

import statistics
import tempfile
from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from rich.table import Table

from benchmarks.measuring import alone, machine, parser, timed, trainer_of, wide_console
from pretrain.config import RunConfig, from_tree

SIZES = ((4, 256), (6, 384), (8, 512), (12, 768))  # layers, D
VOCAB, LENGTH = 8192, 64


@dataclass(frozen=True)
class Cost:
    """Seconds, and bytes of the checkpoint."""

    parameters: int
    stall_s: float
    save_s: float
    load_s: float
    size: int
    deepspeed_save_s: float
    deepspeed_load_s: float


def config(layers: int, dim: int, folder: Path) -> RunConfig:
    """A model of so many layers and width D, at ZeRO 1 and in bf16; nothing reads its data."""
    return from_tree(
        {
            "run": str(folder),
            "data": {"path": str(folder), "source": {"kind": "embedded"}, "tokenizer": {"vocab_size": VOCAB}},
            "model": {"seq_len": LENGTH, "layers": layers, "heads": dim // 64, "dim": dim},
            "train": {"steps": 1, "tokens_per_step": LENGTH, "micro_batch": 1, "precision": "bf16"},
            "optim": {"lr": 1e-4},
            "parallel": {"zero": 1},
        }
    )


def measure(layers: int, dim: int, repeats: int) -> Cost:
    """In this process."""
    from pretrain.checkpoints import loading, resume
    from pretrain.checkpoints.folder import Progress
    from pretrain.checkpoints.fragments import finish_load, head_fragments, trunk_fragments
    from pretrain.checkpoints.saver import Saver
    from pretrain.runtime import ranks as process

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        cfg = config(layers, dim, folder)
        trainer = trainer_of(cfg)
        trainer.train_step([torch.randint(0, VOCAB, (1, LENGTH + 1))], 1e-4)

        def fragments(part: tuple[int, int] | None = None) -> dict:
            head = head_fragments(trainer.head, trainer.head_optimizer, writes=True)
            return {**trunk_fragments(trainer.engine, part), **head}

        def load() -> None:
            found = resume.find(folder, "auto", trainer.ranks)
            assert found is not None
            loading.load(found, fragments())
            finish_load(trainer.engine, trainer.head_optimizer, 1)

        saver = Saver(folder, trainer.ranks, cfg.checkpoint)

        def save(step: int) -> None:
            saver.start(fragments((0, 1)), Progress(step=step), {"identity": {}})

        theirs = str(folder / "deepspeed")
        times: dict[str, list[float]] = defaultdict(list)
        size = 0
        for step in range(repeats + 1):
            times["stall_s"].append(timed(partial(save, step)))
            saved = saver.wait()
            assert saved is not None
            times["save_s"].append(saved.seconds)
            size = saved.size
            times["load_s"].append(timed(load))
            times["deepspeed_save_s"].append(timed(lambda: trainer.engine.save_checkpoint(theirs, tag="one")))
            times["deepspeed_load_s"].append(timed(lambda: trainer.engine.load_checkpoint(theirs, tag="one")))
        saver.close()
        count = sum(p.numel() for module in (trainer.engine.module, trainer.head) for p in module.parameters())
        trainer.engine.destroy()
        process.stop()
        medians = {name: statistics.median(values[1:]) for name, values in times.items()}  # the first warms up
        return Cost(parameters=count, size=size, **medians)


def main(argv: list[str] | None = None) -> None:
    """The command: a row for each of SIZES, each measured in a process of its own."""
    command = parser("checkpoint", __doc__)
    command.add_argument("--repeats", type=int, default=5, help="medians are over so many (default %(default)s)")
    repeats: int = command.parse_args(argv).repeats
    console = wide_console()
    table = Table("parameters", "bytes", "training waits, s", "saved after, s", "verified and loaded, s",
                  "DeepSpeed saves, s", "DeepSpeed loads, s")  # fmt: skip
    for layers, dim in SIZES:
        cost: Cost = alone(measure, layers, dim, repeats)
        times = (cost.stall_s, cost.save_s, cost.load_s, cost.deepspeed_save_s, cost.deepspeed_load_s)
        table.add_row(f"{cost.parameters / 1e6:.1f} M", f"{cost.size / 1e6:,.0f} MB", *(f"{t:.2f}" for t in times))
    console.print(machine("cpu"))
    console.print(table)


if __name__ == "__main__":
    main()
