"""The measures of pretrain/analysis/geometry.py on a run: its newest whole checkpoint, and held-out text.

One process, without DeepSpeed and without a process group; weights and hidden states in float32, whatever the precision
of training. Rows are taken as the head's distance sees them (`Distance.transform`): of length 1 for cosine, times
L (mahalanobis' M = L L'), as bits for hamming, as they are for all others.

Legend: N tokens, V prototypes, D width, C classes.
"""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.errors import ConfigError
from data.loader import EvaluationWindows
from data.manifest import TOKENIZER
from data.masking import mask_id
from data.shards import Split, open_split
from data.tokenizer import Tokenizer
from model.distances import Distance
from pretrain.analysis import geometry
from pretrain.analysis.papers import (
    FunctionVectors,
    Parallelogram2502,
    function_vectors,
    parallelogram_2502,
    spectrum_2603,
)
from pretrain.analysis.scoring import maskings, token_counts
from pretrain.analysis.start import NOISE_SEED, Noise, count_correlation, noise_rows, start_of, still_noise
from pretrain.analysis.words import RELATIONS, token_of, token_pairs
from pretrain.checkpoints.contents import damage, read_state
from pretrain.checkpoints.folder import step_of
from pretrain.checkpoints.reading import Vanished, held, looked_at
from pretrain.checkpoints.resume import TOKENIZER as TOKENIZER_HASH
from pretrain.checkpoints.weights import read_weights
from pretrain.config import RunConfig, check_data
from pretrain.inference import Model
from pretrain.run_folder import RunFolder

TOKENS = 16_384  # of held-out text, its first
LEAST = 8  # hidden states that a class must have
NEIGHBOURS = 5

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """A run that can be looked at, and the tokens of the words whose neighbours are asked for."""

    run: RunFolder
    cfg: RunConfig
    checkpoint: Path
    split: Split
    tokenizer: Tokenizer
    words: dict[str, int]
    hold: ExitStack  # on the checkpoint, which a run that trains would delete


def open_run(run: Path, words: Sequence[str], strict: bool) -> Source:
    """Finds what the measures need, before any of it is read at length.

    Args:
        strict: a word that is no single token of the run's tokenizer is an error; otherwise it is left out.

    Raises:
        ConfigError: no whole checkpoint, no prepared data, data of another tokenizer than the run's, or such a word.
    """
    folder, hold = RunFolder.containing(run), ExitStack()
    checkpoint, cfg = folder.read(lambda path: _kept(path, hold), run), folder.settings()
    check_data(cfg)
    split = open_split(cfg.data.path, "val")
    tokenizer = Tokenizer(Path(cfg.data.path) / TOKENIZER)
    if read_state(checkpoint)["identity"][TOKENIZER_HASH] != tokenizer.sha256:
        raise ConfigError(
            f"{cfg.data.path} was prepared with another tokenizer than the one that {folder.path} was trained with; "
            "prepare with that one, or set data.path in the run's config.yaml to where the run's data are now"
        )
    if not split.tokens:
        raise ConfigError(f"{cfg.data.path}: its val split is empty; prepare with a larger data.val_fraction")
    tokens = {word: token_of(tokenizer, word) for word in words}
    unknown = [word for word, token in tokens.items() if token is None]
    if strict and unknown:
        raise ConfigError(
            f"--words {' '.join(unknown)}: not single tokens of {folder.path}'s tokenizer (after a blank); give other "
            "words"
        )
    return Source(folder, cfg, checkpoint, split, tokenizer, {w: t for w, t in tokens.items() if t is not None}, hold)


def _kept(checkpoint: Path, hold: ExitStack) -> Path:
    """The checkpoint, which is held until `hold` is closed or forgotten."""
    hold.enter_context(held(checkpoint))
    return checkpoint


@dataclass(frozen=True, eq=False)
class Measured:
    """The figures of a run (plain values, None or nan where there is none), and what other runs are compared with."""

    figures: dict[str, Any]
    fingerprint: str  # of the data
    hidden: Tensor  # (N, D)
    prototypes: Tensor  # (V, D)


def measure(source: Source) -> Measured:
    """Raises ConfigError if weights or hidden states are not finite."""
    with source.hold:
        return _measured(source)


def _measured(source: Source) -> Measured:
    cfg = source.cfg
    model = source.run.open_model(source.checkpoint, precision="float32")
    hidden, targets = hidden_states(model, source.split, None if cfg.model.causal else mask_id(cfg.data.path))
    prototypes = model.head.prototypes.detach()
    embedding = None if model.decoder.tokens is None else model.decoder.tokens.weight.detach()
    if not hidden.isfinite().all():
        raise ConfigError(f"{source.checkpoint}: its hidden states are not all finite; take an earlier checkpoint")
    distance = model.head.score_function
    seen_prototypes, seen_hidden = (_seen(distance, rows) for rows in (prototypes, hidden))
    points = {"prototypes": seen_prototypes, "embedding": embedding}
    began = start_of(source.run, cfg)
    start = None if began.prototypes is None else _seen(distance, began.prototypes.to(prototypes.device))
    learnt = {"displacement": None if start is None else seen_prototypes - start}
    figures = {
        "checkpoint": str(source.checkpoint),
        "step": model.step,
        "distance": cfg.head.distance,
        "tied": cfg.model.tied,
        "held_out_tokens": len(hidden),
        "spectra": {
            name: None if rows is None else _spectrum(rows)
            for name, rows in {**points, **learnt, "hidden": seen_hidden}.items()
        },
        "noise": {
            "seed": NOISE_SEED,
            **{name: _of_noise(*rows.shape) for name, rows in (("prototypes", prototypes), ("hidden", hidden))},
        },
        "start": {"unknown": began.unknown, **_since(seen_prototypes, start)},
        "first_component_with_count": _with_count({"prototypes": seen_prototypes, **learnt}, cfg),
        "norms": {str(step_of(checkpoint)): _norms(checkpoint, cfg) for checkpoint in _usable(source, model.step)},
        "classes": _classes(seen_prototypes, seen_hidden, targets, distance),
        "parallelograms": {
            name: None if rows is None else _relations(rows, source.tokenizer) for name, rows in points.items()
        },
        "nearest": _nearest(prototypes, distance, source),
    }
    return Measured(figures, source.split.fingerprint, seen_hidden, seen_prototypes)


def compare(measured: dict[str, Measured]) -> list[dict[str, Any]]:
    """Linear CKA of hidden states and of prototypes for every two runs; None where their data are not the same."""
    pairs = []
    for (a, first), (b, second) in itertools.combinations(measured.items(), 2):
        same = first.fingerprint == second.fingerprint
        figures = {
            "hidden": geometry.linear_cka(first.hidden, second.hidden) if same else None,
            "prototypes": geometry.linear_cka(first.prototypes, second.prototypes) if same else None,
        }
        pairs.append({"runs": [a, b], **figures})
    return pairs


def hidden_states(model: Model, split: Split, mask: int | None, tokens: int = TOKENS) -> tuple[Tensor, Tensor]:
    """Final hidden states (N, D) of the first `tokens` tokens of a split, and those tokens (N,), which are what the
    states predict. Windows are those of evaluation.

    Args:
        mask: the id of [MASK], behind which a masked model predicts.
    """
    windows, at_once = EvaluationWindows(split, model.cfg.model.seq_len), 8
    last = min(windows.count, -(-tokens // windows.stride))
    rows, labels = [], []
    for first in range(0, last, at_once):
        inputs, _, targets = (
            torch.from_numpy(part).to(model.head.prototypes.device)
            for part in windows.batch(first, min(at_once, last - first))
        )
        if mask is None:
            states = model.hidden(inputs)
        else:
            states = torch.zeros(())
            for masked, hidden in maskings(inputs, targets, mask):
                states = torch.where(hidden[..., None], model.hidden(masked), states)
        rows.append(states[targets >= 0])
        labels.append(targets[targets >= 0])
    return torch.cat(rows)[:tokens], torch.cat(labels)[:tokens]


@torch.no_grad()
def _seen(distance: Distance, rows: Tensor) -> Tensor:
    """Rows (N, D) as a distance sees them, in float32."""
    return torch.cat([distance.transform(part.double()).float() for part in rows.split(geometry.CHUNK)])


def _since(prototypes: Tensor, start: Tensor | None) -> dict[str, float | None]:
    """How much of the prototypes is still their start, both as the distance sees them."""
    return dict.fromkeys(Noise._fields) if start is None else still_noise(prototypes, start)._asdict()


def _with_count(rows: dict[str, Tensor | None], cfg: RunConfig) -> dict[str, dict[str, float] | None]:
    counts = torch.from_numpy(token_counts(open_split(cfg.data.path, "train")))
    return {
        name: None if one is None or one.shape[1] < 2 else count_correlation(one, counts.to(one.device))._asdict()
        for name, one in rows.items()
    }


@functools.lru_cache
def _of_noise(count: int, dim: int) -> dict[str, Any]:
    """What `_spectrum` says of independent normal entries."""
    return _spectrum(noise_rows(count, dim))


def _spectrum(rows: Tensor) -> dict[str, Any]:
    spectrum = geometry.spectrum(rows)
    return {
        "dimensions_90": spectrum.dimensions(0.90),
        "dimensions_95": spectrum.dimensions(0.95),
        "first_2": spectrum.explained(2),
        "first_5": spectrum.explained(5),
        "effective_rank": geometry.effective_rank(rows.double() - rows.mean(0, dtype=torch.float64)),
        "participation_ratio": spectrum.participation_ratio,
        "arxiv_2603_10225": spectrum_2603(rows)._asdict(),
    }


def _usable(source: Source, last: int) -> list[Path]:
    """The run's checkpoints up to the step `last` of the one that was found whole; those of them that are damaged are
    left out.
    """
    kept = []
    for path in source.run.checkpoints():
        if step_of(path) <= last:
            try:
                wrong = None if path == source.checkpoint else _kept_if_whole(path, source.hold)
            except Vanished:
                continue
            if wrong:
                log.warning("norms: %s is left out: %s", path.name, wrong)
            else:
                kept.append(path)
    return kept


def _kept_if_whole(checkpoint: Path, hold: ExitStack) -> str | None:
    """What is wrong with a checkpoint, or None: then it is held."""
    wrong = looked_at(checkpoint, lambda: damage(checkpoint, moments=False))
    if wrong is None:
        _kept(checkpoint, hold)
    return wrong


def _norms(checkpoint: Path, cfg: RunConfig) -> dict[str, float]:
    """Of the prototypes as they are stored."""
    name, shape = "head.prototypes", torch.Size((cfg.model.vocab_size, cfg.model.dim))
    return geometry.norms(read_weights(checkpoint, {name: shape})[name])


def _classes(prototypes: Tensor, hidden: Tensor, targets: Tensor, distance: Distance) -> dict[str, Any] | None:
    """None if fewer than two tokens come often enough."""
    if (targets.unique(return_counts=True)[1] >= LEAST).sum() < 2:
        return None
    classes = geometry.classes_of(hidden, targets, LEAST)
    own = prototypes[classes.labels]
    return {
        "classes": len(classes.labels),
        "tokens": int(classes.counts.sum()),
        "centre_distance": _centre_distance(own, classes, distance),
        "scatter": classes.scatter,
        "nc1": classes.nc1,
        "nc2": {
            name: {"equinorm": geometry.equinorm(rows), **geometry.equiangular(rows)._asdict()}
            for name, rows in {"means": classes.means, "prototypes": own}.items()
        },
        "nc3": geometry.self_duality(own, classes),
    }


def _centre_distance(own: Tensor, classes: geometry.Classes, distance: Distance) -> dict[str, float] | None:
    """Medians over classes: of the prototypes, of what the true centres would read, and of other classes' prototypes.

    None for softmax over products and cosines, whose weights are no points among the hidden states.
    """
    if distance.slope > 0:
        return None
    readings = {
        "prototype": geometry.centre_distances(own, classes),
        "true_centre": classes.counts.double().rsqrt(),
        "other_prototype": geometry.centre_distances(own.roll(1, 0), classes),
    }
    return {name: values.nanmedian().item() for name, values in readings.items()}


def _relations(rows: Tensor, tokenizer: Tokenizer) -> dict[str, Any]:
    """Relation -> how much its pairs are sides of parallelograms, here and as arXiv:2502.01628 has it."""
    points = geometry.plane(rows) if rows.shape[1] > 1 else None
    by_relation = {}
    for relation, words in RELATIONS.items():
        tokens = token_pairs(tokenizer, words)
        figures: dict[str, Any] = dict.fromkeys(geometry.Parallelograms._fields)
        theirs: dict[str, Any] = dict.fromkeys(Parallelogram2502._fields)
        vectors: dict[str, Any] = dict.fromkeys(FunctionVectors._fields)
        if len(tokens) >= 2:
            pairs = torch.tensor(tokens, device=rows.device)
            figures = geometry.parallelogram_loss(rows, pairs)._asdict()
            vectors = function_vectors(rows, pairs)._asdict()
            theirs = theirs if points is None else parallelogram_2502(points, pairs)._asdict()
        by_relation[relation] = {
            "pairs": len(tokens),
            "left_out": len(words) - len(tokens),
            **figures,
            "arxiv_2502_01628": theirs,
            "function_vectors": vectors,
        }
    return by_relation


def _nearest(prototypes: Tensor, distance: Distance, source: Source) -> dict[str, Any]:
    """Word -> the nearest tokens, as text with their distance: under the run's own distance, and under cosine."""
    by: dict[str, Distance | str] = {"own": distance, "cosine": "cosine"}
    chosen = list(source.words.values())
    neighbours = {name: geometry.nearest(prototypes, chosen, NEIGHBOURS, kind) for name, kind in by.items()}
    return {
        word: {
            name: [
                [source.tokenizer.decode([index]), value]
                for index, value in zip(nearest.indices[place].tolist(), nearest.distances[place].tolist(), strict=True)
            ]
            for name, nearest in neighbours.items()
        }
        for place, word in enumerate(source.words)
    }
