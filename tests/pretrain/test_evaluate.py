"""Held-out figures: every token once, the true likelihood, the same on any number of ranks."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from data.shards import open_split
from model.reference import scores_reference
from pretrain import ranks as process
from pretrain.checkpoint import load_weights
from pretrain.evaluate import evaluate_run, unigram_bits_per_byte
from pretrain.modules import build_modules
from pretrain.ranks import Ranks
from tests.pretrain.tiny import T, make_data, run_to_end, tiny_config
from tests.ranks import run_ranks


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    base = tmp_path_factory.mktemp("trained")
    make_data(base / "data")
    cfg = tiny_config(run=str(base / "run"), data__path=str(base / "data"), train__steps=4)
    run_ranks(run_to_end, 1, base, cfg=cfg)
    return base


def reference_nats(run: Path) -> float:
    """The split's likelihood by float64 arithmetic, window by window in plain Python."""
    from pretrain.config import load

    cfg = load(run / "config.yaml")
    decoder, head = build_modules(cfg, Ranks(0, 1, 0, 1, torch.device("cpu")))
    load_weights(run / "checkpoints" / "step-00000004", decoder, head)
    decoder.double().eval()
    split = open_split(cfg.data.path, "val")
    stream = split.read(0, split.tokens).tolist()
    nats = 0.0
    for first in range(0, len(stream), T):
        targets = torch.tensor(stream[first : first + T])
        inputs = torch.tensor([split.eos_id if first == 0 else stream[first - 1], *stream[first : first + T - 1]])
        with torch.no_grad():
            hidden = decoder(inputs[None, : len(targets)])[0]
            scores = scores_reference(hidden, head.prototypes, "euclidean", head.exponent)
            nats += F.cross_entropy(scores, targets, reduction="sum").item()
    return nats


def check_evaluation(run: Path) -> dict[str, Any]:
    return evaluate_run(run, "val", process.start())[0].as_dict()


def test_is_the_reference_on_any_number_of_ranks(trained: Path) -> None:
    run = trained / "run"
    split = open_split(trained / "data", "val")
    nats = reference_nats(run)
    for world in (1, 2, 3):
        for found in run_ranks(check_evaluation, world, trained, run=run):
            assert found["tokens"] == split.tokens and found["text_bytes"] == split.text_bytes
            assert found["loss"] == pytest.approx(nats / split.tokens, rel=1e-6)
            assert found["perplexity"] == pytest.approx(math.exp(nats / split.tokens), rel=1e-5)
            assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / split.text_bytes, rel=1e-6)


def test_command(trained: Path) -> None:
    def call(*arguments: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "pretrain.evaluate", *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=120)

    whole, one = call(str(trained / "run"), "--json"), call(str(trained / "run" / "checkpoints" / "step-00000004"))
    assert whole.returncode == one.returncode == 0, whole.stderr + one.stderr
    found = json.loads(whole.stdout)
    assert f"perplexity {found['perplexity']:.3f}" in one.stdout
    record = [json.loads(line) for line in (trained / "run" / "metrics.jsonl").read_text().splitlines()][-2:]
    logged = next(r for r in record if r["kind"] == "eval")
    assert found["loss"] == pytest.approx(logged["loss"], rel=1e-5), "training's own evaluation says the same"
    missing = call(str(trained / "nowhere"))
    assert missing.returncode == 2 and "neither a run folder" in missing.stderr and "Traceback" not in missing.stderr


def test_unigram(tmp_path: Path) -> None:
    make_data(tmp_path / "data")
    train, val = (open_split(tmp_path / "data", name) for name in ("train", "val"))
    counts = np.bincount(train.read(0, train.tokens), minlength=67) + 1.0
    nats = sum(-math.log(counts[token] / counts.sum()) for token in val.read(0, val.tokens))
    assert unigram_bits_per_byte(train, val) == pytest.approx(nats / math.log(2) / val.text_bytes)
