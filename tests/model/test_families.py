"""The families: hidden states are those of the transformers library, shapes those that were published, and parameters
and operations are counted right.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from model.config import DecoderConfig
from model.decoder import Decoder
from pretrain.config import load
from tests.support.families import PUBLISHED, in_our_names, theirs

V, T = 61, 24
SIZES = {"vocab_size": V, "seq_len": T, "layers": 2, "heads": 4, "dim": 32}
LLAMA = {"norm": "rmsnorm", "mlp": "swiglu", "kv_heads": 2, "mlp_dim": 56}
THEIR_LLAMA = {
    "vocab_size": V, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 56, "max_position_embeddings": T, "rms_norm_eps": 1e-5, "initializer_range": 0.2,
}  # fmt: skip


def turning(theta: float, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": theta, **more}}


BAND = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
FAMILIES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {  # family, their configuration, ours
    "gpt2": (
        "gpt2",
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": T, "vocab_size": V, "initializer_range": 0.2},
        {"bias": True, "mlp": "gelu_tanh"},
    ),
    "bert": (
        "bert",
        {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128,
         "max_position_embeddings": T, "vocab_size": V, "initializer_range": 0.2},
        {"objective": "masked", "post_norm": True, "norm_eps": 1e-12, "bias": True},
    ),
    "qwen2": (
        "qwen2", {**THEIR_LLAMA, **turning(1e6)}, {**LLAMA, "positions": {"theta": 1e6}, "qkv_bias": True},
    ),
    "qwen2 with a window": (
        "qwen2",
        {**THEIR_LLAMA, **turning(1e6), "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0},
        {**LLAMA, "positions": {"theta": 1e6}, "qkv_bias": True, "window": 5},
    ),
    "qwen3": (
        "qwen3",
        {**THEIR_LLAMA, **turning(1e6), "head_dim": 12},
        {**LLAMA, "positions": {"theta": 1e6}, "qk_norm": True, "head_dim": 12},
    ),
    "llama": ("llama", {**THEIR_LLAMA, **turning(500_000.0)}, {**LLAMA, "positions": {"theta": 500_000.0}}),
    "llama, positions divided": (
        "llama",
        {**THEIR_LLAMA, **turning(1e4, rope_type="linear", factor=3.0)},
        {**LLAMA, "positions": {"theta": 1e4, "scaling": 3.0}},
    ),
    "llama 3.1": (
        "llama",
        {**THEIR_LLAMA, **turning(1e4, rope_type="llama3", factor=8.0, **BAND)},
        {**LLAMA, "positions": {"theta": 1e4, "scaling": {"factor": 8.0, "original": 16}}},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_hidden_states_are_those_of_transformers(name: str) -> None:
    pytest.importorskip("transformers")
    family, settings, ours = FAMILIES[name]
    torch.manual_seed(1)
    reference = theirs(family, **settings)
    with torch.no_grad():
        for weight in reference.parameters():
            if weight.dim() == 1:  # biases and norms start at constants, which would hide a mistake
                weight.add_(torch.randn_like(weight) * 0.2)
    decoder = Decoder(DecoderConfig(**SIZES, **ours)).eval()
    decoder.load_state_dict(in_our_names(family, dict(reference.named_parameters())))
    tokens = torch.randint(0, V, (3, T))
    with torch.no_grad():
        expected, found = reference(input_ids=tokens).last_hidden_state, decoder(tokens)
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("preset", PUBLISHED)
def test_presets_have_the_published_shapes(preset: str) -> None:
    pytest.importorskip("transformers")
    family, settings = PUBLISHED[preset]
    changes: dict[str, Any] = {"vocab_size": settings["vocab_size"], "tied": False, "compile": False}
    if family == "gpt2":
        changes |= {"bias": True, "mlp": "gelu_tanh"}  # the recipes go without biases, and with the exact GELU
    config = load(f"configs/{preset}.yaml").model.model_copy(update=changes)
    with torch.device("meta"):
        published = in_our_names(family, dict(theirs(family, **settings).named_parameters()))
        decoder = Decoder(config)
    assert {n: p.shape for n, p in decoder.named_parameters()} == {n: p.shape for n, p in published.items()}
    if "rope_parameters" in settings:
        assert config.positions.theta == settings["rope_parameters"]["rope_theta"]
    assert config.norm_eps == settings.get("rms_norm_eps", settings.get("layer_norm_eps", 1e-5))


COUNTED: dict[str, dict[str, Any]] = {
    "GPT-2": {},
    "biases, tied": {"bias": True, "tied": True, "qk_norm": True},
    "SwiGLU with biases": {"bias": True, "mlp": "swiglu", "mlp_dim": 20},
    "qwen2": FAMILIES["qwen2"][2],
    "qwen3": FAMILIES["qwen3"][2],
    "bert": FAMILIES["bert"][2],
    "no positions, one key head": {"positions": "none", "kv_heads": 1, "qkv_bias": True},
}


@pytest.mark.parametrize("name", COUNTED)
def test_parameters_and_operations_are_counted(name: str) -> None:
    config = DecoderConfig(**SIZES, **COUNTED[name])
    with torch.device("meta"):
        decoder, head = Decoder(config), torch.nn.Linear(config.dim, V, bias=False)
        inputs = (
            torch.zeros(2, T, config.dim, requires_grad=True) if config.tied else torch.zeros(2, T, dtype=torch.int64)
        )
    assert config.parameters() == sum(p.numel() for p in decoder.parameters())
    with FlopCounterMode(display=False) as counter:
        head(decoder(inputs)).sum().backward()
    assert counter.get_total_flops() == config.flops_per_token() * 2 * T


def test_a_window_computes_less() -> None:
    whole, near = (DecoderConfig(**SIZES, window=window).flops_per_token() for window in (None, 5))
    assert whole - near == 12 * 2 * 32 * (T - 5)
    sides = DecoderConfig(**SIZES, window=5, objective="masked").flops_per_token()
    assert whole - sides == 12 * 2 * 32 * (T - 9)
    assert DecoderConfig(**SIZES, window=500).flops_per_token() == whole
