"""Attention: every kernel against a loop in float64; documents, windows, rotations and the choice of a kernel."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model import attention
from model.attention import Pattern, attend, choose_backend, pattern_of, rotated, rotations
from model.config import DecoderConfig, Rope
from model.decoder import Decoder, document_positions

EOS, V, T = 2, 40, 33
SIZES = {"vocab_size": V, "seq_len": 64, "layers": 2, "heads": 4, "dim": 32}
KINDS: dict[str, dict[str, Any]] = {
    "causal": {},
    "grouped queries": {"kv_heads": 2},
    "one key head, a window": {"kv_heads": 1, "window": 7},
    "seeing all": {"objective": "masked"},
    "a window on both sides": {"objective": "masked", "window": 4},
    "a window wider than the row": {"window": 50},
}


def by_hand(q: Tensor, k: Tensor, v: Tensor, config: DecoderConfig, documents: Tensor) -> Tensor:
    """The definition, query by query, in float64."""
    out = torch.zeros_like(q, dtype=torch.float64)
    group, reach = config.heads // config.key_heads(), config.window or 10**9
    for b, i, h in ((b, i, h) for b in range(len(q)) for i in range(q.shape[1]) for h in range(config.heads)):
        keys = [
            j
            for j in range(k.shape[1])
            if documents[b, i] == documents[b, j] and abs(i - j) < reach and (j <= i or config.objective == "masked")
        ]
        scores = k[b, keys, h // group].double() @ q[b, i, h].double() / q.shape[-1] ** 0.5
        out[b, i, h] = scores.softmax(0) @ v[b, keys, h // group].double()
    return out


def some_heads(
    config: DecoderConfig, differentiable: bool, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    drawn = (torch.randn(2, T, n, config.head_size()) * 2 for n in (config.heads, *[config.key_heads()] * 2))
    q, k, v = (one.to(dtype).requires_grad_(differentiable) for one in drawn)
    return q, k, v


def some_positions() -> Tensor:
    tokens = torch.randint(3, V, (2, T), generator=torch.Generator().manual_seed(1))
    tokens[0, [5, 6, 20]] = tokens[1, [0, 32]] = EOS
    return document_positions(tokens, EOS)


class Slow:
    """flash-attn's functions in plain torch, for whole rows and for documents that bounds cut."""

    asked_for_dropout = 0.0

    @classmethod
    def flash_attn_func(
        cls, q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, causal: bool = False, window_size=(-1, -1)
    ) -> Tensor:
        cls.asked_for_dropout = dropout_p
        group, t = q.shape[2] // k.shape[2], q.shape[1]
        k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
        scores = torch.einsum("bihd,bjhd->bhij", q, k) / q.shape[-1] ** 0.5
        behind = torch.arange(t)[:, None] - torch.arange(t)  # query minus key
        left, right = (t if side < 0 else side for side in window_size)
        seen = (behind <= left) & (behind >= (0 if causal else -right))
        return torch.einsum("bhij,bjhd->bihd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)

    @classmethod
    def flash_attn_varlen_func(
        cls, q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
        max_seqlen_k: int, dropout_p: float = 0.0, causal: bool = False, window_size=(-1, -1),
    ) -> Tensor:  # fmt: skip
        assert cu_seqlens_q.dtype == torch.int32 and torch.equal(cu_seqlens_q, cu_seqlens_k)
        ends = cu_seqlens_q.tolist()
        assert ends[0] == 0 and ends[-1] == len(q) and max_seqlen_q >= max(b - a for a, b in zip(ends, ends[1:]))  # noqa: B905
        parts = [slice(a, b) for a, b in zip(ends, ends[1:])]  # noqa: B905
        options = {"dropout_p": dropout_p, "causal": causal, "window_size": window_size}
        return torch.cat([cls.flash_attn_func(q[s][None], k[s][None], v[s][None], **options)[0] for s in parts])


@pytest.fixture
def slow_flash(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A flash-attn 2 that is installed and serves the CPU."""
    module = ModuleType("flash_attn")
    module.flash_attn_func, module.flash_attn_varlen_func = Slow.flash_attn_func, Slow.flash_attn_varlen_func  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    monkeypatch.setattr(attention, "choose_backend", lambda *_: "flash")
    attention.flash_attention.cache_clear()
    yield
    attention.flash_attention.cache_clear()


@pytest.mark.parametrize("with_documents", [False, True], ids=["rows", "documents"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kernel", ["sdpa", "flex", "flash"])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_every_kernel_is_the_definition(kernel: str, kind: str, with_documents: bool, request, monkeypatch) -> None:
    config = DecoderConfig(**SIZES, **KINDS[kind])
    monkeypatch.setattr(attention, "choose_backend", lambda *_: kernel)
    if kernel == "flash":
        request.getfixturevalue("slow_flash")
    positions = some_positions() if with_documents else None
    documents = torch.zeros(2, T) if positions is None else (positions == 0).cumsum(1)
    differentiable = kernel != "flex"  # torch's has no backward pass on CPUs
    with torch.set_grad_enabled(differentiable):
        pattern = pattern_of(config, torch.zeros(2, T, 32), positions, 0)
        assert pattern.backend == kernel
        heads = q, k, v = some_heads(config, differentiable)
        upstream = torch.randn(2, T, 4, 8)
        found = attend(q, k, v, pattern)
        expected = by_hand(q, k, v, config, documents)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    if not differentiable:
        return
    gradients, truths = (torch.autograd.grad(y, heads, upstream.to(y.dtype)) for y in (found, expected))
    for gradient, truth in zip(gradients, truths, strict=True):
        torch.testing.assert_close(gradient, truth, rtol=1e-4, atol=1e-5, check_dtype=False)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("with_documents", [False, True], ids=["rows", "documents"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kernel", ["sdpa", "flex", "flash"])
def test_kernels_of_a_gpu_are_as_near_as_bf16_allows(kernel: str, kind: str, with_documents: bool) -> None:
    if kernel == "flash" and attention.flash_attention(torch.cuda.get_device_capability()[0]) is None:
        pytest.skip("flash-attn is not installed")
    config = DecoderConfig(**SIZES | {"dim": 64}, **KINDS[kind], attention=kernel)  # no kernel but sdpa has heads of 8
    positions = some_positions() if with_documents else None
    documents = torch.zeros(2, T) if positions is None else (positions == 0).cumsum(1)
    on_gpu = None if positions is None else positions.cuda()
    pattern = pattern_of(config, torch.zeros(2, T, 64, device="cuda", dtype=torch.bfloat16), on_gpu, 0)
    assert pattern.backend == kernel
    heads = q, k, v = some_heads(config, differentiable=True, dtype=torch.bfloat16)
    found, expected = attend(q.cuda(), k.cuda(), v.cuda(), pattern).cpu(), by_hand(q, k, v, config, documents)
    upstream = torch.randn_like(expected)
    gradients, truths = (torch.autograd.grad(y, heads, upstream.to(y.dtype)) for y in (found, expected))
    for one, truth in zip([found, *gradients], [expected, *truths], strict=True):
        assert (one.double() - truth.double()).norm() <= 2**-6 * truth.double().norm()


def test_flash_gets_dropout_in_training_alone(slow_flash) -> None:
    module = attention.SelfAttention(DecoderConfig(**SIZES, dropout=0.25))
    pattern = pattern_of(DecoderConfig(**SIZES), torch.zeros(2, T, 32), None, 0)
    module(torch.randn(2, T, 32), pattern)
    assert Slow.asked_for_dropout == 0.25
    module.eval()(torch.randn(2, T, 32), pattern)
    assert Slow.asked_for_dropout == 0.0


def test_the_kernel_is_chosen_once_and_said(caplog: pytest.LogCaptureFixture, monkeypatch) -> None:
    choose_backend.cache_clear()
    plain, masked = DecoderConfig(**SIZES), DecoderConfig(**SIZES | {"dim": 64}, document_mask=True)
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            assert choose_backend(plain, "cpu", 0, True) == "sdpa"
    assert caplog.messages == ["attention on cpu: torch's scaled_dot_product_attention"]
    monkeypatch.setattr(attention, "flash_attention", lambda capability: None)
    assert choose_backend(plain, "cuda", 7, True) == "sdpa"
    assert choose_backend(masked, "cuda", 7, True) == "flex"
    assert choose_backend(masked, "cpu", 0, True) == "sdpa"
    narrow = DecoderConfig(**SIZES | {"heads": 8}, document_mask=True)
    assert choose_backend(narrow, "cuda", 7, True) == "sdpa", "flex attention has no heads 4 wide"
    noisy = DecoderConfig(**SIZES | {"dim": 64}, dropout=0.1, document_mask=True)
    assert choose_backend(noisy, "cuda", 7, True) == "sdpa", "flex attention has no dropout"
    for version, expected in ((2, "flash"), (3, "sdpa")):  # nor has version 3
        installed = attention.FlashAttention(version, Slow.flash_attn_func, Slow.flash_attn_varlen_func)
        monkeypatch.setattr(attention, "flash_attention", lambda _, installed=installed: installed)
        choose_backend.cache_clear()
        assert choose_backend(plain, "cuda", 9, True) == choose_backend(masked, "cuda", 9, True) == "flash"
        assert choose_backend(plain, "cuda", 9, False) == "sdpa", "flash-attn takes no float32"
        assert choose_backend(noisy, "cuda", 9, True) == expected
        assert choose_backend(DecoderConfig(**SIZES | {"dim": 64}, attention="flex"), "cuda", 9, True) == "flex"
        assert choose_backend(DecoderConfig(**SIZES, attention="sdpa"), "cuda", 9, True) == "sdpa"


@pytest.mark.parametrize("asked", ["flash", "flex"])
def test_a_kernel_that_cannot_serve_is_told_and_done_without(asked: str, caplog: pytest.LogCaptureFixture) -> None:
    choose_backend.cache_clear()
    decoder = Decoder(DecoderConfig(**SIZES, attention=asked))
    for _ in range(2):
        decoder(torch.zeros(1, 4, dtype=torch.int64)).sum().backward()
    (told,) = caplog.messages
    assert told.startswith(
        f"attention={asked} cannot serve on this cpu with more than 16 bits, heads 8 wide, no dropout"
    ), told


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 5000), st.integers(-4000, 4000), st.sampled_from([1.0, 4.0, {"factor": 8.0, "original": 512}]))
def test_rotated_products_depend_on_distance_alone(place: int, shift: int, scaling: Any) -> None:
    place = max(place, -shift)
    rope = Rope(theta=10_000.0, scaling=scaling)
    torch.manual_seed(1)
    q, k = torch.randn(1, 1, 1, 64), torch.randn(1, 1, 1, 64)

    def product(i: int, j: int) -> Tensor:
        turned = (rotated(one, *rotations(rope, 64, torch.tensor([[at]]))) for one, at in ((q, i), (k, j)))
        first, second = turned
        torch.testing.assert_close(first.norm(), q.norm())
        return (first * second).sum()

    torch.testing.assert_close(product(place + 7, place), product(place + shift + 7, place + shift), atol=0.02, rtol=0)


def test_positions_start_anew_after_each_end_of_text() -> None:
    tokens = torch.tensor([[5, 6, EOS, 7, EOS, EOS, 8], [EOS, 5, 5, 5, 5, 5, EOS]])
    assert document_positions(tokens, EOS).tolist() == [[0, 1, 0, 1, 0, 0, 1], [0, 1, 2, 3, 4, 5, 0]]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"positions": {"theta": 100.0}, "kv_heads": 2, "norm": "rmsnorm", "mlp": "swiglu"},
        {"positions": "none", "window": 3},
        {"positions": {"theta": 100.0}, "objective": "masked"},
    ],
    ids=["GPT-2", "RoPE, grouped queries", "no positions, a window", "seeing all"],
)
def test_documents_in_a_row_are_as_each_alone(changes: dict[str, Any]) -> None:
    """Each document, with the end of text that opens it: hidden states and gradients are those of the row."""
    decoder = Decoder(DecoderConfig(**SIZES, **changes), seed=1).double()
    random = torch.Generator().manual_seed(3)
    documents = [torch.randint(3, V, (n,), generator=random) for n in (4, 0, 9, 1, 17)]
    opened = [torch.cat((torch.tensor([EOS]), one)) for one in documents]
    opened[0] = opened[0][1:]  # a row may begin within a document
    row = torch.cat(opened)[None]
    whole = decoder(row, document_positions(row, EOS))
    whole.square().sum().backward()
    together = {name: p.grad.clone() for name, p in decoder.named_parameters()}
    decoder.zero_grad()
    alone = torch.cat([decoder(one[None]) for one in opened], 1)
    alone.square().sum().backward()
    torch.testing.assert_close(whole, alone, rtol=1e-10, atol=1e-10)
    apart = {name: p.grad for name, p in decoder.named_parameters()}
    torch.testing.assert_close(together, apart, rtol=1e-8, atol=1e-8)
    assert not torch.allclose(decoder(row)[0, 10:], alone[0, 10:], atol=1e-3), "without the mask it is another thing"


def test_a_short_cpu_row_with_a_mask_is_not_taken_for_a_plain_one() -> None:
    """bf16 on a CPU has a path of its own for plain causal rows."""
    config = DecoderConfig(**SIZES)
    module = attention.SelfAttention(config).bfloat16()
    x, positions = torch.randn(2, T, 32).bfloat16(), some_positions()
    plain = module(x, Pattern("sdpa", causal=True))
    masked = module(x, pattern_of(config, x, positions, 0))
    first = int((positions[0, 1:] == 0).nonzero()[0]) + 1
    torch.testing.assert_close(plain[0, :first], masked[0, :first], rtol=0.02, atol=0.02)
    assert (plain[0, first:] - masked[0, first:]).abs().max() > 0.02
