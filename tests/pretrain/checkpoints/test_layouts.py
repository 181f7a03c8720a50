"""Layout does not matter: every ZeRO stage, world, vocabulary group and accumulation trains like plain PyTorch.

float32: to rounding. bf16: losses of five steps within BF16_LOSS of each other, whatever the layout (rounding of
activations and of gradients that are reduced in another order).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.ranks import run_ranks
from tests.support.tiny import (
    V,
    tiny_config,
    tokens_of,
    train_layout,
    train_plain,
)

FLOAT32_LOSS, FLOAT32_NORM, FLOAT32_WEIGHT = (
    2e-5,
    1e-4,
    5e-4,
)  # lr is 1e-2: Adam turns tiny gradients' rounding into weight
BF16_LOSS = 2e-2

WORLDS = [1, pytest.param(2, marks=pytest.mark.slow)]
OPTIMIZERS = {
    ("float32", 0): "AdamW",
    ("float32", 1): "DeepSpeedZeroOptimizer",
    ("float32", 2): "DeepSpeedZeroOptimizer",
    ("float32", 3): "DeepSpeedZeroOptimizer_Stage3",
    ("bf16", 0): "BF16_Optimizer",
    ("bf16", 1): "BF16_Optimizer",
    ("bf16", 2): "DeepSpeedZeroOptimizer",
    ("bf16", 3): "DeepSpeedZeroOptimizer_Stage3",
}
KINDS: dict[str, dict[str, Any]] = {
    "untied": {},
    "tied": {"model__tied": True, "optim__lr": 0.003},
    "cosine, learned exponent, biases": {
        "head__distance": "cosine", "head__exponent": "learned", "model__bias": True,
    },
    "mahalanobis, full factor": {"head__distance": "mahalanobis", "head__params": {"factor": "full"}},
    "manhattan": {"head__distance": "manhattan"},
    "softmax": {"head__distance": "dot"},
    "Qwen3, documents, a narrower base": {
        "model__norm": "rmsnorm", "model__mlp": "swiglu", "model__kv_heads": 1, "model__qk_norm": True,
        "model__positions": {"theta": 1000.0}, "model__window": 5, "model__document_mask": True, "model__base_dim": 8,
    },
}  # fmt: skip


def layouts(world: int, precision: str) -> list[dict[str, Any]]:
    """Every stage x accumulation {1, 2} x vocabulary group {1, world} of a world."""
    return [
        {"parallel__zero": zero, "parallel__vocab": vocab, "train__micro_batch": 8 // world // accumulation,
         "train__precision": precision}
        for zero in (0, 1, 2, 3)
        for accumulation in (1, 2)
        for vocab in sorted({1, world})
    ]  # fmt: skip


def check_layouts(kind: dict[str, Any], chosen: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [train_layout(tiny_config(**kind, **layout)) for layout in chosen]


def compare(found: dict[str, Any], plain: dict[str, Any], told: str) -> None:
    assert np.allclose(found["losses"], plain["losses"], atol=FLOAT32_LOSS, rtol=0), told
    assert np.allclose(found["norms"], plain["norms"], rtol=FLOAT32_NORM), told
    for name, expected in plain["parameters"].items():
        error = np.abs(found["parameters"][name] - expected).max()
        assert error < FLOAT32_WEIGHT, f"{told}: {name} is off by {error:.1e}"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world", WORLDS)
def test_float32_layouts_equal_plain_pytorch(world: int, kind: str, tmp_path: Path) -> None:
    plain = train_plain(tiny_config(**KINDS[kind]))
    assert max(plain["norms"]) > 0.5, "clipping is active"
    chosen = layouts(world, "float32")
    if kind not in ("untied", "tied"):
        chosen = chosen[:: len(chosen) // 4]  # a sample: the sharding of trunk and head is the same code
    for layout, found in zip(
        chosen, run_ranks(check_layouts, world, tmp_path, kind=KINDS[kind], chosen=chosen)[0], strict=True
    ):
        told = f"{kind}, {world} ranks, {layout}"
        assert found["optimizer"] == OPTIMIZERS["float32", layout["parallel__zero"]], told
        compare(found, plain, told)


@pytest.mark.parametrize("world", WORLDS)
def test_bf16_layouts_stay_within_the_bound(world: int, tmp_path: Path) -> None:
    plain = train_plain(tiny_config())
    chosen = layouts(world, "bf16")
    for layout, found in zip(chosen, run_ranks(check_layouts, world, tmp_path, kind={}, chosen=chosen)[0], strict=True):
        assert found["optimizer"] == OPTIMIZERS["bf16", layout["parallel__zero"]]
        assert np.allclose(found["losses"], plain["losses"], atol=BF16_LOSS, rtol=0), layout


def check_poisoned(chosen: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each layout, with a NaN in the second of three steps."""
    return [train_layout(tiny_config(**layout), steps=3, poison=1) for layout in chosen]


@pytest.mark.parametrize("world", WORLDS)
def test_a_nan_on_one_rank_skips_the_step_on_all(world: int, tmp_path: Path) -> None:
    chosen = [
        {"parallel__zero": zero, "parallel__vocab": world, "train__micro_batch": 4, "train__precision": precision}
        for precision in ("float32", "bf16")
        for zero in (0, 1, 2, 3)
    ]
    for layout, found in zip(chosen, run_ranks(check_poisoned, world, tmp_path, chosen=chosen)[0], strict=True):
        assert found["applied"] == [True, False, True], layout
        assert found["norms"][1] == float("inf"), layout
        assert all(np.isfinite(values).all() for values in found["parameters"].values()), layout


def check_gradients(chosen: list[dict[str, Any]]) -> list[dict[str, np.ndarray]]:
    """The trunk's gradients that DeepSpeed is about to step with, and the head's own, after one backward pass."""
    from deepspeed.utils import safe_get_full_grad

    from model.vocab_parallel import gather_rows
    from pretrain.engine import Trainer
    from pretrain.runtime import ranks as process

    found = []
    for layout in chosen:
        cfg = tiny_config(**layout)
        ranks = process.start()
        ranks = process.with_groups(ranks, cfg.parallel.vocab_ranks(ranks.world, ranks.local_world))
        trainer = Trainer(cfg, ranks)
        tokens = tokens_of(0)[ranks.rank :: ranks.world]
        trainer.engine.backward(trainer.head(trainer.hidden(tokens[:, :-1]), tokens[:, 1:]))
        gradients = {n: safe_get_full_grad(p).numpy().copy() for n, p in trainer.engine.module.named_parameters()}
        gradients["prototypes"] = gather_rows(trainer.head.prototypes.grad, trainer.head.shard.group)[:V].numpy()
        found.append(gradients)
        trainer.engine.destroy()
    return found


@pytest.mark.parametrize("world", WORLDS)
def test_gradients_equal_plain_pytorch(world: int, tmp_path: Path) -> None:
    from model.decoder import Decoder
    from model.head import HarmonicHead
    from model.reference import harmonic_loss_reference

    cfg = tiny_config()
    decoder = Decoder(cfg.model, hidden_length=cfg.hidden_length(), seed=cfg.train.seed)
    head = HarmonicHead(V, 32, seed=cfg.train.seed + 1)
    tokens = tokens_of(0)
    hidden = decoder(tokens[:, :-1]).reshape(-1, 32)
    losses = harmonic_loss_reference(hidden, head.prototypes, tokens[:, 1:].reshape(-1), exponent=head.exponent)
    losses.mean().backward()
    expected = {name: p.grad.numpy() for name, p in decoder.named_parameters()}
    expected["prototypes"] = head.prototypes.grad.numpy()
    chosen = [
        {"parallel__zero": zero, "parallel__vocab": world, "train__micro_batch": 8 // world} for zero in (1, 2, 3)
    ]
    for found in run_ranks(check_gradients, world, tmp_path, chosen=chosen)[0]:
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            assert np.abs(found[name] - gradient).max() <= 2e-6 * np.abs(gradient).max() + 1e-9, name
