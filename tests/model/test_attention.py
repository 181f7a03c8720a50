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
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from model import attention
from model.attention import Pattern, attend, choose_backend, pattern_of, rotated, rotations
from model.config import DecoderConfig, Rope
from model.decoder import Decoder, document_positions, documents_in

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
    deterministic = False

    @classmethod
    def flash_attn_func(
        cls, q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, causal: bool = False, window_size=(-1, -1),
        deterministic: bool = False,
    ) -> Tensor:  # fmt: skip
        Slow.asked_for_dropout, Slow.deterministic = dropout_p, deterministic
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
        deterministic: bool = False,
    ) -> Tensor:  # fmt: skip
        assert cu_seqlens_q.dtype == torch.int32 and torch.equal(cu_seqlens_q, cu_seqlens_k)
        ends = cu_seqlens_q.tolist()
        assert ends[0] == 0 and ends[-1] == len(q) and max_seqlen_q >= max(b - a for a, b in zip(ends, ends[1:]))  # noqa: B905
        parts = [slice(a, b) for a, b in zip(ends, ends[1:])]  # noqa: B905
        options = {"dropout_p": dropout_p, "causal": causal, "window_size": window_size, "deterministic": deterministic}
        return torch.cat([Slow.flash_attn_func(q[s][None], k[s][None], v[s][None], **options)[0] for s in parts])


class Fourth:
    """The same with the signatures of flash-attn-4 4.0.0b36 and its pairs of results. A window's open side is None."""

    @staticmethod
    def flash_attn_func(
        q, k, v, qv=None, gather_kv_indices=None, softmax_scale=None, causal=False, window_size=(None, None),
        learnable_sink=None, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, score_mod=None,
        score_mod_bwd=None, mask_mod=None, aux_tensors=None, aux_scalars=None, block_sparse_tensors=None,
        block_sparse_tensors_bwd=None, return_lse=False, gather_bwd_recompute_p=False, gather_bwd_token_chunk=None,
    ):  # fmt: skip
        sides = tuple(-1 if side is None else side for side in window_size)
        return Slow.flash_attn_func(q, k, v, causal=causal, window_size=sides, deterministic=deterministic), None

    @staticmethod
    def flash_attn_varlen_func(
        q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None,
        min_seqlen_k=None, seqused_q=None, seqused_k=None, gather_kv_indices=None, page_table=None, softmax_scale=None,
        causal=False, window_size=(None, None), learnable_sink=None, softcap=0.0, num_splits=1, pack_gqa=None,
        deterministic=False, score_mod=None, score_mod_bwd=None, mask_mod=None, block_sparse_tensors=None,
        aux_tensors=None, aux_scalars=None, return_lse=False, scheduler_metadata=None, seqlen_k_per_split=None,
        disable_scheduler_metadata=False, gather_bwd_recompute_p=False, gather_bwd_token_chunk=None,
    ):  # fmt: skip
        assert type(max_seqlen_q) is type(max_seqlen_k) is int, "a tensor would be read by the host"
        sides = tuple(-1 if side is None else side for side in window_size)
        options = {"causal": causal, "window_size": sides, "deterministic": deterministic}
        lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        return Slow.flash_attn_varlen_func(q, k, v, *lengths, **options), None


def install(monkeypatch: pytest.MonkeyPatch, name: str, functions: type, capability: int) -> None:
    """A flash-attn that is installed and serves the CPU. Version 4 is the package flash_attn.cute, in a folder
    flash_attn that is none.
    """
    for part in {"flash_attn", name}:
        monkeypatch.setitem(sys.modules, part, ModuleType(part))
    module: Any = sys.modules[name]
    module.flash_attn_func, module.flash_attn_varlen_func = functions.flash_attn_func, functions.flash_attn_varlen_func  # type: ignore[attr-defined]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (capability, 0))
    attention.flash_attention.cache_clear()


@pytest.fixture
def slow_flash(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    install(monkeypatch, "flash_attn", Slow, 8)
    monkeypatch.setattr(attention, "choose_backend", lambda *_: "flash")
    yield
    attention.flash_attention.cache_clear()


@pytest.fixture
def fourth_flash(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    install(monkeypatch, "flash_attn.cute", Fourth, 9)
    monkeypatch.setattr(attention, "choose_backend", lambda *_: "flash")
    yield
    attention.flash_attention.cache_clear()


@pytest.mark.parametrize("with_documents", [False, True], ids=["rows", "documents"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kernel", ["sdpa", pytest.param("flex", marks=pytest.mark.slow), "flash", "flash 4"])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_every_kernel_is_the_definition(kernel: str, kind: str, with_documents: bool, request, monkeypatch) -> None:
    config = DecoderConfig(**SIZES, **KINDS[kind])
    monkeypatch.setattr(attention, "choose_backend", lambda *_: kernel)
    if kernel.startswith("flash"):
        request.getfixturevalue({"flash": "slow_flash", "flash 4": "fourth_flash"}[kernel])
        flash = attention.flash_attention(torch.cuda.get_device_capability(None)[0])
        assert flash is not None and flash.version == {"flash": 2, "flash 4": 4}[kernel]
    positions = some_positions() if with_documents else None
    documents = torch.zeros(2, T) if positions is None else (positions == 0).cumsum(1)
    differentiable = kernel != "flex"  # torch's has no backward pass on CPUs
    with torch.set_grad_enabled(differentiable):
        pattern = pattern_of(config, torch.zeros(2, T, 32), positions, 0)
        assert pattern.backend == kernel.removesuffix(" 4")
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
    for version, functions, expected in ((2, Slow, "flash"), (4, Fourth, "sdpa")):  # nor has version 4
        installed = attention.FlashAttention(version, functions.flash_attn_func, functions.flash_attn_varlen_func)
        monkeypatch.setattr(attention, "flash_attention", lambda _, installed=installed: installed)
        choose_backend.cache_clear()
        assert choose_backend(plain, "cuda", 9, True) == choose_backend(masked, "cuda", 9, True) == "flash"
        assert choose_backend(plain, "cuda", 9, False) == "sdpa", "flash-attn takes no float32"
        assert choose_backend(noisy, "cuda", 9, True) == expected
        assert choose_backend(DecoderConfig(**SIZES | {"dim": 64}, attention="flex"), "cuda", 9, True) == "flex"
        assert choose_backend(DecoderConfig(**SIZES, attention="sdpa"), "cuda", 9, True) == "sdpa"


@pytest.mark.parametrize(
    ("version", "capability", "width", "serves"),
    [(2, 8, 36, True), (2, 9, 264, False), (3, 9, 256, True), (3, 9, 36, False), (4, 9, 192, True), (4, 9, 264, False),
     (4, 10, 128, True), (4, 10, 192, False), (4, 10, 256, True), (4, 9, 36, False)],
)  # fmt: skip
def test_heads_that_flash_has_no_kernels_for_go_without_it(
    version: int, capability: int, width: int, serves: bool, monkeypatch, caplog: pytest.LogCaptureFixture
) -> None:
    functions: Any = Slow if version == 2 else Fourth
    installed = attention.FlashAttention(version, functions.flash_attn_func, functions.flash_attn_varlen_func)
    monkeypatch.setattr(attention, "flash_attention", lambda _: installed)
    choose_backend.cache_clear()
    config = DecoderConfig(**SIZES | {"head_dim": width, "attention": "flash"})
    assert choose_backend(config, "cuda", capability, True) == ("flash" if serves else "sdpa")
    told = [message for message in caplog.messages if "cannot serve" in message]
    assert told == [] if serves else f"heads {width} wide" in told[0]


def test_a_flash_that_cannot_be_imported_is_told_and_done_without(
    monkeypatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(name: str) -> ModuleType:
        if name == "flash_attn.cute":
            raise TypeError("cutlass has changed")
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(attention, "import_module", broken)
    attention.flash_attention.cache_clear()
    assert attention.flash_attention(9) is None
    attention.flash_attention.cache_clear()
    assert caplog.messages == ["flash-attn 4 is installed and cannot be imported: TypeError('cutlass has changed')"]


@pytest.mark.parametrize("fixture", ["slow_flash", "fourth_flash"])
def test_flash_is_asked_for_bits_that_repeat(fixture: str, request) -> None:
    request.getfixturevalue(fixture)
    module, config = attention.SelfAttention(DecoderConfig(**SIZES)), DecoderConfig(**SIZES)
    try:
        for wanted in (True, False):
            torch.use_deterministic_algorithms(wanted)
            for positions in (None, some_positions()):
                Slow.deterministic = not wanted
                module(torch.randn(2, T, 32), pattern_of(config, torch.zeros(2, T, 32), positions, 0))
                assert Slow.deterministic == wanted
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_flash_that_cannot_repeat_its_bits_is_done_without(monkeypatch, caplog: pytest.LogCaptureFixture) -> None:
    def old(q, k, v, causal=False, window_size=(-1, -1)): ...

    monkeypatch.setattr(attention, "flash_attention", lambda _: attention.FlashAttention(2, old, old))
    choose_backend.cache_clear()
    config = DecoderConfig(**SIZES, attention="flash")
    assert choose_backend(config, "cuda", 9, True) == "flash"
    assert choose_backend(config, "cuda", 9, True, True) == "sdpa"
    assert "cannot serve on this cuda with bf16, heads 8 wide, no dropout, deterministic" in caplog.text


def test_bounds_are_where_documents_begin_and_nothing_waits_for_the_device() -> None:
    positions = torch.tensor([[0, 1, 0, 1, 2], [0, 1, 2, 0, 0]])
    for counted in (None, 5):
        bounds = attention._bounds(positions, counted)
        assert bounds.dtype == torch.int32 and bounds.tolist() == [0, 2, 5, 8, 9, 10]
    assert attention._bounds(positions, 7).tolist() == [0, 2, 5, 8, 9, 10, 10, 10], "more are empty ones"
    assert attention._bounds(positions, 10).tolist()[-5:] == [10] * 5
    with FakeTensorMode():  # which refuses whatever depends on values
        assert attention._bounds(torch.zeros(2, 5, dtype=torch.int64), 5).shape == (6,)
        with pytest.raises(DataDependentOutputException):
            attention._bounds(torch.zeros(2, 5, dtype=torch.int64), None)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.sampled_from([EOS, 5, 6]), min_size=7, max_size=7), min_size=1, max_size=4))
def test_documents_are_counted_as_they_are_placed(rows: list[list[int]]) -> None:
    tokens = torch.tensor(rows)
    positions = document_positions(tokens, EOS)
    assert documents_in(tokens, EOS) == int((positions == 0).sum())
    assert torch.equal(attention._bounds(positions, documents_in(tokens, EOS)), attention._bounds(positions, None))


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
