"""A run's model as a folder that the transformers library loads: weights, code, vocabulary and a card."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.units import clock
from data.manifest import TOKENIZER
from data.vocabulary import open_tokenizer
from model.hf import folder as transformers_folder
from pretrain.analysis.scoring import figure
from pretrain.checkpoints import resume
from pretrain.checkpoints.contents import read_state
from pretrain.checkpoints.folder import total_j
from pretrain.checkpoints.weights import new_folder, shapes, without_weights, write_weights
from pretrain.config import RunConfig, dump
from pretrain.inference import fitting_state
from pretrain.records import Eval
from pretrain.run_folder import RunFolder


def export_weights(given: Path, out: Path, max_bytes: float) -> tuple[Path, int]:
    """Writes the folder `out`, whole or not at all: float32 weights as plain safetensors, with the run's config.yaml;
    returns the checkpoint and the bytes of its weights.

    Args:
        given: a run folder (its newest whole checkpoint), or one checkpoint's folder.
        max_bytes: of one file's weights.
    Raises:
        ConfigError: `given` has no checkpoint, or one of another model; or `out` exists or cannot be made.
    """
    run = RunFolder.containing(given)
    cfg = run.settings()

    def write(checkpoint: Path) -> tuple[Path, int]:
        fitting_state(
            checkpoint, cfg, read_state(checkpoint)["identity"][resume.TOKENIZER]
        )  # weights have no tokenizer
        with new_folder(out) as draft:
            size = write_weights(checkpoint, shapes(*without_weights(cfg)), draft, max_bytes)
            shutil.copy(run.config, draft)
        return checkpoint, size

    return run.read(write, given)


def export_transformers(given: Path, out: Path, max_bytes: float) -> tuple[Path, int]:
    """Writes the folder `out`, whole or not at all; returns the checkpoint and the bytes of its weights.

    Args:
        given: a run folder (its newest whole checkpoint), or one checkpoint's folder.
        max_bytes: of one file's weights.
    Raises:
        ConfigError: `given` has no checkpoint or no tokenizer, or `out` exists or cannot be made.
    """
    run = RunFolder.containing(given)
    cfg = run.settings()
    tokenizer = open_tokenizer(cfg.data.path)

    def write(checkpoint: Path) -> tuple[Path, int]:
        with new_folder(out) as folder:
            state = fitting_state(checkpoint, cfg, tokenizer.sha256)
            decoder, head = without_weights(cfg)
            head.progress = cfg.head_progress(state["step"] - 1)
            size = write_weights(checkpoint, shapes(decoder, head), folder, max_bytes)
            shutil.copyfile(cfg.data.path / TOKENIZER, folder / TOKENIZER)
            facts = _facts(run, state, cfg, size // 4)
            card = transformers_folder.card(run.path.name, cfg.model, head, facts, dump(cfg))
            transformers_folder.write(folder, decoder, head, tokenizer.eos_id, tokenizer.pad_id, card)
        return checkpoint, size

    return run.read(write, given)


def _facts(run: RunFolder, state: Mapping[str, Any], cfg: RunConfig, parameters: int) -> dict[str, str]:
    """What a run had come to at a checkpoint, by name."""
    before = [record for record in run.records(Eval) if record.step <= state["step"]]
    held_out = before[-1] if before else None
    joules, identity = total_j(state["joules"]), state["identity"]
    energy = "not measured" if joules is None else f"{joules:,.0f} J ({', '.join(state['joules'])})"
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
        "energy, of all phases": energy,
        "precision of training": f"{cfg.train.precision}; the weights here are the float32 masters",
        **{f"held-out {name}": _figure(getattr(held_out, key, None)) for name, key in forms.items()},
        "held-out figures are of update": f"{held_out.step:,}" if held_out else "not measured",
        "fingerprint of the data": f"`{identity[resume.DATA]}`",
        "SHA-256 of the vocabulary": f"`{identity[resume.TOKENIZER]}`",
        "trained with": ", ".join(
            f"{name} {version}" for name, version in state.get("versions", {}).items() if version
        ),
    }


def _figure(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.4f}"
