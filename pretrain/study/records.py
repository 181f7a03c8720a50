"""What a study keeps of each run: `cells/NAME.json`, with settings, outcome and figures, and `cells/NAME.npz`, with the
nats of each document. A study that finds a run's record does not need its folder: records can be moved to another
machine, where the study goes on.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common.errors import ConfigError
from common.exits import EXIT_DIVERGED
from common.files import discard, replace_file, replacing
from common.strict_json import plain, read_json, to_json
from data.shards import open_split
from pretrain.analysis import geometry, interpretation
from pretrain.analysis.evaluation import scored_documents
from pretrain.analysis.scoring import token_counts, unigram_bits_per_byte
from pretrain.analysis.summary import summarise
from pretrain.checkpoints.saver import versions
from pretrain.config import RunConfig, dump, from_tree
from pretrain.energy.sustainability import joules_of
from pretrain.recorder import machine
from pretrain.records import JOULES, PARTS, PHASES, Eval, Record, Train
from pretrain.run_folder import RunFolder
from pretrain.study.language_config import TEST, Cell, LanguageConfig

CELLS, DATA = "cells", "data.json"
DONE, DIVERGED = "done", "diverged"
SHOWN = 300  # prototypes of a projection: those of the most frequent tokens
MOST_BYTES = 1 << 26  # of a record
SHARED = "several runs at once shared this machine (--jobs), so neither time nor energy is a run's own"

Log = Callable[[str], Any]
Kept = dict[str, Any]  # a record, as it stands in its file


class Records:
    """The records of a study's folder; each is read once."""

    def __init__(self, study: LanguageConfig) -> None:
        self.study = study
        self.folder = study.out / CELLS
        self._read: dict[str, Kept] = {}

    def file(self, cell: Cell) -> Path:
        """Where a cell's record is, or will be."""
        return self.folder / f"{cell.name}.json"

    def documents(self, cell: Cell) -> tuple[np.ndarray, np.ndarray]:
        """Nats and bytes (documents,) of the test split, float64. Raises ConfigError."""
        file = self.file(cell).with_suffix(".npz")
        try:
            with np.load(file, allow_pickle=False) as found:
                return found["nats"].astype(np.float64), found["text_bytes"].astype(np.float64)
        except (OSError, ValueError, KeyError) as error:
            raise ConfigError(
                f"{file}: the nats of each document cannot be read ({error}); put the file back, or remove the record "
                "beside it, and the run is measured again if its folder is there"
            ) from None

    def get(self, cell: Cell) -> Kept | None:
        """A cell's record; None if it has none. Raises ConfigError for one that is damaged, or of other settings."""
        if cell.name not in self._read:
            file = self.file(cell)
            if not file.exists():
                return None
            try:
                found = read_json(file, MOST_BYTES)
                was = dump(from_tree({**found["settings"], "run": "unused"}, written=True))
                _ = found["outcome"], found["summary"], found["measured"]
            except (OSError, ValueError, KeyError, TypeError, ConfigError) as error:
                raise ConfigError(
                    f"{file}: no record of a run ({error}); remove it, or put the right one there"
                ) from None
            if was != dump(self.study.config(cell).model_copy(update={"run": Path("unused")})):
                raise ConfigError(_refusal(file))
            self._read[cell.name] = found
        return self._read[cell.name]

    def fresh(self) -> int:
        """How many runs with fresh seeds have a record, whatever their settings."""
        return sum(".trial" not in file.name for file in self.folder.glob("*.json"))

    def check_data(self, cfg: RunConfig) -> None:
        """Writes down what the prepared data are. Raises ConfigError if the study was begun with others."""
        now, file = data_of(cfg), self.study.out / DATA
        if file.exists():
            self._check_same(now["fingerprint"], cfg)
        replace_file(file, to_json(now, indent=1) + "\n")

    def _check_same(self, fingerprint: str, cfg: RunConfig) -> None:
        was = self.data()["fingerprint"]
        if was != fingerprint:
            raise ConfigError(
                f"{cfg.data.path} has other data ({fingerprint}) than this study was begun with ({was}); put those "
                "back, or give the study another `out`"
            )

    def data(self) -> dict[str, Any]:
        """What the study's data are. Raises ConfigError if nothing was trained yet."""
        try:
            return dict(read_json(self.study.out / DATA))
        except (OSError, ValueError, TypeError) as error:
            raise ConfigError(
                f"{self.study.out / DATA}: cannot be read ({error}); it is written when training begins: run the study "
                "without --report"
            ) from None

    def check(self, cell: Cell) -> None:
        """Raises ConfigError if what is there of a cell, record or run folder, is of other settings."""
        if self.get(cell) is None:
            cfg = self.study.config(cell)
            run = RunFolder(cfg.run)
            if run.config.exists() and dump(run.settings()) != dump(cfg):
                raise ConfigError(_refusal(cfg.run))

    def make(self, cell: Cell, shared: bool, log: Log) -> Kept | None:
        """Records a run that has ended, measured on the test split if it is one of fresh seeds; None if it has not.

        Args:
            shared: other runs ran on this machine meanwhile.

        Raises:
            ConfigError: it was trained with other settings, or its data are not those of the study any more.
        """
        self.check(cell)
        cfg = self.study.config(cell)
        ended = outcome(cfg)
        if ended is None:
            return None
        summary = summarise(cfg.run)
        speed = _tokens_per_s(cfg.run)
        if shared:
            summary, speed = _without_time(summary), None
        fresh = cell.trial is None
        self.folder.mkdir(parents=True, exist_ok=True)
        measured = {}
        if fresh and ended == DONE:
            log(f"measuring {cell.name}")
            measured = self._measure(cell, cfg)
        found = plain(
            {
                "settings": cfg.model_dump(mode="json"),
                "outcome": ended,
                "summary": summary,
                "tokens_per_s": speed,
                "shared": SHARED if shared else None,
                "machine": machine(),
                "versions": versions(),
                "curves": _curves(cfg.run, shared) if fresh else {},
                "measured": measured,
            }
        )
        replace_file(self.file(cell), to_json(found) + "\n")
        if self.study.keep == "records":
            discard(cfg.run)
        self._read[cell.name] = found
        return found

    def _measure(self, cell: Cell, cfg: RunConfig) -> dict[str, Any]:
        """Scores a run by document, and its geometry. Raises ConfigError."""
        self._check_same(open_split(cfg.data.path, "train").fingerprint, cfg)
        scored = scored_documents(cfg.run, TEST)
        with replacing(self.file(cell).with_suffix(".npz")) as draft, draft.open("wb") as stream:
            np.savez_compressed(stream, nats=scored.nats.astype(np.float32), text_bytes=scored.text_bytes)
        source = interpretation.open_run(cfg.run, (), strict=False)
        looked_at = interpretation.measure(source)
        spectrum = geometry.spectrum(looked_at.prototypes)
        shown = cell.seed == self.study.seeds[0]
        return {
            "evaluation": {**scored.as_dict(), **scored.standard_errors()},
            "geometry": looked_at.figures,
            "scree": scree(spectrum) if shown else None,
            "projection": projection(looked_at.prototypes, spectrum, source) if shown else None,
        }


def _refusal(place: Path) -> str:
    return (
        f"{place} was trained with other settings than this study's; give the study another `out`, or remove what is "
        "there"
    )


def data_of(cfg: RunConfig) -> dict[str, Any]:
    """What all runs of a study are trained and scored on. Raises ConfigError if it is not prepared."""
    train, val, test = (open_split(cfg.data.path, name) for name in ("train", "val", TEST))
    found = {"path": str(cfg.data.path), "fingerprint": train.fingerprint, "train_tokens": train.tokens}
    for name, split in (("val", val), ("test", test)):
        sizes = {"tokens": split.tokens, "documents": split.documents, "bytes": split.text_bytes}
        sizes["unigram_bits_per_byte"] = unigram_bits_per_byte(train, split)
        found |= {f"{name}_{key}": value for key, value in sizes.items()}
    if test.tokens < cfg.model.seq_len or test.documents < 2:
        raise ConfigError(
            f"the test split in {cfg.data.path} has {test.tokens} tokens in {test.documents} documents: expected a "
            f"window of model.seq_len={cfg.model.seq_len}, and 2 documents. Prepare with a larger data.test_fraction."
        )
    if test.text_bytes is None:
        raise ConfigError(f"{cfg.data.path}: the bytes of its text are not known, so there are no bits/byte to compare")
    return found


def outcome(cfg: RunConfig) -> str | None:
    """Of a run folder: DONE or DIVERGED, as is a run whose last held-out loss is not finite; None for a run that has
    not ended.
    """
    ended = RunFolder(cfg.run).exit()
    if ended is None or ended.code not in (0, EXIT_DIVERGED):
        return None
    last = next(reversed(RunFolder(cfg.run).records(Eval)), None)
    return DIVERGED if ended.code or (last and last.loss is None) else DONE


def bits(record: Kept | None) -> float | None:
    """Bits/byte of the `val` split at a run's end, if it is done."""
    return record["summary"]["bits_per_byte"] if record and record["outcome"] == DONE else None


def _tokens_per_s(run: Path) -> float | None:
    """In the median of a run's records but the first, in which kernels are compiled; None if it has no others."""
    rates = [record.tokens_per_s for record in RunFolder(run).records(Train)][1:]
    return statistics.median(rates) if rates else None


def _without_time(summary: dict[str, Any]) -> dict[str, Any]:
    """A summary of a run that shared its machine: time and energy are null, with the reason."""
    joules = {field: dict.fromkeys(PHASES) for field in JOULES.values()}
    names = ("train_seconds", "tokens_per_s", "mfu", "gpu_j_per_token", "j_per_token", "j_per_step", "footprint")
    unmeasured: dict[str, Any] = {"measured": [], "not_measured": dict.fromkeys(PARTS, SHARED), "to_target": None}
    return {**summary, **dict.fromkeys(names), **joules, **unmeasured}


def _curves(run: Path, shared: bool) -> dict[str, Any]:
    records = RunFolder(run).records(Record)
    return {name: curve(records, kind, shared) for name, kind in (("train", Train), ("eval", Eval))}


def curve(records: Sequence[Record], kind: type[Train | Eval], shared: bool = False) -> list[dict[str, Any]]:
    """Losses of a kind's records against what training had taken by then: tokens, seconds, and the joules of each part
    that was measured throughout. Of a run that shared its machine, tokens alone.
    """
    points, tokens, seconds = [], 0, 0.0
    so_far = {part: 0.0 for part in PARTS if not shared and joules_of(records, part, "train") is not None}
    for record in records:
        if isinstance(record, Train):
            tokens, seconds = record.tokens, seconds + record.seconds
            for part in so_far:
                so_far[part] += record.joules(part) or 0.0
        if isinstance(record, kind):
            loss = record.loss_mean if isinstance(record, Train) else record.loss
            more = {} if isinstance(record, Train) else {"bits_per_byte": record.bits_per_byte}
            taken = None if shared else round(seconds, 3)
            point = {"step": record.step, "tokens": tokens, "seconds": taken, "joules": dict(so_far)}
            points.append({**point, "loss": loss, **more})
    return points


def scree(spectrum: geometry.Spectrum) -> list[float]:
    """Shares of the variance in the first 1, 2, ... principal components."""
    variances = spectrum.variances
    return [round(share, 6) for share in (variances.cumsum(0) / variances.sum()).tolist()]


def projection(rows: torch.Tensor, spectrum: geometry.Spectrum, source: interpretation.Source) -> dict[str, Any]:
    """The first two principal components of the most frequent tokens' prototypes, and how often each is in training, as
    `token_counts` counts.
    """
    counts = token_counts(open_split(source.cfg.data.path, "train"))
    chosen = counts.argsort()[::-1][:SHOWN].tolist()
    plane = geometry.plane(rows)
    points = [
        [round(x, 5), round(y, 5), source.tokenizer.decode([token]), int(counts[token])]
        for token, (x, y) in zip(chosen, plane[chosen].tolist(), strict=True)
    ]
    return {"explained": [spectrum.explained(1), spectrum.explained(2) - spectrum.explained(1)], "points": points}
