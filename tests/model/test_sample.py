"""Continuations: the KV cache changes nothing, draws are as asked, and text comes whole."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.config import DecoderConfig
from model.decoder import Decoder
from model.head import HarmonicHead
from model.sample import draw, generate, texts
from pretrain.sample import main
from tests.support.ranks import run_ranks
from tests.support.tiny import make_text, run_to_end, text_config

V, T = 41, 24
SIZES = {"vocab_size": V, "seq_len": T, "layers": 2, "heads": 4, "dim": 32}
LLAMA = {"norm": "rmsnorm", "mlp": "swiglu", "kv_heads": 2, "positions": {"theta": 1000.0}}
BACKBONES: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "gpt2, tied": {"tied": True},
    "qwen2": {**LLAMA, "qkv_bias": True},
    "qwen3": {**LLAMA, "qk_norm": True, "head_dim": 12},
    "llama 3.1": {**LLAMA, "positions": {"theta": 1000.0, "scaling": {"factor": 8.0, "original": 16}}},
    "a window": {**LLAMA, "window": 5},
    "post-norm, no positions, one key head, a window": {
        "post_norm": True, "positions": "none", "kv_heads": 1, "window": 3,
    },
}  # fmt: skip


def a_model(**changes: Any) -> tuple[Decoder, HarmonicHead]:
    decoder = Decoder(DecoderConfig(**SIZES, **changes), hidden_length=1.0, seed=1).eval()
    with torch.no_grad():
        for parameter in decoder.blocks.parameters():
            parameter.mul_(5)  # so that what attention sees matters
    return decoder, HarmonicHead(V, 32, seed=2).eval()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)], ids=str)
@pytest.mark.parametrize("parts", [[1] * T, [9, 1, 1, 5, 1, 7], [T]], ids=str)
@pytest.mark.parametrize("backbone", BACKBONES)
@torch.no_grad()
def test_hidden_states_with_a_cache_are_those_without(
    backbone: str, parts: list[int], dtype: torch.dtype, tolerance: float
) -> None:
    """Of length 1. bf16: kernels round in another order, which two blocks of large weights make some per cent of it."""
    decoder, head = a_model(**BACKBONES[backbone])
    decoder.to(dtype)
    tokens = torch.randint(0, V, (3, T), generator=torch.Generator().manual_seed(1))
    inputs = head.embed(tokens).to(dtype) if decoder.config.tied else tokens
    whole, memories = decoder(inputs), decoder.memories(3, T)
    found = torch.cat([decoder(part, memories=memories) for part in inputs.split(parts, 1)], 1)
    assert (found - whole).norm(dim=-1).max() <= tolerance


@pytest.mark.parametrize("backbone", BACKBONES)
@torch.no_grad()
def test_greedy_tokens_are_those_of_whole_passes(backbone: str) -> None:
    decoder, head = a_model(**BACKBONES[backbone])
    tokens = torch.randint(0, V, (3, 4))
    found = torch.stack(list(generate(decoder, head, tokens, max_tokens=9, temperature=0)), 1)
    for _ in range(9):
        hidden = decoder(head.embed(tokens) if decoder.config.tied else tokens)[:, -1]
        tokens = torch.cat((tokens, head.log_probs(hidden).argmax(-1, keepdim=True)), 1)
    assert torch.equal(found, tokens[:, 4:])


def test_a_seed_draws_the_same_again() -> None:
    decoder, head = a_model()

    def drawn(seed: int) -> list[list[int]]:
        stream = torch.Generator().manual_seed(seed)
        return [
            one.tolist()
            for one in generate(decoder, head, torch.zeros(2, 1, dtype=torch.int64), max_tokens=20, generator=stream)
        ]

    assert drawn(1) == drawn(1) != drawn(2)
    assert len({one for row in drawn(1) for one in row}) > 5


def test_rows_stop_each_for_itself() -> None:
    model = a_model()
    tokens = torch.randint(0, V, (3, 2), generator=torch.Generator().manual_seed(4))
    free = torch.stack(list(generate(*model, tokens, max_tokens=15, temperature=0)), 1)
    stop = {int(free[0, 2]), int(free[1, 5])}
    found = torch.stack(list(generate(*model, tokens, max_tokens=15, temperature=0, stop=stop)), 1)
    for row, expected in zip(found.tolist(), free.tolist(), strict=True):
        at = next((i for i, one in enumerate(expected) if one in stop), len(expected))
        assert (
            row == [*expected[: at + 1], *[expected[at]] * (len(row) - at - 1)]
            if at < len(row)
            else row == expected[: len(row)]
        )
    every = list(generate(*model, tokens, max_tokens=15, temperature=0, stop=range(V)))
    assert len(every) == 1, "all rows stopped at once"


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 12), st.floats(0.05, 1.0), st.floats(0.2, 3.0))
def test_top_k_and_top_p_leave_the_likeliest(seed: int, top_k: int, top_p: float, temperature: float) -> None:
    stream = torch.Generator().manual_seed(seed)
    log_probs = torch.randn(1, 12, generator=stream).mul(2).log_softmax(-1)
    ranked = (log_probs[0] / temperature).softmax(0).sort(descending=True)
    kept = ranked.values[:top_k] / ranked.values[:top_k].sum()
    least = int((kept.cumsum(0) < top_p - 1e-5).sum()) + 1  # tokens that reach top_p
    most = int((kept.cumsum(0) < top_p + 1e-5).sum()) + 1
    many = draw(log_probs.expand(400, -1), temperature, top_k, top_p, stream)
    allowed = set(ranked.indices[: min(most, top_k)].tolist())
    assert set(many.tolist()) <= allowed
    if least == 1 == most:
        assert set(many.tolist()) == {int(log_probs.argmax())}


def test_draws_follow_the_probabilities() -> None:
    log_probs = torch.tensor([0.1, 0.2, 0.3, 0.4]).log().expand(40_000, -1)
    for temperature in (1.0, 0.5):
        many = draw(log_probs, temperature, generator=torch.Generator().manual_seed(1))
        expected = (log_probs[0] / temperature).softmax(0)
        torch.testing.assert_close(many.bincount() / 40_000, expected, atol=0.01, rtol=0)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"max_tokens": 22}, "22 tokens asked for after 4: the decoder has 24 positions; ask for 21 at most"),
        ({"max_tokens": -1}, "ask for 21 at most"),
        ({"temperature": -0.5}, "temperature=-0.5: expected a number from 0 on"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_k": 0}, "top_k=0: expected 1 or more"),
        ({"top_p": 0.0}, "top_p=0.0: expected a probability"),
        ({"tokens": torch.zeros(1, 0, dtype=torch.int64)}, "no token is given"),
    ],
)
def test_what_cannot_be_generated_is_refused_at_once(changes: dict[str, Any], told: str) -> None:
    arguments = {"tokens": torch.zeros(1, 4, dtype=torch.int64), "max_tokens": 3} | changes
    with pytest.raises(ValueError, match=told):
        generate(*a_model(), **arguments)
    assert len(list(generate(*a_model(), torch.zeros(1, 4, dtype=torch.int64), max_tokens=21))) == 21


def test_a_masked_decoder_has_no_next_token() -> None:
    decoder, head = a_model(objective="masked")
    with pytest.raises(ValueError, match="sees what comes after"):
        generate(decoder, head, torch.zeros(1, 4, dtype=torch.int64), max_tokens=3)
    with pytest.raises(ValueError, match="a causal decoder"):
        decoder(torch.zeros(1, 4, dtype=torch.int64), memories=decoder.memories(1, 4))


def decoded(ids: list[int]) -> str:
    """Ids are bytes, as a tokenizer's byte fallback gives them; each byte that is no UTF-8 becomes U+FFFD."""
    text, data = "", bytes(ids)
    while data:
        try:
            return text + data.decode()
        except UnicodeDecodeError as error:
            text, data = text + data[: error.start].decode() + "\ufffd", data[error.start + 1 :]
    return text


@settings(max_examples=200, deadline=None)
@given(st.lists(st.one_of(st.characters(codec="utf-8").map(str.encode), st.binary(min_size=1, max_size=3)), max_size=8))
def test_text_comes_whole_and_is_never_taken_back(pieces: list[bytes]) -> None:
    ids = list(b"".join(pieces))
    parts = list(texts(iter(ids), decoded))
    assert "".join(parts) == decoded(ids)
    for count, so_far in enumerate(itertools.accumulate(parts[:-1]), 1):
        assert len(decoded(ids[:count])) - len(so_far) <= 3, "nothing is held back for long"


def test_a_character_of_four_bytes_comes_when_it_is_whole() -> None:
    assert list(texts("a🙂b".encode(), decoded)) == ["a", "", "", "", "🙂", "b", ""]
    assert list(texts(b"\xf0\x9f", decoded)) == ["", "", "\ufffd\ufffd"]
    assert list(texts([0xA9, 98], decoded, before=b"a\xc3")) == ["", "b", ""], "a character that the prompt began"


def test_the_documented_python_runs() -> None:
    (block,) = re.findall(r"```python\n(.*?)```", Path("docs/models.md").read_text(), re.DOTALL)
    exec(compile(block, "docs/models.md", "exec"), {})


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("sample")
    make_text(base / "data")
    run_ranks(run_to_end, 1, base, cfg=text_config(base, model__tied=True, head__exponent="learned"))
    return base


@pytest.mark.slow
def test_command(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(trained / "run")
    asked = [run, "--prompt", "The café", "--tokens", "9", "--seed", "3", "--top-k", "50"]
    command = [sys.executable, "-m", "model", "sample", *asked]
    told = subprocess.run(command, capture_output=True, text=True, timeout=300)
    lines = [line for line in told.stderr.splitlines() if not line.startswith("The head runs in plain PyTorch on this")]
    assert told.returncode == 0 and not lines, told.stderr
    assert told.stdout.startswith("The café") and len(told.stdout) > len("The café\n")
    assert main([*asked]) == 0
    assert capsys.readouterr().out == told.stdout, "the same seed"
    assert main([*asked, "--temperature", "0", "--top-p", "0.5"]) == 0
    for arguments, why in (
        ([str(trained / "nowhere")], "neither a run folder"),
        ([run, "--tokens", "900"], "900 tokens asked for after 1: the decoder has 32 positions; ask for 32 at most"),
        ([run, "--prompt", "a b c " * 50], "or give fewer"),
        ([run, "--top-p", "1.5"], "top_p=1.5"),
    ):
        capsys.readouterr()
        assert main([*arguments]) == 2
        found = capsys.readouterr()
        assert why in found.err and found.out == "", "nothing is told before the input is known to be good"


@pytest.mark.slow
def test_the_command_refuses_another_tokenizer(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = trained / "data" / "tokenizer.model"
    before = model.read_bytes()
    try:
        model.write_bytes(before + b"\x52\x00")  # an unknown field of the format: still a model, but another one
        assert main([str(trained / "run")]) == 2
        assert "but the manifest says" in capsys.readouterr().err
    finally:
        model.write_bytes(before)
