"""What an Overtone model is made of, for the transformers library (5.0 or later)."""

from typing import Any

from transformers import PreTrainedConfig


class OvertoneConfig(PreTrainedConfig):
    """The decoder's sizes and options, and the head's distance."""

    model_type = "overtone"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]
    attribute_map = {
        "hidden_size": "dim",
        "num_hidden_layers": "layers",
        "num_attention_heads": "heads",
        "num_key_value_heads": "kv_heads",
        "intermediate_size": "mlp_dim",
        "max_position_embeddings": "seq_len",
    }

    vocab_size: int = 1024
    seq_len: int = 1024
    layers: int = 2
    heads: int = 2
    dim: int = 64
    kv_heads: int = 2  # of keys and values; each serves heads / kv_heads heads of queries
    head_dim: int = 32
    mlp_dim: int = 256
    positions: str | dict[str, Any] = "learned"  # learned, none, or rotary ones: {theta, scaling}
    norm: str = "layernorm"  # or rmsnorm
    norm_eps: float = 1e-5
    post_norm: bool = False  # norms after each sum, and of the embeddings
    qk_norm: bool = False
    mlp: str = "gelu"  # gelu_tanh, swiglu
    bias: bool = False
    qkv_bias: bool = False
    causal: bool = True
    window: int | None = None  # a token sees tokens fewer than this many places away
    document_mask: bool = False  # a token sees its own document alone: see OvertoneForCausalLM
    dropout: float = 0.0
    tied: bool = False  # the prototypes are the token embedding
    output_scale: float = 1.0  # of the hidden states
    distance: str = "euclidean"
    distance_params: dict[str, Any] | None = None
    exponent: float | None = None  # None: learned, a weight of the head
    soft_cap: float | None = None  # of the scores
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None
    use_cache: bool = True
    tie_word_embeddings: bool = False  # nothing is left to tie: a tied model has one table to begin with

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """That of the library, with the cache on or off as it was saved."""
        if "use_cache" in config_dict:  # which transformers before 5.4 leaves out
            kwargs.setdefault("use_cache", config_dict["use_cache"])
        return super().from_dict(config_dict, **kwargs)
