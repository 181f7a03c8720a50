"""Masked and document-masked runs, from text to held-out figures: the same on any number of ranks, and as defined."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data.shards import open_split
from data.tokenizer import EOS, MASK
from model.reference import scores_reference
from pretrain import report
from pretrain.analysis import interpretation as geometry
from pretrain.analysis.evaluation import open_task, run_task
from pretrain.analysis.scoring import MASKINGS, scoring
from pretrain.batches import inputs_and_targets
from pretrain.checkpoints.loading import load_weights
from pretrain.config import RunConfig
from pretrain.inference import load_model
from pretrain.modules import build_modules, score_positions
from pretrain.runtime.ranks import Ranks
from tests.support.ranks import run_ranks
from tests.support.tiny import make_text, run_to_end, text_config

T = 32
ALONE = Ranks(0, 1, 0, 1, torch.device("cpu"))
KINDS: dict[str, dict[str, Any]] = {
    "masked": {"model__objective": "masked", "model__post_norm": True, "model__bias": True},
    "documents": {"model__document_mask": True, "model__positions": {"theta": 1000.0}, "model__norm": "rmsnorm"},
}


def config(base: Path, kind: str, world: int) -> RunConfig:
    layout = {"run": str(base / f"{kind}-{world}"), "train__micro_batch": 4 // world, "parallel__zero": 3 * (world - 1)}
    return text_config(base, **{**KINDS[kind], **layout})


def train_each(base: Path, ranks: int) -> dict[str, list[float]]:
    return {kind: run_to_end(config(base, kind, ranks)) for kind in KINDS}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("objectives")
    make_text(base / "data")
    for world in (1, 2):
        run_ranks(train_each, world, base, base=base, ranks=world)
    return base


def records(base: Path, kind: str, world: int) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (base / f"{kind}-{world}" / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_train_as_one(trained: Path, kind: str) -> None:
    for one, two in zip(records(trained, kind, 1), records(trained, kind, 2), strict=True):
        assert one["kind"] == two["kind"]
        if one["kind"] in ("train", "eval"):
            assert one["loss"] == pytest.approx(two["loss"], abs=2e-4), one


def held_out(base: Path, kind: str) -> tuple[Any, Any, list[int]]:
    """The trained decoder in float64, the head, and the held-out stream."""
    cfg = config(base, kind, 1)
    decoder, head = build_modules(cfg, ALONE)
    load_weights(cfg.run / "checkpoints" / "step-00000004", decoder, head)
    split = open_split(cfg.data.path, "val")
    return decoder.double().eval(), head, split.read(0, split.tokens).tolist()


def nats_of(head: Any, hidden: torch.Tensor, target: int) -> float:
    scores = scores_reference(hidden[None], head.prototypes, "euclidean", head.exponent)
    return -scores.log_softmax(-1)[0, target].item()


@torch.no_grad()
def test_a_masked_model_is_scored_token_by_token_as_defined(trained: Path) -> None:
    decoder, head, stream = held_out(trained, "masked")
    nats, chosen = 0.0, range(0, len(stream), 17)  # a sample: by hand it is slow
    losses = {}
    for place in chosen:
        first, at = place // T * T, place % T
        window = (stream[first : first + T] + [EOS] * T)[:T]
        given = [MASK if k % MASKINGS == at % MASKINGS else one for k, one in enumerate(window)]
        losses[place] = nats_of(head, decoder(torch.tensor([given]))[0, at], stream[place])
    nats = float(run_task(open_task(trained / "masked-1"), ALONE)[0].nats.sum())
    logged = next(one for one in records(trained, "masked", 1) if one["kind"] == "eval")
    assert logged["loss"] == pytest.approx(nats / len(stream), rel=1e-5) and logged["tokens"] == len(stream)

    decoder.float()
    cfg = config(trained, "masked", 1)
    score = scoring(lambda i, at, t: score_positions(head, decoder(i), at, t), cfg.model, cfg.data.path)
    padded = torch.tensor(stream + [-100] * (-len(stream) % T)).view(-1, T)
    found, _ = score(torch.full_like(padded, EOS), torch.arange(T).expand_as(padded), padded)
    assert found.sum().item() == pytest.approx(nats, rel=1e-5)
    for place, expected in losses.items():
        assert found[place].item() == pytest.approx(expected, rel=1e-4)


@torch.no_grad()
def test_hidden_states_of_a_masked_model_are_those_behind_the_mask(trained: Path) -> None:
    decoder, _, stream = held_out(trained, "masked")
    source = geometry.open_run(trained / "masked-1", (), strict=False)
    ranks = Ranks(0, 1, 0, 1, torch.device("cpu"))
    model = load_model(source.checkpoint, source.cfg, source.tokenizer.sha256, source.split.eos_id, ranks)
    hidden, targets = geometry.hidden_states(model, source.split, MASK)
    assert targets.tolist() == stream and len(hidden) == len(stream)
    for place in range(0, len(stream), 29):
        first, at = place // T * T, place % T
        window = (stream[first : first + T] + [EOS] * T)[:T]
        given = [MASK if k % MASKINGS == at % MASKINGS else one for k, one in enumerate(window)]
        torch.testing.assert_close(hidden[place].double(), decoder(torch.tensor([given]))[0, at], atol=1e-4, rtol=1e-4)
    assert report.main([str(trained / "masked-1"), "--interpret"]) == 0


@torch.no_grad()
def test_documents_are_scored_from_their_own_tokens_alone(trained: Path) -> None:
    decoder, head, stream = held_out(trained, "documents")
    nats = 0.0
    for first in range(0, len(stream), T):
        inputs, targets = [EOS, *stream][first : first + T], stream[first : first + T]
        begins = [k for k, one in enumerate(inputs[: len(targets)]) if one == EOS or k == 0] + [len(targets)]
        for begin, end in zip(begins, begins[1:], strict=False):  # each document of the window alone
            hidden = decoder(torch.tensor([inputs[begin:end]]))[0]
            nats += sum(nats_of(head, h, target) for h, target in zip(hidden, targets[begin:end], strict=True))
    found = run_task(open_task(trained / "documents-1"), ALONE)[0]
    assert found.tokens.sum() == len(stream) and found.nats.sum() == pytest.approx(nats, rel=1e-5)
    assert math.isfinite(found.perplexity)


def test_a_batch_is_one_tensor_of_inputs_and_targets() -> None:
    tokens = torch.arange(10).view(2, 5)
    assert [one.tolist() for one in inputs_and_targets(tokens, masked=False)] == [
        [[0, 1, 2, 3], [5, 6, 7, 8]], [[1, 2, 3, 4], [6, 7, 8, 9]],
    ]  # fmt: skip
    halves = inputs_and_targets(torch.tensor([[1, 2, -100, 7]]), masked=True)
    assert [one.tolist() for one in halves] == [[[1, 2]], [[-100, 7]]]


def test_masked_batches_depend_on_the_seed_and_the_sample_alone(trained: Path) -> None:
    from data.loader import Windows
    from pretrain.batches import Batches, samples_of

    def passes(world: int, rank: int, seed: int) -> np.ndarray:
        cfg = config(trained, "masked", world)
        cfg = cfg.model_copy(update={"train": cfg.train.model_copy(update={"seed": seed})})
        windows = Windows(open_split(cfg.data.path, "train"), T, seed)
        return torch.cat(list(Batches(windows, cfg, Ranks(rank, world, rank, world, ALONE.device)).of(3))).numpy()

    whole = passes(1, 0, seed=1)
    assert whole.shape == (8, 2 * T) and np.array_equal(whole, passes(1, 0, seed=1))
    for rank in (0, 1):
        mine = samples_of(3, rank, 2, 8) - samples_of(3, 0, 1, 8)[0]
        assert np.array_equal(passes(2, rank, seed=1), whole[mine])
    assert not np.array_equal(whole, passes(1, 0, seed=2))
    assert ((whole[:, T:] >= 0).sum(1) == round(0.15 * T)).all()
