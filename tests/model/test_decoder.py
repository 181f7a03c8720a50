"""The decoder: causality, initialisation, options that must not change the result."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from model.attention import Pattern, SelfAttention
from model.config import DecoderConfig, HeadConfig
from model.decoder import Decoder
from model.head import HarmonicHead

SIZES = {"vocab_size": 50, "seq_len": 16, "layers": 2, "heads": 2, "dim": 24}


def hidden_and_gradient(decoder: Decoder, tokens: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    hidden = decoder(tokens)
    hidden.square().sum().backward()
    return hidden.detach(), {name: p.grad for name, p in decoder.named_parameters() if p.grad is not None}


def test_a_token_sees_only_what_is_before_it() -> None:
    decoder = Decoder(DecoderConfig(**SIZES), seed=1)
    tokens = torch.randint(0, 50, (2, 16))
    changed = tokens.clone()
    changed[:, 9] = (changed[:, 9] + 1) % 50
    before, after = decoder(tokens), decoder(changed)
    assert torch.equal(before[:, :9], after[:, :9])
    assert not torch.isclose(before[:, 9:], after[:, 9:]).all(-1).any()


def test_activation_checkpointing_changes_nothing() -> None:
    tokens = torch.randint(0, 50, (2, 16))
    plain = hidden_and_gradient(Decoder(DecoderConfig(**SIZES), seed=1), tokens)
    saved = hidden_and_gradient(Decoder(DecoderConfig(**SIZES, activation_checkpointing=True), seed=1), tokens)
    assert torch.equal(plain[0], saved[0])
    assert plain[1].keys() == saved[1].keys() and all(torch.equal(plain[1][n], saved[1][n]) for n in plain[1])


@pytest.mark.parametrize("positions", [1, 7, 64])
def test_short_attention_is_as_near_to_float64_as_torchs_kernel(positions: int) -> None:
    """bf16 on a CPU: output and gradient of both within the same rounding budget."""
    config = DecoderConfig(**{**SIZES, "dim": 96, "seq_len": 64})
    torch.manual_seed(1)
    module = SelfAttention(config)
    with torch.no_grad():
        module.qkv.weight.mul_(30)  # scores that matter
    x, upstream = torch.randn(3, positions, 96).bfloat16(), torch.randn(3, positions, 96).bfloat16()
    module = module.bfloat16()

    def output_and_gradient(dtype: torch.dtype, short: int) -> list[Tensor]:
        module.to(dtype).short = short
        given = x.to(dtype).requires_grad_()
        out = module(given, Pattern("sdpa", causal=True))
        (grad,) = torch.autograd.grad(out, given, upstream.to(dtype))
        return [out.detach().double(), grad.double()]

    truth = output_and_gradient(torch.float64, 0)
    fast, plain = (output_and_gradient(torch.bfloat16, short) for short in (64, 0))
    for f, p, t in zip(fast, plain, truth, strict=True):
        assert (f - t).norm() <= 1.5 * (p - t).norm() + 1e-3 * t.norm()
    assert positions == 1 or not torch.equal(fast[0], plain[0]), "two different ways were compared"


@pytest.mark.timeout(300)
@pytest.mark.slow
def test_compiling_changes_only_rounding() -> None:
    tokens = torch.randint(0, 50, (2, 16))
    plain = hidden_and_gradient(Decoder(DecoderConfig(**SIZES), seed=1), tokens)
    fast = hidden_and_gradient(Decoder(DecoderConfig(**SIZES, compile=True), seed=1), tokens)
    torch.testing.assert_close(plain[0], fast[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(plain[1], fast[1], rtol=1e-3, atol=1e-4)


def test_initialisation() -> None:
    decoder = Decoder(DecoderConfig(**{**SIZES, "dim": 240, "vocab_size": 500}, bias=True), hidden_length=1.0, seed=1)
    weights = dict(decoder.named_parameters())
    assert weights["tokens.weight"].std().item() == pytest.approx(0.02, rel=0.05)
    assert weights["blocks.1.mlp.up.weight"].std().item() == pytest.approx(0.02, rel=0.05)
    for name in ("blocks.0.mlp.projection.weight", "blocks.1.attention.projection.weight"):
        assert weights[name].std().item() == pytest.approx(0.02 / 4**0.5, rel=0.05)  # sqrt(2 L), L = 2
    assert all((p == 0).all() for n, p in weights.items() if n.endswith("bias"))
    lengths = decoder(torch.randint(0, 500, (2, 16))).norm(dim=-1)
    torch.testing.assert_close(lengths, torch.ones_like(lengths), rtol=1e-2, atol=1e-2)
    assert not [n for n, _ in Decoder(DecoderConfig(**SIZES)).named_parameters() if n.endswith("bias")]
    again = Decoder(DecoderConfig(**SIZES), seed=7), Decoder(DecoderConfig(**SIZES), seed=7)
    assert all(torch.equal(a, b) for a, b in zip(again[0].parameters(), again[1].parameters(), strict=True))


@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
def test_first_scores_are_as_spread_as_stated(distance: str) -> None:
    """n = sqrt(D), x and w of length 1; see `Distance.start`. Of cosine, d = 1 - x.w has deviation 1/sqrt(D)."""
    dim = 256
    head = HarmonicHead(4096, dim, distance=distance, seed=1)
    assert head.prototypes.norm(dim=1).mean().item() == pytest.approx(1, rel=0.01)
    hidden = torch.nn.functional.normalize(torch.randn(64, dim), dim=1)
    spread = head.log_probs(hidden).std(dim=1).mean().item()
    assert spread == pytest.approx({"euclidean": 6**0.5 / 4, "cosine": 1.0}[distance], rel=0.15)
    assert HeadConfig(distance="euclidean").hidden_length(dim) == 1.0
    assert HeadConfig(distance="dot").hidden_length(dim) == 16.0


def test_too_many_positions_are_refused() -> None:
    with pytest.raises(ValueError, match="17 positions given, the decoder has 16"):
        Decoder(DecoderConfig(**SIZES))(torch.zeros(1, 17, dtype=torch.int64))


def test_head_learns_its_exponent_and_refuses_nonsense() -> None:
    head = HarmonicHead(9, 16, exponent="learned", seed=1)
    assert head.exponent.item() == pytest.approx(4.0)
    head(torch.randn(5, 16), torch.randint(0, 9, (5,))).backward()
    assert head.log_exponent is not None and head.log_exponent.grad is not None and head.log_exponent.grad != 0
    assert HarmonicHead(9, 16, distance="dot", exponent="learned").log_exponent is None
    with pytest.raises(ValueError, match="expected a positive number, sqrt_dim, learned or a pair"):
        HarmonicHead(9, 16, exponent=-1.0)
    with pytest.raises(ValueError, match="expected one of"):
        HarmonicHead(9, 16, distance="manhatten")
