"""A trained model as a folder that the transformers library loads: all but its weights and its vocabulary.

The folder has its own code, model/hf/, so that whoever has it needs neither this checkout nor any of its packages.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import Tensor

from ..config import DecoderConfig
from ..decoder import Decoder
from ..distance_settings import INTERNAL
from ..head import HarmonicHead

CODE = Path(__file__).parent
CONFIGURATION, MODELING, TOKENIZATION = "configuration_overtone", "modeling_overtone", "tokenization_overtone"
MODULES = (CONFIGURATION, "decoder_overtone", "head_overtone", MODELING, TOKENIZATION)  # of the folder's own code
CARD = "README.md"


def write(folder: Path, decoder: Decoder, head: HarmonicHead, eos_id: int, pad_id: int | None, card: str) -> None:
    """Writes configurations, code and card beside weights (`decoder.*`, `head.*`) and vocabulary (tokenizer.model).

    Args:
        decoder, head: of these weights; only their settings are read, so they may be on the meta device. The head's
            `progress` says where a ramp of the exponent is.
        eos_id: the token that ends documents, and opens them. pad_id: one that stands for nothing.
    """
    config, special = decoder.config, {"bos_token_id": eos_id, "eos_token_id": eos_id, "pad_token_id": pad_id}
    kind = "CausalLM" if config.causal else "MaskedLM"
    architecture = f"OvertoneFor{kind}"
    auto = {"AutoConfig": f"{CONFIGURATION}.OvertoneConfig", f"AutoModelFor{kind}": f"{MODELING}.{architecture}"}
    _write_json(
        folder / "config.json",
        {
            "model_type": "overtone",
            "architectures": [architecture],
            "auto_map": auto,
            "dtype": "float32",
            **decoder_settings(config),
            "output_scale": decoder.output_scale,
            **head_settings(head),
            **special,
        },
    )
    if config.causal:
        _write_json(folder / "generation_config.json", special)
    tokenizer = {
        "tokenizer_class": "OvertoneTokenizer",
        "auto_map": {"AutoTokenizer": [f"{TOKENIZATION}.OvertoneTokenizer", None]},
        "model_max_length": config.seq_len,
        "padding_side": "left" if config.causal else "right",
    }
    _write_json(folder / "tokenizer_config.json", tokenizer)
    for name in MODULES:
        shutil.copyfile(CODE / f"{name}.py", folder / f"{name}.py")
    (folder / CARD).write_text(card, encoding="utf-8")


def decoder_settings(config: DecoderConfig) -> dict[str, Any]:
    """What the hidden states depend on, derived values filled in; not the kernels and the initial weights."""
    own = {"vocab_size", "seq_len", "layers", "heads", "dim", "positions", "norm", "norm_eps", "post_norm", "qk_norm"}
    own |= {"mlp", "bias", "window", "document_mask", "dropout", "tied"}
    derived = {
        "kv_heads": config.key_heads(),
        "head_dim": config.head_size(),
        "mlp_dim": config.mlp_width(),
        "qkv_bias": config.has_qkv_bias(),
        "causal": config.causal,
    }
    return config.model_dump(mode="json", include=own) | derived


def head_settings(head: HarmonicHead) -> dict[str, Any]:
    """The distance, its parameters as they are out of training, the exponent (None: a weight, or there is none), and a
    cap on scores.
    """
    entry = head.score_function.evaluated()
    params = {field.name: getattr(entry, field.name) for field in fields(entry) if field.metadata != INTERNAL}
    for name, value in params.items():
        if isinstance(value, Tensor):  # a weight: how it is made
            params[name] = "full" if value.dim() == 2 else "diagonal"
    number = head.has_exponent and head.log_exponent is None
    return {
        "distance": head.distance,
        "distance_params": params,
        "exponent": float(head.exponent) if number else None,
        "soft_cap": head.options.soft_cap,
    }


def card(title: str, config: DecoderConfig, head: HarmonicHead, facts: Mapping[str, str], settings: str) -> str:
    """The folder's README.

    Args:
        facts: what is told of the run, by name.
        settings: the run's configuration, YAML.
    """
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    entry, cap = head.score_function, head.options.soft_cap
    scores = f"-n log d, d = {entry.formula}"
    if entry.slope:
        scores = (
            f"{'-' if entry.slope < 0 else ''}n {entry.formula}" if head.has_exponent else f"products {entry.formula}"
        )
    if cap is not None:
        scores += f", capped: {cap:g} tanh(s / {cap:g})"
    return CARD_TEXT.format(
        title=title,
        task="text-generation" if config.causal else "fill-mask",
        purpose="continues texts" if config.causal else "fills in masked tokens",
        head=f"`{head.distance}` head",
        scores=scores,
        usage=GENERATE if config.causal else FILL,
        documents=DOCUMENTS if config.document_mask else "",
        facts=rows,
        settings=settings.strip(),
    )


GENERATE = """from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(FOLDER, trust_remote_code=True, add_bos_token=True)
given = tokenizer("The", return_tensors="pt")
print(tokenizer.decode(model.generate(**given, max_new_tokens=20, do_sample=True)[0], skip_special_tokens=True))"""

FILL = """from transformers import AutoModelForMaskedLM, AutoTokenizer

model = AutoModelForMaskedLM.from_pretrained(FOLDER, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(FOLDER, trust_remote_code=True)
given = tokenizer("one text with a hole", return_tensors="pt")
given["input_ids"][0, 1] = tokenizer.mask_token_id
print(tokenizer.decode(model(**given).logits[0, 1].argmax()))"""

DOCUMENTS = """
A token sees its own document alone: an end of text in a row opens another one. Give `position_ids`, each token's place
in its document, to say otherwise.
"""

CARD_TEXT = """---
library_name: transformers
pipeline_tag: {task}
tags: [overtone, harmonic-loss]
---

# {title}

A language model that {purpose}, with a {head}, trained by Overtone.

```python
{usage}
```

FOLDER is this one. `trust_remote_code=True` runs its `*_overtone.py`: read them first. They need torch, transformers
(5.0 or later) and sentencepiece.

The logits are scores, {scores}. A softmax of them gives the model's probabilities: they are its log-probabilities up to
a constant of each position, so sampling, beams and losses are right as they are. Scores are taken in float32, whatever
the dtype of the rest.

The tokenizer adds nothing to a text; `add_bos_token=True` opens it as a document was opened in training, with the end
of text. No text gives a special id: put ids such as `mask_token_id` in yourself, or give `split_special_tokens=False`.
{documents}
## The run

| | |
| --- | --- |
{facts}

## Its configuration

```yaml
{settings}
```
"""


def _write_json(path: Path, tree: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(tree, indent=2, allow_nan=False) + "\n", encoding="utf-8")
