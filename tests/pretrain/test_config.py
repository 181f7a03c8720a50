"""Configuration: what is derived, and every refusal with its remedy."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from common.errors import ConfigError
from model.distance_settings import SETTINGS
from pretrain.config import check_data, check_layout, dump, from_tree, load
from tests.support.tiny import make_data, tiny_config, tiny_tree


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"head__exponnent": 2.0}, "head.exponnent: unknown key; did you mean head.exponent?"),
        ({"trian": {}}, "trian: unknown key; did you mean train?"),
        ({"train__steps": "ten"}, "train.steps: given \"ten\"; expected a valid integer"),
        ({"train__steps": 0}, "train.steps: given 0; expected greater than 0"),
        ({"train__precision": "fp16"}, "train.precision: given \"fp16\""),
        ({"train__deterministic": 1}, "train.deterministic: given 1; expected a valid boolean"),
        ({"parallel__backend": "nccl"}, "parallel.backend: given \"nccl\"; expected 'auto' or 'gloo'"),
        ({"head__exponent": 0}, "exponent=0.0 must be positive"),
        ({"head__exponent": -1.5}, "exponent=-1.5 must be positive"),
        ({"head__distance": "euclid"}, "distance='euclid': expected one of euclidean, manhattan"),
        ({"head__params": {"p": 3}}, "p=3.0: euclidean takes no parameter"),
        ({"head__distance": "minkowski", "head__params": {"q": 3}}, "q=3.0: minkowski takes p"),
        ({"head__distance": "minkowski", "head__params": {"p": -1}}, "p=-1.0: expected a positive number"),
        ({"head__distance": "hamming", "head__params": {"kind": "firm"}}, "expected soft, hard or gumbel"),
        ({"head__distance": "mahalanobis", "head__params": {"factor": "half"}}, "expected diagonal or full"),
        ({"head__exponent": {"first": 0, "last": 2}}, "head.exponent.*first.*greater than 0"),
        ({"model__heads": 3}, "dim=32 must be a multiple of heads=3"),
        ({"model__kv_heads": 3}, "heads=2 must be a multiple of kv_heads=3"),
        ({"model__positions": {"theta": 1e4}, "model__head_dim": 15}, "a head's width of 15 must be even"),
        ({"model__positions": {"theta": 0.5}}, "model.positions.*theta.*greater than 1"),
        ({"model__positions": {"scaling": {"factor": 8, "low": 4, "high": 1}}}, "low=4.0 must be below high=1.0"),
        ({"model__norm": "rmsnorm", "model__bias": True}, "rmsnorm has none; set bias: false, and qkv_bias: true"),
        ({"model__objective": "masked", "model__document_mask": True}, "document_mask=true needs objective=causal"),
        ({"model__vocab_size": 99}, "model.vocab_size=99 must equal data.tokenizer.vocab_size=67"),
        ({"train__tokens_per_step": 63}, "must be a multiple of model.seq_len=8"),
        ({"optim__min_lr": 1.0}, "min_lr=1.0 must not be above lr=0.01"),
        ({"optim__betas": [0.9, 1.5]}, "must lie in"),
        ({"parallel__zero": 4}, "parallel.zero: given 4"),
        ({"parallel__vocab": 0}, "parallel.vocab: given 0; expected greater than 0 or 'node' or 'world'"),
        ({"data__tokenizer__vocab_size": 70_000}, "does not fit dtype uint16"),
        ({"deepspeed": {"train_batch_size": 8}}, "train_batch_size is set by Overtone itself: use train.tokens"),
        ({"deepspeed": {"zero_optimization": {"stage": 2}}}, "deepspeed.zero_optimization.stage .* use parallel.zero"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_with_its_remedy(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        tiny_config(**changes)


@pytest.mark.parametrize("section", ["run", "data", "model", "train", "optim"])
def test_a_missing_section_is_named(section: str) -> None:
    tree = tiny_tree()
    del tree[section]
    with pytest.raises(ConfigError, match=rf"(^|\n){section}: missing"):
        from_tree(tree)


def test_the_deepspeed_block_is_passed_on() -> None:
    from pretrain.engine import deepspeed_config

    block = {"zero_optimization": {"overlap_comm": False}, "wall_clock_breakdown": True}
    made = deepspeed_config(tiny_config(deepspeed=block, parallel__zero=2), world=1)
    assert made["wall_clock_breakdown"] is True
    assert made["zero_optimization"]["overlap_comm"] is False and made["zero_optimization"]["stage"] == 2


def test_a_layout_that_does_not_divide_a_step_is_refused() -> None:
    cfg = tiny_config(train__micro_batch=2)  # 8 sequences per step
    assert [cfg.accumulation(world) for world in (1, 2, 4)] == [4, 2, 1]
    with pytest.raises(ConfigError, match="micro_batch can be nothing: 8 sequences cannot be shared by 3 ranks"):
        check_layout(cfg, 3, 3)
    with pytest.raises(ConfigError, match="With 8 ranks, micro_batch can be 1"):
        check_layout(cfg, 8, 8)
    with pytest.raises(
        ConfigError, match="a vocabulary group of 3 ranks does not divide the world of 4. Possible here: 1, 2, 4"
    ):
        check_layout(tiny_config(train__micro_batch=2, parallel__vocab=3), 4, 4)
    assert tiny_config(parallel__vocab="node").parallel.vocab_ranks(8, 4) == 4
    assert tiny_config(parallel__vocab="world").parallel.vocab_ranks(8, 4) == 8


def test_rates_warm_up_and_follow_their_schedule() -> None:
    def rates(**optim: Any) -> list[float]:
        changes = {f"optim__{key}": value for key, value in {"lr": 1.0, "min_lr": 0.1, **optim}.items()}
        cfg = tiny_config(train__steps=10, **changes)
        return [cfg.lr_at(step) for step in range(10)]

    cosine = rates(warmup_steps=4)
    assert cosine[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert cosine[7] == pytest.approx(0.55) and cosine == sorted(cosine[:4]) + sorted(cosine[4:], reverse=True)
    assert min(cosine[4:]) > 0.1
    wsd = rates(schedule="wsd", decay_fraction=0.5)
    assert wsd[:6] == [1.0] * 6 and wsd[9] == pytest.approx(0.1 + 0.9 / 5)
    assert rates(schedule="constant") == [1.0] * 10


def test_data_of_another_vocabulary_or_too_small_are_refused(tmp_path: Path) -> None:
    make_data(tmp_path / "data")
    check_data(tiny_config(data__path=str(tmp_path / "data")))
    with pytest.raises(ConfigError, match="vocabulary of 67, the config one of 99"):
        check_data(tiny_config(data__path=str(tmp_path / "data"), data__tokenizer__vocab_size=99))
    (tmp_path / "other.model").write_bytes(b"another model")
    for model, fits in (("data/tokenizer.model", True), ("other.model", False), ("missing.model", False)):
        cfg = tiny_config(data__path=str(tmp_path / "data"), data__tokenizer__model=str(tmp_path / model))
        if fits:
            check_data(cfg)
        else:
            with pytest.raises(ConfigError, match="is not the tokenizer that made the shards"):
                check_data(cfg)
    with pytest.raises(ConfigError, match="fewer than one window"):
        check_data(tiny_config(data__path=str(tmp_path / "data"), model__seq_len=4096, train__tokens_per_step=4096))
    with pytest.raises(ConfigError, match="python -m data prepare"):
        check_data(tiny_config(data__path=str(tmp_path / "missing")))


def test_every_parameter_is_claimed_once_and_decays_as_asked() -> None:
    from model.decoder import Decoder
    from model.head import HarmonicHead
    from pretrain.optim import parameter_groups

    cfg = tiny_config(model__bias=True)
    decoder, head = Decoder(cfg.model), HarmonicHead(67, 32, distance="mahalanobis", factor="full", exponent="learned")
    everything = {name for module in (decoder, head) for name, _ in module.named_parameters()}

    def decaying(*also: str) -> set[str]:
        groups = parameter_groups([decoder, head], tiny_config(optim__also_decay=list(also)).optim)
        claimed = [name for group in groups for name in group["names"]]  # type: ignore[attr-defined]
        assert sorted(claimed) == sorted(everything)
        return {n for g in groups if g["weight_decay"] for n in g["names"]}  # type: ignore[attr-defined]

    matrices = {n for n in everything if n.endswith("weight") and "norm" not in n and n.startswith("blocks")}
    assert decaying() == matrices
    assert decaying("prototypes") == matrices | {"prototypes"}
    assert decaying("embeddings") == matrices | {"tokens.weight", "positions.weight"}
    assert decaying("norms", "biases", "embeddings", "prototypes") == everything - {"log_exponent", "factor"}


def test_a_tied_decoder_turns_the_sign_of_its_final_states(tmp_path: Path) -> None:
    from pretrain.modules import build_modules
    from pretrain.run_folder import RunFolder
    from pretrain.runtime.ranks import alone

    def sign(**changes: Any) -> float:
        decoder, _ = build_modules(tiny_config(**changes), alone())
        return math.copysign(1.0, decoder.output_scale)

    assert (sign(), sign(head__distance="dot")) == (1, 1)
    assert (sign(model__tied=True), sign(model__tied=True, head__distance="cosine")) == (-1, -1)
    assert sign(model__tied=True, head__distance="dot") == -1
    assert sign(model__tied=True, head__tied_sign=1) == 1
    with pytest.raises(ConfigError, match="head.tied_sign=-1 is of tied decoders: take it out, or set model.tied"):
        sign(head__tied_sign=-1)

    cfg = tiny_config(model__tied=True, run=str(tmp_path))
    (tmp_path / "config.yaml").write_text(dump(cfg))
    assert RunFolder(tmp_path).settings() == cfg and cfg.head.tied_sign == -1
    before = [line for line in dump(cfg).splitlines(keepends=True) if "tied_sign" not in line]
    (tmp_path / "config.yaml").write_text("".join(before))
    assert RunFolder(tmp_path).settings().head.tied_sign == 1, "a run of before there was such a setting"
    assert load(tmp_path / "config.yaml").head.tied_sign == -1, "the same words as a recipe of today"


@pytest.mark.parametrize("post_norm", [False, True])
@pytest.mark.parametrize("distance", list(SETTINGS))
def test_a_tied_decoder_starts_near_the_loss_of_an_untied_one(distance: str, post_norm: bool) -> None:
    from pretrain.modules import build_modules, hidden_states
    from pretrain.runtime.ranks import alone

    def first_loss(tied: bool) -> float:
        model = {
            "dim": 64,
            "layers": 2,
            "heads": 2,
            "seq_len": 32,
            "tied": tied,
            "post_norm": post_norm,
            "vocab_size": 512,
        }
        cfg = tiny_config(
            model=model, head={"distance": distance}, data__tokenizer__vocab_size=512, train__tokens_per_step=256
        )
        decoder, head = build_modules(cfg, alone())
        tokens = torch.randint(0, 512, (8, 33), generator=torch.Generator().manual_seed(1))
        return head(hidden_states(decoder, head, tokens[:, :-1], cfg, None), tokens[:, 1:]).item()

    assert first_loss(tied=True) < first_loss(tied=False) + 0.7


def test_an_exponent_ramp_goes_from_its_first_value_to_its_last() -> None:
    cfg = tiny_config(train__steps=11, head__exponent={"first": 2.0, "last": 6.0})
    assert [cfg.head_progress(step) for step in (-1, 0, 5, 10, 11)] == [0, 0, 0.5, 1, 1]
    soon = tiny_config(train__steps=11, head__exponent={"first": 2.0, "last": 6.0, "steps": 3})
    assert [soon.head_progress(step) for step in (0, 1, 2, 9)] == [0, 0.5, 1, 1]
    from model.head import HarmonicHead

    head = HarmonicHead(5, 4, **cfg.head.arguments())
    head.progress = cfg.head_progress(5)
    assert head.exponent == 4.0
