"""What a plan takes a decoder's passes to keep and need: traced, against what they keep on a CPU and GPUs' kernels."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from model.config import DecoderConfig
from model.decoder import Decoder
from pretrain.activations import traced


def kept_bytes(config: DecoderConfig, sequences: int, dtype: torch.dtype) -> int:
    """What a forward pass keeps for the backward pass, weights not counted, with the hidden states."""
    decoder = Decoder(config).to(dtype)
    shape = (sequences, config.seq_len)
    inputs = torch.zeros(*shape, config.dim, dtype=dtype).requires_grad_() if config.tied else torch.zeros(shape).long()
    weights = {parameter.untyped_storage()._cdata for parameter in decoder.parameters()}
    found: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            found[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = decoder(inputs)
    found[hidden.untyped_storage()._cdata] = hidden.untyped_storage()
    return sum(storage.nbytes() for storage in found.values())


# RMSNorm, dropout and windows are left out: on a CPU they are made of several operations that keep more.
KEPT: dict[str, dict[str, Any]] = {
    "GPT-2": {},
    "GPT-2 with biases, tied": {"bias": True, "tied": True},
    "BERT": {"post_norm": True, "bias": True, "objective": "masked"},
    "SwiGLU": {"mlp": "swiglu", "mlp_dim": 300},
    "turned": {"positions": {"theta": 100.0}},
    "grouped queries": {"kv_heads": 2, "positions": "none"},
    "grouped queries, turned, wide heads": {"kv_heads": 2, "positions": {"theta": 100.0}, "head_dim": 48},
    "normalised queries and keys": {"qk_norm": True},
    "all of it": {"qk_norm": True, "positions": {"theta": 100.0}, "kv_heads": 1, "mlp": "swiglu", "mlp_dim": 200},
    "recomputed": {"activation_checkpointing": True},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", KEPT)
def test_activations_are_what_a_forward_pass_keeps(name: str, dtype: torch.dtype) -> None:
    config = DecoderConfig(vocab_size=100, seq_len=320, layers=3, heads=4, dim=128, **KEPT[name])
    assert traced(config, 2, dtype.itemsize).kept == pytest.approx(kept_bytes(config, 2, dtype), rel=0.01)


def kind(**settings: Any) -> DecoderConfig:
    return DecoderConfig(vocab_size=100, seq_len=320, layers=3, heads=4, dim=128, **settings)


def test_kernels_of_gpus_keep_inputs_and_statistics_alone() -> None:
    tokens = 2 * 320
    plain, rms = (traced(kind(norm=norm), 2, 2).kept for norm in ("layernorm", "rmsnorm"))
    assert plain - rms == 4 * tokens * (2 * 3 + 1), "no mean of each row, in float32"
    assert traced(kind(dropout=0.1), 2, 2).kept - plain == tokens * 128 * (2 * 3 + 1), "a byte for each entry"
    assert traced(kind(window=7), 2, 2) == traced(kind(), 2, 2), "flash kernels need no mask"


@pytest.mark.parametrize("settings", [{}, {"mlp": "swiglu", "kv_heads": 2, "positions": {"theta": 1e4}}], ids=str)
def test_what_is_kept_and_needed_grows_with_sequences_and_layers(settings: dict[str, Any]) -> None:
    for again in (False, True):
        config = kind(**settings, activation_checkpointing=again)
        one, three = traced(config, 1, 2), traced(config, 3, 2)
        assert one.kept < three.kept <= 3 * one.kept and one.fullest < three.fullest
        deeper = traced(config.model_copy(update={"layers": 5}), 3, 2)
        assert deeper.kept - three.kept == deeper.fullest - three.fullest > 0
        assert three.fullest > three.kept


def test_recomputing_keeps_a_block_s_input_alone() -> None:
    kept = traced(kind(activation_checkpointing=True), 2, 2).kept
    assert kept == pytest.approx(2 * 320 * 128 * 2 * (3 + 2), rel=0.01)
