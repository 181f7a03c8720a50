"""The records of a run, `metrics.jsonl`: one model for each kind, by which it is written and read.

A line is one JSON object with its `kind` and its `step`, the updates before it; what was not measured, or is not
finite, is null. What is no such line is named and left out; half a line at the end is one that is being written, or was
when the run was killed.
"""

from __future__ import annotations

import json
import logging
import math
import os
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, BinaryIO, ClassVar, TypeVar, get_args, get_origin, get_type_hints

from common.errors import ConfigError
from common.files import open_regular
from common.strict_json import from_json, to_json

LINE_BYTES = 1 << 26  # of a line at most
MOST = 2**63  # that a whole number can be
TOLD = 3  # wrong lines, and places without lines, that are told one by one

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


@dataclass(frozen=True, kw_only=True)
class Lengths(Record):
    """Euclidean lengths at the start of a run and at its evaluations, in the units of the weights: of all prototypes as
    they are stored, and of final hidden states before the first tokens of the held-out split (None: at the start).
    """

    kind: ClassVar[str] = "lengths"
    prototypes_median: float | None  # None: not finite
    prototypes_p95: float | None  # 95th percentile
    hidden_median: float | None = None
    hidden_p95: float | None = None


def hints_of(model: Any) -> dict[str, Any]:
    """The types of a dataclass's fields."""
    hints = get_type_hints(model)
    return {field.name: hints[field.name] for field in fields(model)}


KINDS: dict[str, type[Record]] = {model.kind: model for model in (Train, Eval, Save, Counters, Lengths)}
PHASES = tuple(model.kind for model in (Train, Eval, Save))
HINTS = {model: hints_of(model) for model in KINDS.values()}
Kind = TypeVar("Kind", bound=Record)


def from_plain(values: Any) -> Record:
    """The record that a line's values are; fields of another version are left out. Raises ConfigError."""
    if not isinstance(values, dict):
        raise ConfigError(f"{str(values)[:40]}: expected an object")
    kind = values.get("kind")
    model = KINDS.get(kind) if isinstance(kind, str) else None
    if model is None:
        raise ConfigError(f"kind={str(kind)[:40]!r}: expected one of {', '.join(KINDS)}")
    hints = HINTS[model]
    for name, hint in hints.items():
        if name in values and not fits(values[name], hint):
            raise ConfigError(f"{name}={str(values[name])[:40]!r} in a record of {model.kind}: of another type")
    try:
        record = model(**{name: values[name] for name in hints.keys() & values.keys()})
    except TypeError as error:  # names what is missing
        raise ConfigError(f"{model.kind} record that is not whole: {error}") from None
    if record.step < 0:
        raise ConfigError(f"step={record.step}: expected 0 or more")
    return record


def fits(value: Any, hint: Any) -> bool:
    """Whether a value from JSON is of a type that a record's field may have."""
    if isinstance(hint, UnionType):
        return any(fits(value, one) for one in get_args(hint))
    if hint is NoneType:
        return value is None
    if get_origin(hint) is Mapping:
        return isinstance(value, dict) and all(fits(item, get_args(hint)[1]) for item in value.values())
    if get_origin(hint) in (Sequence, list):
        item = get_args(hint)[0]
        numbers = fits(0.0, item)  # of which there may be millions
        return isinstance(value, list) and all(
            (numbers and type(one) is float and math.isfinite(one)) or fits(one, item) for one in value
        )
    if hint in (int, float):
        return (type(value) is int and abs(value) < MOST) or (type(value) is hint is float and math.isfinite(value))
    return isinstance(value, hint)


@dataclass(frozen=True)
class Lines:
    """What a metrics.jsonl holds."""

    values: list[dict[str, Any]] = field(default_factory=list)  # the lines that are records, as they stand
    records: list[Record] = field(default_factory=list)  # the same
    wrong: list[str] = field(default_factory=list)  # the others: the number of each, and what is wrong with it

    def warn(self, path: Path, until: int = 0) -> None:
        """Tells the wrong lines, if there are any, and the steps without a record (`until`: as `lost`)."""
        for told in self.wrong[:TOLD]:
            log.warning("%s, %s; it is left out", path, told)
        if len(self.wrong) > TOLD:
            log.warning("%s: %d more lines are wrong, and left out", path, len(self.wrong) - TOLD)
        if lost := self.lost(until):
            log.warning("%s: no record is left of %s", path, ", ".join(lost))

    def lost(self, until: int = 0) -> list[str]:
        """The steps of training that are in no record, in words: between the first one and the last, or the step
        `until` if that is later. What is before the first one may have been another run's, which was gone on from.
        """
        gaps: list[tuple[int, int]] = []
        last = None
        for record in of_kind(self.records, Train):
            if record.losses is not None and last is not None:
                gaps.append((last + 1, record.step - len(record.losses)))
            last = record.step
        gaps.append(((last or 0) + 1, until))
        told = [f"step {first}" if first == end else f"steps {first} to {end}" for first, end in gaps if first <= end]
        return told[:TOLD] + ([f"{len(told) - TOLD} more such places"] if told[TOLD:] else [])


def scan(path: Path) -> Lines:
    """Reads a metrics.jsonl; a NaN of an older one is None.

    Raises:
        FileNotFoundError: it is not there.
        ConfigError: no file that can be read stands there.
    """
    found: dict[int, tuple[dict[str, Any], Record]] = {}
    wrong: dict[int, str] = {}
    try:
        with open_regular(path) as stream:
            for number, line in _numbered(stream):
                try:
                    values: Any = from_json(line.decode()) if len(line) < LINE_BYTES else None
                    if b"\\ud" in line.lower():  # half of a character cannot be printed
                        json.dumps(values, ensure_ascii=False, allow_nan=False).encode()
                    found[number] = (values, from_plain(values))
                except ValueError as error:  # ConfigError, and what is no UTF-8 or JSON
                    if line.endswith(b"\n"):
                        wrong[number] = str(error) if len(line) < LINE_BYTES else "it is too long"
    except OSError as error:
        if not os.path.lexists(path):
            raise
        raise ConfigError(f"{path}: cannot be read ({error}); move it away, or put the run's own back") from None
    for number in _out_of_order({n: record.step for n, (_, record) in found.items() if isinstance(record, Train)}):
        wrong[number] = f"step {found.pop(number)[1].step} is out of order"
    return Lines(
        [values for values, _ in found.values()],
        [record for _, record in found.values()],
        [f"line {number}: {wrong[number]}" for number in sorted(wrong)],
    )


def _numbered(stream: BinaryIO) -> Iterable[tuple[int, bytes]]:
    """Lines by their numbers, from 1; of one that is too long the beginning, with the end of a line."""
    number = 0
    while line := stream.readline(LINE_BYTES):
        number += 1
        rest = line
        while len(rest) == LINE_BYTES and not rest.endswith(b"\n"):
            rest = stream.readline(LINE_BYTES)
        yield number, line if rest is line else line[:-1] + b"\n"


def _out_of_order(steps: Mapping[int, int]) -> set[int]:
    """The numbers of the fewest lines without which steps ascend."""
    ends: list[int] = []  # of ascending rows of each length, the least last step
    places: dict[int, int] = {}  # of a line in the longest row that it can end
    for number, step in steps.items():
        places[number] = bisect_left(ends, step)
        ends[places[number] : places[number] + 1] = [step]
    wanted, stay, above = len(ends) - 1, set(), math.inf
    for number in reversed(steps):
        if places[number] == wanted and steps[number] < above:
            stay.add(number)
            wanted, above = wanted - 1, steps[number]
    return set(steps) - stay


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a metrics.jsonl that are records; warns of what is none. Raises as `scan`."""
    lines = scan(path)
    lines.warn(path)
    return lines.values


def read(path: Path) -> Lines:
    """A metrics.jsonl, empty if there is no such file; warns of what is no record. Raises ConfigError as `scan`."""
    try:
        lines = scan(path)
    except FileNotFoundError:
        return Lines()
    lines.warn(path)
    return lines


def of_kind(records: Iterable[Record], model: type[Kind]) -> list[Kind]:
    """The records of a model or of models derived from it, in their order: `Phase` gives all but counters."""
    return [record for record in records if isinstance(record, model)]
