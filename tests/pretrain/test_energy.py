"""Energy: replayed counters add up over phases and nodes; what was not measured is None."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pretrain import ranks as process
from pretrain.energy import Meter, Spent, zeus_counter
from pretrain.ranks import Ranks
from tests.ranks import run_ranks


@dataclass
class Replay:
    """A counter that replays recorded windows of two GPUs."""

    windows: list[dict[int, float]]
    keys: list[str] = field(default_factory=list)

    def begin_window(self, key: str) -> None:
        self.keys.append(key)

    def end_window(self, key: str) -> SimpleNamespace:
        assert self.keys[-1] == key
        return SimpleNamespace(gpu_energy=self.windows.pop(0))


def alone() -> Ranks:
    return Ranks(0, 1, 0, 1, torch.device("cpu"))


def test_phases_are_accounted_apart() -> None:
    meter = Meter(alone(), Replay([{0: 10.0, 1: 5.5}, {0: 2.0, 1: 0.0}]))
    with meter.window("train") as train:
        pass
    with meter.window("eval") as held_out:
        pass
    assert (train[0].gpu_j, held_out[0].gpu_j) == (15.5, 2.0)
    assert (train[0] + held_out[0]).gpu_j == 17.5
    assert train[0].seconds > 0


def test_unmeasured_is_none() -> None:
    assert zeus_counter(alone()) is None, "a CPU has no GPU energy"
    for counter in (None, Replay([{}])):
        meter = Meter(alone(), counter)
        meter.begin("train")
        assert meter.end().gpu_j is None
    assert (Spent(1.0, None) + Spent(2.0, 3.0)) == Spent(3.0, None)


def test_one_window_at_a_time() -> None:
    meter = Meter(alone(), None)
    meter.begin("train")
    with pytest.raises(AssertionError, match="train is still open"):
        meter.begin("eval")


def check_two_nodes(measured: list[bool]) -> float | None:
    """Two ranks as two nodes of one rank each."""
    real = process.start()
    ranks = Ranks(real.rank, real.world, 0, 1, real.device)
    counter = Replay([{0: 10.0 * (real.rank + 1)}]) if measured[real.rank] else None
    meter = Meter(ranks, counter)
    meter.begin("train")
    return meter.end().gpu_j


def test_nodes_are_summed_and_one_unmeasured_node_makes_none(tmp_path: Path) -> None:
    assert run_ranks(check_two_nodes, 2, tmp_path, measured=[True, True]) == [30.0, 30.0]
    assert run_ranks(check_two_nodes, 2, tmp_path, measured=[True, False]) == [None, None]
