"""Which parameters decay and learn at which rate, and that a rate carries over to a wider decoder."""

from __future__ import annotations

from typing import cast

import pytest
import torch

from model.config import DecoderConfig
from model.decoder import Decoder
from model.head import HarmonicHead
from pretrain.config import OptimConfig
from pretrain.optim import Group, adamw, parameter_groups

SIZES = {"vocab_size": 64, "seq_len": 16, "layers": 2, "heads": 4, "dim": 64, "norm": "rmsnorm", "qk_norm": True}


def names_of(group: Group) -> list[str]:
    return cast(list[str], group["names"])


def test_every_parameter_is_in_one_group() -> None:
    decoder = Decoder(DecoderConfig(**SIZES, qkv_bias=True, base_dim=16))
    matrices, rest = parameter_groups([decoder], OptimConfig(lr=0.1, weight_decay=0.3))
    assert sorted(names_of(matrices) + names_of(rest)) == sorted(name for name, _ in decoder.named_parameters())
    per_block = ("attention.qkv", "attention.projection", "mlp.up", "mlp.projection")
    assert set(names_of(matrices)) == {f"blocks.{block}.{name}.weight" for block in (0, 1) for name in per_block}
    assert (matrices["lr_scale"], matrices["weight_decay"]) == (0.25, 0.3)
    assert (rest["lr_scale"], rest["weight_decay"]) == (1.0, 0.0)
    norms = parameter_groups([decoder], OptimConfig(lr=0.1, also_decay=("norms",)))
    also = {name for group in norms if group["weight_decay"] for name in names_of(group)} - set(names_of(matrices))
    assert also == {n for n, _ in decoder.named_parameters() if "norm" in n}, "RMSNorms are norms"
    assert [group["lr_scale"] for group in norms] == [1.0, 0.25, 1.0]


def groups_of(head: HarmonicHead, **settings: object) -> dict[str, tuple[float, float]]:
    """(weight decay, scale of the rate) of a head's parameters and a decoder's matrices and embeddings."""
    cfg = OptimConfig(lr=0.1, **{"weight_decay": 0.3, **settings})  # type: ignore[arg-type]
    groups = parameter_groups([Decoder(DecoderConfig(**SIZES)), head], cfg)
    found = {n: (float(str(g["weight_decay"])), float(str(g["lr_scale"]))) for g in groups for n in names_of(g)}
    kinds = {"matrix": "blocks.0.mlp.up.weight", "embedding": "tokens.weight"}
    names = dict.fromkeys(("prototypes", "factor", "log_exponent")) | kinds
    return {kind: found[name or kind] for kind, name in names.items()}


def test_the_head_has_a_rate_and_a_decay_of_its_own() -> None:
    head = HarmonicHead(64, 64, distance="mahalanobis", exponent="learned")
    assert groups_of(head) == {
        "prototypes": (0, 1), "factor": (0, 1), "log_exponent": (0, 1), "matrix": (0.3, 1), "embedding": (0, 1),
    }  # fmt: skip
    own = groups_of(head, head_lr_scale=4.0, prototype_decay=0.01)
    assert own == {
        "prototypes": (0.01, 4), "factor": (0, 4), "log_exponent": (0, 4), "matrix": (0.3, 1), "embedding": (0, 1),
    }  # fmt: skip
    also = groups_of(head, also_decay=("embeddings",), prototype_decay=0.0, weight_decay=0.0)
    assert also["prototypes"] == (0, 1) and also["matrix"] == (0, 1)
    assert groups_of(head, also_decay=("prototypes",))["prototypes"] == (0.3, 1)


def test_prototypes_have_one_decay() -> None:
    with pytest.raises(ValueError, match=r"prototype_decay=0\.1.*take prototypes out of also_decay"):
        OptimConfig(lr=0.1, also_decay=("prototypes",), prototype_decay=0.1)


def test_prototypes_step_at_the_heads_rate_and_shrink_by_its_decay() -> None:
    head = HarmonicHead(8, 16, seed=1)
    start = head.prototypes.detach().clone()
    optimizer = adamw(head, OptimConfig(lr=0.01, head_lr_scale=4.0, prototype_decay=0.5))
    for group in optimizer.param_groups:
        group["lr"] *= group["lr_scale"]
    head.prototypes.grad = torch.ones_like(start)
    optimizer.step()
    torch.testing.assert_close(head.prototypes.detach(), start * (1 - 0.04 * 0.5) - 0.04)


def residual_change(dim: int, base_dim: int | None) -> float:
    """How far (root mean square) three updates move what the blocks add to the residual stream."""
    config = DecoderConfig(**{**SIZES, "heads": dim // 16, "dim": dim}, base_dim=base_dim)
    decoder, head = Decoder(config, hidden_length=1.0, seed=1), HarmonicHead(64, dim, seed=2)
    optimizer = adamw(decoder, OptimConfig(lr=3e-3, weight_decay=0.0))
    for group in optimizer.param_groups:
        group["lr"] *= group["lr_scale"]
    tokens = torch.randint(0, 64, (8, 17), generator=torch.Generator().manual_seed(1))
    ends: dict[str, torch.Tensor] = {}
    decoder.blocks[0].register_forward_pre_hook(lambda _, given: ends.update(first=given[0].detach()))
    decoder.blocks[-1].register_forward_hook(lambda _, __, out: ends.update(last=out.detach()))
    added = []
    for _ in range(4):
        loss = head(decoder(tokens[:, :-1]), tokens[:, 1:])
        added.append(ends["last"] - ends["first"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return (added[-1] - added[0]).square().mean().sqrt().item()


def test_updates_move_a_wider_decoder_as_far_with_a_base_and_further_without() -> None:
    """The coordinate check of arXiv:2203.03466, appendix D.1."""
    narrow = residual_change(64, None)
    assert residual_change(64, 64) == pytest.approx(narrow)
    assert residual_change(512, 64) == pytest.approx(narrow, rel=0.4)
    assert residual_change(512, None) > 5 * narrow


def test_the_first_weights_of_a_wider_decoder_are_smaller() -> None:
    weights = dict(Decoder(DecoderConfig(**{**SIZES, "dim": 256}, base_dim=64), seed=1).named_parameters())
    assert weights["blocks.0.mlp.up.weight"].std().item() == pytest.approx(0.01, rel=0.05)
    assert weights["blocks.0.mlp.projection.weight"].std().item() == pytest.approx(0.005, rel=0.05)
    assert weights["tokens.weight"].std().item() == pytest.approx(0.02, rel=0.05)
