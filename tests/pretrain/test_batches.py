"""Batches: the same stream for every layout and however it is read, one step ahead of training."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.loader import Windows
from data.shards import open_split
from model.decoder import document_positions
from pretrain.batches import Batches, samples_of
from pretrain.runtime.ranks import Ranks
from tests.support.ranks import run_ranks
from tests.support.tiny import SEQUENCES, T, make_data, tiny_config

ALONE = Ranks(0, 1, 0, 1, torch.device("cpu"))


class Alone(Ranks):
    """A rank of a world whose other ranks are asked one after the other."""

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        return x


@pytest.fixture(scope="module")
def windows(tmp_path_factory: pytest.TempPathFactory) -> Windows:
    folder = tmp_path_factory.mktemp("batches") / "data"
    return Windows(open_split(make_data(folder), "train"), T, seed=1)


def batches(windows: Windows, micro_batch: int = 4, rank: int = 0, world: int = 1) -> Batches:
    ranks = Alone(rank, world, rank, world, torch.device("cpu"))
    return Batches(windows, tiny_config(train__micro_batch=micro_batch), ranks)


@settings(max_examples=20, deadline=None)
@given(st.sampled_from([(1, 8), (1, 4), (1, 1), (2, 4), (2, 1), (4, 2), (8, 1)]), st.integers(0, 500))
def test_every_layout_reads_the_same_samples_with_the_same_fingerprint(windows, layout, step) -> None:
    world, micro_batch = layout
    expected = windows.batch(step * SEQUENCES, SEQUENCES)
    whole = batches(windows)
    assert np.array_equal(torch.cat(list(whole.of(step))).numpy(), expected)
    found, hashes = np.empty_like(expected), 0
    for rank in range(world):
        mine = batches(windows, micro_batch, rank, world)
        passes = list(mine.of(step))
        assert all(part.shape == (micro_batch, T + 1) and part.dtype == torch.int64 for part in passes)
        found[rank::world] = torch.cat(passes)
        hashes += int(mine.fingerprint(), 16)
    assert np.array_equal(found, expected) and f"{hashes:016x}" == whole.fingerprint()


def test_any_order_of_steps_reads_what_the_step_says(windows: Windows) -> None:
    reader = batches(windows)
    for step in (0, 1, 2, 7, 3, 3, 4, 0):
        assert np.array_equal(torch.cat(list(reader.of(step))).numpy(), windows.batch(step * SEQUENCES, SEQUENCES))


class Watched(Windows):
    """Remembers which steps were read, on the main thread or not; cannot read `broken`."""

    def __init__(self, windows: Windows, broken: int | None = None) -> None:
        super().__init__(windows.split, windows.seq_len, windows.seed)
        self.broken, self.two = broken, threading.Event()
        self.read: list[tuple[int, bool]] = []

    def samples(self, numbers: np.ndarray) -> np.ndarray:
        step = int(numbers[0]) // SEQUENCES
        self.read.append((step, threading.current_thread() is threading.main_thread()))
        if len(self.read) == 2:
            self.two.set()
        if step == self.broken:
            raise OSError("the disk is gone")
        return super().samples(numbers)


def test_the_next_step_is_read_while_this_one_is_trained(windows: Windows) -> None:
    watched = Watched(windows)
    passes = batches(watched).of(0)
    next(passes)
    assert watched.two.wait(30), "step 1 is read though step 0 is not done"
    assert watched.read == [(0, False), (1, False)]


def test_what_the_reader_raises_reaches_training_at_its_step(windows: Windows) -> None:
    reader = batches(Watched(windows, broken=2))
    assert len(list(reader.of(0))) == len(list(reader.of(1))) == 2
    with pytest.raises(OSError, match="the disk is gone"):
        list(reader.of(2))


def test_what_was_waited_for_adds_up(windows: Windows) -> None:
    reader = batches(windows)
    list(reader.of(0))
    first = reader.waited_s
    list(reader.of(1))
    assert 0 < first < reader.waited_s


def test_ranks_share_a_step() -> None:
    parts = [samples_of(3, rank, 3, 12).tolist() for rank in range(3)]
    assert sorted(sum(parts, [])) == list(range(36, 48)) and parts[1] == [37, 40, 43, 46]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gets_its_batches_from_pinned_memory(windows: Windows) -> None:
    reader = Batches(windows, tiny_config(), replace(ALONE, device=torch.device("cuda", 0)))
    assert reader.read(0).tokens.is_pinned()
    assert np.array_equal(torch.cat(list(reader.of(0))).cpu().numpy(), windows.batch(0, SEQUENCES))


@pytest.mark.parametrize("world", [1, 2, 4])
def test_tokens_are_counted_by_source(windows: Windows, world: int) -> None:
    readers = [batches(windows, 1, rank, world) for rank in range(world)]
    expected = {"some": 0, "other": 0}
    names = np.array(windows.split.sources)[
        np.repeat(
            windows.split.document_sources(), np.diff(windows.split.document_starts(), append=windows.split.tokens)
        )
    ]
    for step in (0, 1):
        for reader in readers:
            list(reader.of(step))
        for window in windows.order(np.arange(step * SEQUENCES, (step + 1) * SEQUENCES)).tolist():
            for name in names[window * T : (window + 1) * T]:
                expected[name] += 1
    counts = [reader.tokens_by_source() for reader in readers]
    assert {name: sum(count[name] for count in counts) for name in expected} == expected
    assert min(expected.values()) > 0 and sum(expected.values()) == 2 * SEQUENCES * T
    readers[0].restart()
    assert set(readers[0].tokens_by_source().values()) == {0}


def check_documents(base: Path) -> list[tuple[int | None, int]]:
    """For each pass of a step: how many documents the decoder is told of, and how many there are."""
    from pretrain import engine
    from tests.support.tiny import opened

    make_data(base / "data")
    cfg = tiny_config(run=str(base / "run"), data__path=str(base / "data"), model__document_mask=True)
    told: list[tuple[int | None, int]] = []
    inner = engine.hidden_states

    def counting(*given: Any) -> torch.Tensor:
        _, _, inputs, _, eos_id, documents = given
        told.append((documents, int((document_positions(inputs, eos_id) == 0).sum())))
        return inner(*given)

    with pytest.MonkeyPatch.context() as patch, opened(cfg) as run:
        patch.setattr(engine, "hidden_states", counting)
        run.step(0)
    return told


def test_documents_are_counted_in_host_memory_and_told(tmp_path: Path) -> None:
    (told,) = run_ranks(check_documents, 1, tmp_path, base=tmp_path)
    assert len(told) == 2 and all(counted == there for counted, there in told)
    assert any(there > 4 for _, there in told), "some row holds several"
