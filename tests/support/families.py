"""Published decoders: their configurations, and the names of their weights in the transformers library."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

# What config.json says on the Hugging Face Hub: openai-community/gpt2, -medium, -large and -xl,
# google-bert/bert-base-uncased, Qwen/Qwen2-0.5B, Qwen/Qwen3-0.6B, meta-llama/Meta-Llama-3-8B. The papers: Radford et
# al. 2019, arXiv:1810.04805, arXiv:2407.10671, arXiv:2505.09388, arXiv:2407.21783.
QWEN = {"vocab_size": 151_936, "rms_norm_eps": 1e-6, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {  # preset -> family, its configuration
    "gpt2-124m": ("gpt2", {"n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024, "vocab_size": 50_257}),
    "gpt2-350m": ("gpt2", {"n_embd": 1024, "n_layer": 24, "n_head": 16, "n_positions": 1024, "vocab_size": 50_257}),
    "gpt2-774m": ("gpt2", {"n_embd": 1280, "n_layer": 36, "n_head": 20, "n_positions": 1024, "vocab_size": 50_257}),
    "gpt2-1.5b": ("gpt2", {"n_embd": 1600, "n_layer": 48, "n_head": 25, "n_positions": 1024, "vocab_size": 50_257}),
    "bert-base": (
        "bert",
        {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072,
         "max_position_embeddings": 512, "vocab_size": 30_522, "layer_norm_eps": 1e-12},
    ),
    "qwen2-0.5b": (
        "qwen2",
        {**QWEN, "hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
         "intermediate_size": 4864, "max_position_embeddings": 131_072},
    ),
    "qwen3-0.6b": (
        "qwen3",
        {**QWEN, "hidden_size": 1024, "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8,
         "head_dim": 128, "intermediate_size": 3072, "max_position_embeddings": 40_960},
    ),
    "llama3-8b": (
        "llama",
        {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
         "intermediate_size": 14_336, "max_position_embeddings": 8192, "vocab_size": 128_256, "rms_norm_eps": 1e-5,
         "rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0}},
    ),
}  # fmt: skip


def theirs(family: str, **settings: Any) -> torch.nn.Module:
    """A model of the transformers library with random weights, that ends in hidden states."""
    import transformers

    config_class, model_class = {
        "gpt2": (transformers.GPT2Config, transformers.GPT2Model),
        "bert": (transformers.BertConfig, transformers.BertModel),
        "qwen2": (transformers.Qwen2Config, transformers.Qwen2Model),
        "qwen3": (transformers.Qwen3Config, transformers.Qwen3Model),
        "llama": (transformers.LlamaConfig, transformers.LlamaModel),
    }[family]
    more = {"add_pooling_layer": False} if family == "bert" else {}
    return model_class(config_class(**settings, attn_implementation="eager"), **more).eval()


def in_our_names(family: str, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Their weights as a Decoder's; of a tied one `tokens.weight` is to be taken out."""
    return {"gpt2": _gpt2, "bert": _bert}.get(family, _llama)(given)


def _gpt2(given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found = {"tokens.weight": given["wte.weight"], "positions.weight": given["wpe.weight"]}
    names = {"ln_1": "attention_norm", "attn.c_attn": "attention.qkv", "attn.c_proj": "attention.projection"}
    names |= {"ln_2": "mlp_norm", "mlp.c_fc": "mlp.up", "mlp.c_proj": "mlp.projection"}
    for key, value in given.items():
        _, _, rest = key.partition("h.")
        number, _, rest = rest.partition(".")
        module, _, what = rest.rpartition(".")
        if module in names:
            across = what == "weight" and value.dim() == 2  # their matrices are (in, out)
            found[f"blocks.{number}.{names[module]}.{what}"] = value.t() if across else value
        elif key.startswith("ln_f"):
            found[key.replace("ln_f", "norm")] = value
    return found


def _bert(given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found = {"tokens.weight": given["embeddings.word_embeddings.weight"]}
    segments = given["embeddings.token_type_embeddings.weight"]  # everything is of segment 0, at every position
    found["positions.weight"] = given["embeddings.position_embeddings.weight"] + segments[0]
    for what in ("weight", "bias"):
        found[f"norm.{what}"] = given[f"embeddings.LayerNorm.{what}"]
        for number in range(_layers(given, "encoder.layer.")):
            at, to = f"encoder.layer.{number}.", f"blocks.{number}."
            qkv = [given[f"{at}attention.self.{name}.{what}"] for name in ("query", "key", "value")]
            found[f"{to}attention.qkv.{what}"] = torch.cat(qkv)
            found[f"{to}attention.projection.{what}"] = given[f"{at}attention.output.dense.{what}"]
            found[f"{to}attention_norm.{what}"] = given[f"{at}attention.output.LayerNorm.{what}"]
            found[f"{to}mlp.up.{what}"] = given[f"{at}intermediate.dense.{what}"]
            found[f"{to}mlp.projection.{what}"] = given[f"{at}output.dense.{what}"]
            found[f"{to}mlp_norm.{what}"] = given[f"{at}output.LayerNorm.{what}"]
    return found


def _llama(given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Qwen2, Qwen3 and Llama."""
    found = {"tokens.weight": given["embed_tokens.weight"], "norm.weight": given["norm.weight"]}
    names = {"self_attn.o_proj.weight": "attention.projection.weight", "mlp.down_proj.weight": "mlp.projection.weight"}
    names |= {"input_layernorm.weight": "attention_norm.weight", "post_attention_layernorm.weight": "mlp_norm.weight"}
    names |= {
        f"self_attn.{q}_norm.weight": f"attention.{name}_norm.weight" for q, name in (("q", "query"), ("k", "key"))
    }
    for number in range(_layers(given, "layers.")):
        at, to = f"layers.{number}.", f"blocks.{number}."
        for what in ("weight", "bias"):
            if f"{at}self_attn.q_proj.{what}" in given:
                qkv = [given[f"{at}self_attn.{name}_proj.{what}"] for name in "qkv"]
                found[f"{to}attention.qkv.{what}"] = torch.cat(qkv)
        found[f"{to}mlp.up.weight"] = torch.cat([given[f"{at}mlp.{name}_proj.weight"] for name in ("gate", "up")])
        found |= {to + ours: given[at + name] for name, ours in names.items() if at + name in given}
    return found


def _layers(given: Mapping[str, Tensor], before: str) -> int:
    return 1 + max(int(key.removeprefix(before).partition(".")[0]) for key in given if key.startswith(before))
