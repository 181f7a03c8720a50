"""Reading a checkpoint's tensors into any layout."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path

import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

from common.errors import ConfigError
from model.decoder import Decoder
from model.head import HarmonicHead
from pretrain.checkpoints.contents import read_state
from pretrain.checkpoints.folder import Progress
from pretrain.checkpoints.fragments import Fragment, head_fragment


def load(checkpoint: Path, fragments: Mapping[str, Fragment]) -> Progress:
    """Fills the fragments of all ranks from a checkpoint of any layout. Raises ConfigError."""
    _fill(checkpoint, fragments)
    state = read_state(checkpoint)
    progress = Progress(**{field.name: state[field.name] for field in fields(Progress)})
    return progress if progress.total_j is not None else replace(progress, joules=None)


def load_weights(checkpoint: Path, decoder: Decoder, head: HarmonicHead) -> None:
    """Fills a whole decoder and this rank's part of a head with float32 weights, without DeepSpeed or a process
    group.
    """
    wanted = {f"trunk.{n}.fp32": Fragment(p.data.view(-1), 0, p.numel()) for n, p in decoder.named_parameters()}
    wanted |= {f"head.{n}.fp32": head_fragment(head, n, p.data) for n, p in head.named_parameters()}
    load_alone(checkpoint, wanted)


def load_alone(checkpoint: Path, fragments: Mapping[str, Fragment]) -> None:
    """Fills fragments from a checkpoint, in this process without others. Raises ConfigError."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        _fill(checkpoint, fragments, no_dist=True)


def _fill(checkpoint: Path, fragments: Mapping[str, Fragment], no_dist: bool = False) -> None:
    try:
        dcp.load(dict(fragments), storage_reader=HuggingFaceStorageReader(str(checkpoint)), no_dist=no_dist)
    except (CheckpointException, OSError, SafetensorError) as problem:
        failures = problem.failures if isinstance(problem, CheckpointException) else {}
        first = next((error for error, _ in failures.values()), problem)
        raise ConfigError(
            f"{checkpoint}: its tensors cannot be read ({first!r}): it changed since it was looked at, or is of "
            "another model; give another checkpoint"
        ) from None
