"""A run's model as a folder that the transformers library loads: weights, code, vocabulary and a card."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data.manifest import TOKENIZER
from model.hf import folder as transformers_folder
from pretrain.analysis.evaluation import open_tokenizer
from pretrain.analysis.inference import DATA as IDENTITY_DATA
from pretrain.analysis.inference import TOKENIZER as IDENTITY_TOKENIZER
from pretrain.analysis.inference import fitting_state
from pretrain.analysis.scoring import figure
from pretrain.checkpoints.folder import find_given, run_of, total_j
from pretrain.checkpoints.weights import new_folder, shapes, without_weights, write_weights
from pretrain.config import RunConfig, dump, load
from pretrain.metrics import clock, read_records


def export_transformers(given: Path, out: Path, max_bytes: float) -> tuple[Path, int]:
    """Writes the folder `out`, whole or not at all; returns the checkpoint and the bytes of its weights.

    Args:
        given: a run folder (its newest whole checkpoint), or one checkpoint's folder.
        max_bytes: of one file's weights.
    Raises:
        ConfigError: `given` has no checkpoint or no tokenizer, or `out` exists or cannot be made.
    """
    cfg = load(run_of(given) / "config.yaml")
    tokenizer = open_tokenizer(cfg.data.path)
    with new_folder(out) as folder:
        checkpoint, run = find_given(given)
        state = fitting_state(checkpoint, cfg, tokenizer.sha256)
        decoder, head = without_weights(cfg)
        head.progress = cfg.head_progress(state["step"] - 1)
        size = write_weights(checkpoint, shapes(decoder, head), folder, max_bytes)
        shutil.copyfile(cfg.data.path / TOKENIZER, folder / TOKENIZER)
        card = transformers_folder.card(run.name, cfg.model, head, _facts(run, state, cfg, size // 4), dump(cfg))
        transformers_folder.write(folder, decoder, head, tokenizer.eos_id, tokenizer.pad_id, card)
    return checkpoint, size


def _facts(run: Path, state: Mapping[str, Any], cfg: RunConfig, parameters: int) -> dict[str, str]:
    """What a run had come to at a checkpoint, by name."""
    recorded = read_records(run) if (run / "metrics.jsonl").exists() else []
    before = [one for one in recorded if one["kind"] == "eval" and one["step"] <= state["step"]]
    held_out = before[-1] if before else {}
    joules, identity = total_j(state["joules"]), state["identity"]
    forms = {
        figure(cfg.model): "perplexity",
        "nats/token": "loss",
        "bits/byte": "bits_per_byte",
        "accuracy": "accuracy",
    }
    return {
        "parameters": f"{parameters:,}",
        "updates": f"{state['step']:,} of {cfg.train.steps:,}",
        "training tokens": f"{state['tokens']:,}",
        "training time (h:mm:ss)": clock(state["train_seconds"]),
        "energy, of all phases": "not measured"
        if joules is None
        else f"{joules:,.0f} J ({', '.join(state['joules'])})",
        "precision of training": f"{cfg.train.precision}; the weights here are the float32 masters",
        **{f"held-out {name}": _figure(held_out.get(key)) for name, key in forms.items()},
        "held-out figures are of update": f"{held_out['step']:,}" if held_out else "not measured",
        "fingerprint of the data": f"`{identity[IDENTITY_DATA]}`",
        "SHA-256 of the vocabulary": f"`{identity[IDENTITY_TOKENIZER]}`",
        "trained with": ", ".join(
            f"{name} {version}" for name, version in state.get("versions", {}).items() if version
        ),
    }


def _figure(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.4f}"
