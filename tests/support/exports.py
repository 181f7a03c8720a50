"""Small models as exported folders, and what the transformers library makes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from model.config import DecoderConfig, HeadConfig
from model.decoder import Decoder
from model.head import HarmonicHead
from model.hf import folder as export

V, T, EOS, PAD = 67, 12, 2, 3
SMALL: dict[str, Any] = {"vocab_size": V, "seq_len": 32, "layers": 2, "heads": 4, "dim": 32}
BACKBONES: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "biases": {"bias": True, "mlp": "gelu_tanh"},
    "no positions": {"positions": "none", "mlp_dim": 40},
    "llama": {"positions": {"theta": 500.0}, "norm": "rmsnorm", "mlp": "swiglu", "kv_heads": 2, "head_dim": 6},
    "llama 3.1": {"positions": {"scaling": {"factor": 8.0, "original": 16}}},
    "stretched": {"positions": {"scaling": 3.0}},
    "qwen": {"positions": {}, "qk_norm": True, "qkv_bias": True, "norm": "rmsnorm", "kv_heads": 1},
    "window": {"window": 3},
    "tied": {"tied": True},
    "post-norm": {"post_norm": True},
    "documents": {"document_mask": True, "window": 5},
    "rotary documents, tied": {"document_mask": True, "positions": {}, "tied": True},
}
MASKED: dict[str, dict[str, Any]] = {
    "bert": {"objective": "masked", "post_norm": True, "bias": True},
    "rotary": {"objective": "masked", "positions": {}, "window": 4},
}


def make(decoder_settings: dict[str, Any], head_settings: dict[str, Any] | None = None) -> tuple[Decoder, HarmonicHead]:
    """With weights that are all random, but in their usual range."""
    config, head_config = DecoderConfig(**{**SMALL, **decoder_settings}), HeadConfig(**(head_settings or {}))
    decoder = Decoder(config, hidden_length=head_config.hidden_length(config.dim), seed=1)
    head = HarmonicHead(V, config.dim, seed=2, **head_config.arguments())
    torch.manual_seed(3)
    with torch.no_grad():
        for weight in [*decoder.parameters(), *(p for n, p in head.named_parameters() if n != "prototypes")]:
            weight.add_(0.1 * torch.randn_like(weight))
    return decoder.eval(), head.eval()


def exported(decoder: Decoder, head: HarmonicHead, folder: Path) -> Any:
    folder.mkdir(exist_ok=True)
    parts = (("decoder", decoder), ("head", head))
    weights = {f"{part}.{name}": p.detach() for part, module in parts for name, p in module.named_parameters()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    export.write(folder, decoder, head, EOS, PAD, card="")
    import transformers

    auto: Any = transformers.AutoModelForCausalLM if decoder.config.causal else transformers.AutoModelForMaskedLM
    loaded, told = auto.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    assert not any(told.values()), told
    return loaded


def tokens_of(rows: int = 2) -> Tensor:
    """(rows, T), some of them ends of text."""
    tokens = torch.randint(5, V, (rows, T), generator=torch.Generator().manual_seed(1))
    tokens[:, 0] = tokens[0, 5] = EOS
    return tokens
