"""The records of a run, `metrics.jsonl`: one model for each kind, by which it is written and read.

A line is one JSON object with its `kind` and its `step`, the updates before it; what was not measured, or is not
finite, is null.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from common.errors import ConfigError
from common.strict_json import from_json, to_json

log = logging.getLogger(__name__)

PARTS = ("gpu", "cpu", "dram")  # of a machine: what has energy counters of its own
JOULES = {part: f"{part}_j" for part in PARTS}  # the field of a record that holds a part's joules


@dataclass(frozen=True, kw_only=True)
class Record:
    """One line."""

    kind: ClassVar[str]
    step: int  # updates before it

    def values(self) -> dict[str, Any]:
        """All but the step: what only this kind has comes first."""
        shared = {field.name for field in fields(Phase)}
        values = asdict(self)
        return {name: values[name] for name in sorted(values, key=shared.__contains__) if name != "step"}

    def line(self) -> str:
        """As it stands in metrics.jsonl, without the line's end."""
        return to_json({"kind": self.kind, "step": self.step, **self.values()})


@dataclass(frozen=True, kw_only=True)
class Phase(Record):
    """What took time and energy: of the whole world, in seconds and joules; None: not measured, or too short to be."""

    seconds: float
    gpu_j: float | None = None
    cpu_j: float | None = None
    dram_j: float | None = None

    def joules(self, part: str) -> float | None:
        """Those of one of PARTS; None: not measured, or too short to be."""
        return getattr(self, JOULES[part])


@dataclass(frozen=True, kw_only=True)
class Train(Phase):
    """Some steps of training, up to `step`. Losses in nats per token."""

    kind: ClassVar[str] = "train"
    loss: float | None  # of the last step
    loss_mean: float | None = None
    tokens: int = 0  # since the run began
    tokens_by_source: Mapping[str, int] | None = None  # since the record before
    batch: str | None = None  # fingerprint of the last step's batch
    lr: float = 0.0
    exponent: float | None = None
    losses: Sequence[float | None] | None = None  # of every step, as the norms
    grad_norms: Sequence[float | None] | None = None  # global, before clipping
    grad_norm: float | None = None
    grad_norm_clipped: float | None = None
    skipped: int = 0  # steps that were not finite
    tokens_per_s: float = 0.0
    data_wait_s: float | None = None  # seconds in which the first rank waited for its batches
    gpu_j_per_token: float | None = None
    mfu: float | None = None  # share of the GPUs' dense bf16 peak


@dataclass(frozen=True, kw_only=True)
class Eval(Phase):
    """The whole held-out split."""

    kind: ClassVar[str] = "eval"
    loss: float | None  # nats per token
    perplexity: float | None = None
    bits_per_byte: float | None = None
    accuracy: float | None = None
    tokens: int | None = None
    text_bytes: int | None = None
    documents: int | None = None
    text_sha256: str | None = None  # of the documents
    tokenizer_sha256: str | None = None
    data_fingerprint: str | None = None


@dataclass(frozen=True, kw_only=True)
class Save(Phase):
    """A checkpoint that was published; joules are those of the stall."""

    kind: ClassVar[str] = "save"
    bytes: int = 0
    stall_s: float | None = None  # while training waited


@dataclass(frozen=True, kw_only=True)
class Counters(Record):
    """Which parts are measured from here on, and why others are not."""

    kind: ClassVar[str] = "counters"
    measured: Sequence[str]
    missing: Mapping[str, str]


KINDS: dict[str, type[Record]] = {model.kind: model for model in (Train, Eval, Save, Counters)}
PHASES = tuple(model.kind for model in (Train, Eval, Save))
Kind = TypeVar("Kind", bound=Record)


def from_plain(values: Mapping[str, Any]) -> Record:
    """The record that a line's values are; fields of another version are left out. Raises ConfigError."""
    model = KINDS.get(values.get("kind", ""))
    if model is None:
        raise ConfigError(f"kind={values.get('kind')!r}: expected one of {', '.join(KINDS)}")
    known = {field.name for field in fields(model)}
    try:
        return model(**{name: value for name, value in values.items() if name in known})
    except TypeError as error:  # names what is missing
        raise ConfigError(f"{model.kind} record that is not whole: {error}") from None


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a metrics.jsonl; a last line that was cut off is left out, a NaN of an older one is None."""
    objects = []
    for line in path.read_text().splitlines():
        try:
            objects.append(from_json(line))
        except json.JSONDecodeError:
            log.warning("%s: a line that was cut off is left out", path)
    return objects


def read(path: Path) -> list[Record]:
    """The records of a metrics.jsonl; none if there is no such file. Raises ConfigError for one of another format."""
    try:
        return [from_plain(values) for values in read_lines(path)]
    except FileNotFoundError:
        return []
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}; this version did not write it") from None


def of_kind(records: Iterable[Record], model: type[Kind]) -> list[Kind]:
    """The records of a model or of models derived from it, in their order: `Phase` gives all but counters."""
    return [record for record in records if isinstance(record, model)]
