"""Random decoders of every family, as plain values of a `model:` section."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st


@st.composite
def decoder_settings(draw: st.DrawFn, vocab_size: int = 17, seq_len: int = 8) -> dict[str, Any]:
    heads, norm = draw(st.sampled_from([1, 2, 4, 6])), draw(st.sampled_from(["layernorm", "rmsnorm"]))
    objective = draw(st.sampled_from(["causal", "masked"]))
    return {
        "vocab_size": vocab_size,
        "seq_len": seq_len,
        "layers": draw(st.integers(1, 3)),
        "heads": heads,
        "dim": heads * draw(st.sampled_from([4, 6])),
        "kv_heads": draw(st.sampled_from([None, *(k for k in range(1, heads + 1) if heads % k == 0)])),
        "head_dim": draw(st.sampled_from([None, 2, 10])),
        "mlp_dim": draw(st.sampled_from([None, 3, 40])),
        "positions": draw(st.sampled_from(["learned", "none", {"theta": 100.0}])),
        "norm": norm,
        "post_norm": draw(st.booleans()),
        "qk_norm": draw(st.booleans()),
        "mlp": draw(st.sampled_from(["gelu", "gelu_tanh", "swiglu"])),
        "bias": norm == "layernorm" and draw(st.booleans()),
        "qkv_bias": draw(st.sampled_from([None, False, True])),
        "objective": objective,
        "window": draw(st.sampled_from([None, 3])),
        "document_mask": objective == "causal" and draw(st.booleans()),
        "base_dim": draw(st.sampled_from([None, 3])),
        "tied": draw(st.booleans()),
        "activation_checkpointing": draw(st.booleans()),
    }
