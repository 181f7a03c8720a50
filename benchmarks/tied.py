"""`python -m benchmarks.tied DATA [--heads euclidean ...]`: how a decoder whose prototypes embed its tokens may start.

Short runs as in `benchmarks.starts`, with width 128 and the rate 3e-3, that differ in what becomes of a token's
prototype between the embedding and the final states: nothing (`same`), the sign turned (`opposite`, the default of
tied runs), the entries of the final states moved on by half the width (`roll`), a fixed rotation of them (`rotate`),
embeddings a tenth as long (`tenth`), or an exponent that rises from 4 to sqrt(D) over the run (`ramp`). `untied` has
two tables.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks import starts
from benchmarks.measuring import in_processes, keep, kept, markdown, parser
from common.progress import say
from common.strict_json import to_json

WIDTH, RATE = 128, 3e-3
WAYS = ("untied", "same", "opposite", "roll", "rotate", "tenth", "ramp")


def settings(way: str, head: str, seed: int, steps: int, data: str, vocab_size: int) -> dict[str, Any]:
    """A short run's configuration as plain values, but for what `train` does to the states on the way."""
    run = starts.Short(head, WIDTH, 1.0, 1.0, RATE, seed, steps, 2048, True, tied=way != "untied")
    tree = starts.settings(run, data, vocab_size)
    if run.tied:
        tree["head"]["tied_sign"] = -1 if way == "opposite" else 1
    if way == "ramp":
        tree["head"]["exponent"] = {"first": 4.0, "last": WIDTH**0.5}
    return tree


def train(way: str, head: str, seed: int, steps: int, data: str, vocab_size: int) -> dict[str, Any]:
    """One short run: its first loss and bits/byte."""
    import torch

    from pretrain import modules

    tree = settings(way, head, seed, steps, data, vocab_size)
    turned = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(5)))[0]
    as_they_are = modules.hidden_states

    def changed(decoder: Any, head: Any, inputs: Any, *rest: Any, **more: Any) -> Any:
        if way == "tenth":
            return decoder(0.1 * head.embed(inputs))
        hidden = as_they_are(decoder, head, inputs, *rest, **more)
        return hidden.roll(WIDTH // 2, -1) if way == "roll" else hidden @ turned if way == "rotate" else hidden

    with mock.patch.object(modules, "hidden_states", changed):
        return {"way": way, "head": head, "seed": seed, "steps": steps, **starts.train(tree)}


def rows(found: Sequence[dict[str, Any]], ways: Sequence[str]) -> Iterator[list[str]]:
    """Of each head and seed: bits/byte of every way, with the first loss."""
    yield ["head", "seed", *ways]
    for head, seed in dict.fromkeys((one["head"], one["seed"]) for one in found):
        by_way = {one["way"]: one for one in found if (one["head"], one["seed"]) == (head, seed)}
        told = {way: f"{one['bits_per_byte']:.3f} ({one['first_loss']:.1f})" for way, one in by_way.items()}
        yield [head, str(seed), *(told.get(way, "") for way in ways)]


def main(argv: Sequence[str] | None = None) -> int:
    """The command: a table, and with --out everything as JSON, which a second call goes on from."""
    made = parser("tied", __doc__)
    made.add_argument("data", type=Path, help="a prepared folder")
    made.add_argument("--heads", nargs="+", default=["euclidean", "cosine", "dot"])
    made.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    made.add_argument("--seeds", nargs="+", type=int, default=[1])
    made.add_argument("--steps", type=int, default=200)
    made.add_argument("--jobs", type=int, default=2)
    made.add_argument("--out", type=Path, help="a JSON file")
    return _run(made.parse_args(argv))


def _run(asked: argparse.Namespace) -> int:
    from data.shards import open_split

    vocab_size = open_split(asked.data, "train").vocab_size
    found = kept(asked.out)
    known = {(one["way"], one["head"], one["seed"], one["steps"]) for one in found}
    cells = [(way, head, seed, asked.steps) for seed in asked.seeds for head in asked.heads for way in asked.ways]
    calls = [(*cell, str(asked.data), vocab_size) for cell in cells if cell not in known]
    for _, run in in_processes(train, calls, asked.jobs):
        found.append(run)
        say(to_json(run))
        keep(asked.out, {"runs": found})
    print("\n".join(markdown(list(rows(found, asked.ways)))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
