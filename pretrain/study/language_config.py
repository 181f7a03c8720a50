"""The settings of a study of language models, and what each of its runs trains.

Every head gets the same number of trials on the same points of the same space, by successive halving, at the first
size. Then its best setting is trained anew with fresh seeds at every size: `search.py` says in which order.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, Field, field_validator, model_validator

from common.errors import ConfigError
from common.fields import FilePath, Name, Seed, check_path
from common.settings import read_tree, validate
from model.config import ExponentRamp, HeadConfig
from pretrain import config as runs
from pretrain.config import RunConfig
from pretrain.study.tuning import Entry, Known, Setting, Space, Tuning, settings_of

MOST_CELLS = 20_000
FEW_SEEDS = 5  # fewer give intervals that mean little
TEST = "test"  # the split that is scored once, at the end; choosing sees `val` alone
NOT_ITS_OWN = {"run": "out", "head": "heads", "train.seed": "seeds and tuning.seed", "optim.min_lr": "lr_floor"}
UNEQUAL = ("evaluation.patience", "energy.stop_at_joules")  # would end runs of some heads sooner than of others
SPACE_SETS = {  # where a setting of the space stands in a run's configuration
    "lr": "optim.lr",
    "warmup": "optim.warmup_steps",
    "head_lr": "optim.head_lr_scale",
    "prototype_decay": "optim.prototype_decay",
}


class TunedHead(HeadConfig, extra="forbid", frozen=True):
    """A head as in a run, and what of the space is its own."""

    space: Space = Space()  # entries that take the place of tuning.space's

    def settings_alone(self) -> dict[str, Any]:
        """A run's `head` section."""
        return self.model_dump(mode="json", exclude={"space"})


class Size(BaseModel, extra="forbid", frozen=True):
    """What differs from `base` at one size."""

    model: dict[str, Any] = {}
    train: dict[str, Any] = {}


@dataclass(frozen=True, eq=False)
class Cell:
    """One run of a study: a trial of the search, or, without `trial`, a chosen setting with a fresh seed."""

    head: str
    size: str
    seed: int
    setting: Setting
    trial: int | None = None
    rung: int = 0
    share: float = 1.0  # of the steps that the size has

    @property
    def name(self) -> str:
        """Of its run folder, its configuration and its record; no two cells of a study share it."""
        if self.trial is None:
            return f"{self.head}.{self.size}.seed{self.seed}"
        return f"{self.head}.trial{self.trial:03d}.rung{self.rung}"


class LanguageConfig(BaseModel, extra="forbid", frozen=True):
    """A study. `base` is a run's configuration (see pretrain/config.py) but for what the study sets."""

    kind: Literal["language"]
    title: Name
    out: FilePath  # the study's folder
    heads: dict[Name, TunedHead] = Field(min_length=1, max_length=100)
    baseline: str  # one of the heads, which the others are compared with
    tuning: Tuning
    known: dict[Name, Known] = {}
    seeds: tuple[Seed, ...] = Field(min_length=1, max_length=1000)  # fresh ones, which nothing was chosen by
    sizes: dict[Name, Size] = Field(min_length=1, max_length=100)  # heads are tuned at the first
    lr_floor: float = Field(default=0.0, ge=0, le=1)  # the schedule ends at this share of the learning rate
    keep: Literal["runs", "records"] = "runs"  # records: a run folder is deleted once its cell is recorded
    corpus: FilePath | None = None  # a recipe, whose `data` section base.data adds to, and wins over
    base: dict[str, Any]

    @field_validator("seeds")
    @classmethod
    def _different(cls, values: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(values)) < len(values):
            raise ValueError(f"{list(values)} has a value twice")
        if len(values) < 2:
            raise ValueError(f"{list(values)}: with fewer than two seeds no difference has an error; five are few")
        return values

    @model_validator(mode="after")
    def _names_fit(self) -> LanguageConfig:
        if self.baseline not in self.heads:
            raise ValueError(f"baseline={self.baseline} is none of the heads: {', '.join(self.heads)}")
        for kind, names in (("heads", self.heads), ("sizes", self.sizes)):
            for name in names:
                if not name.replace("-", "").replace("_", "").isalnum():
                    raise ValueError(f"{kind}.{name}: a name names folders: letters, digits, - and _ alone")
        if self.tuning.seed in self.seeds:
            raise ValueError(f"seeds={list(self.seeds)}: {self.tuning.seed} is tuning.seed, which chose; give others")
        for name, known in self.known.items():
            if name not in self.heads:
                raise ValueError(f"known.{name} is none of the heads: {', '.join(self.heads)}")
            if strange := set(known.settings) - set(self.space(name)):
                raise ValueError(f"known.{name}.settings: {', '.join(sorted(strange))} of that head is not tuned")
        cells = len(self.heads) * (sum(self.tuning.counts()) + len(self.seeds) * len(self.sizes))
        if cells > MOST_CELLS:
            raise ValueError(f"{cells:,} runs of trials, heads, sizes and seeds; a study has at most {MOST_CELLS:,}")
        return self

    @model_validator(mode="after")
    def _base_leaves_the_study_its_own(self) -> LanguageConfig:
        tuned = {name for head in self.heads for name in self.space(head)}
        spaced = {place: f"tuning.space.{name}" for name, place in SPACE_SETS.items() if name in tuned}
        sections = [("base.", self.base), *((f"sizes.{n}.", size.model_dump()) for n, size in self.sizes.items())]
        for where, tree in sections:
            for key, ours in {**NOT_ITS_OWN, **spaced}.items():
                section, _, setting = key.rpartition(".")
                given = (tree.get(section) or {}) if section else tree
                if not isinstance(given, dict):
                    raise ValueError(f"{where}{section} must be a mapping of keys to values, as the section of a run")
                if setting in given:
                    raise ValueError(f"{where}{key} is set by the study: use {ours}")
        for key in UNEQUAL:
            section, _, setting = key.rpartition(".")
            given = self.base.get(section) or {}
            if isinstance(given, dict) and given.get(setting) is not None:
                raise ValueError(f"base.{key} would end runs of some heads sooner than of others: leave it out")
        for name, head in self.heads.items():
            if isinstance(head.exponent, ExponentRamp) and head.exponent.steps is not None:
                raise ValueError(
                    f"heads.{name}.exponent.steps: rungs are shorter than runs; without it a ramp takes all"
                )
        data = self.base.get("data") or {}
        if not isinstance(data, dict) or not data.get("test_fraction"):
            raise ValueError(
                "base.data.test_fraction must be above 0: a study reports on a test split, which choosing never saw"
            )
        if not isinstance(self.base.get("model") or {}, dict):
            raise ValueError("base.model must be a mapping of keys to values, as the section of a run")
        return self

    @property
    def tuned_at(self) -> str:
        """The size at which heads are tuned."""
        return next(iter(self.sizes))

    def space(self, head: str) -> dict[str, Entry]:
        """What is tuned of a head: the study's space with the head's own entries, and no exponent where it has
        none.
        """
        own = self.heads[head]
        entries = {**self.tuning.space.entries(), **own.space.entries()}
        if not own.settings.has_exponent:
            entries.pop("exponent", None)
        return entries

    def settings(self, head: str) -> list[dict[str, float]]:
        """The settings that a head is tried with, by the trial's number."""
        known = self.known[head].settings if head in self.known else {}
        return settings_of(self.tuning, self.space(head), known)

    def trial(self, head: str, number: int, rung: int, setting: Setting) -> Cell:
        """The run of a trial at a rung."""
        share = self.tuning.rungs[rung]
        return Cell(head, self.tuned_at, self.tuning.seed, setting, number, rung, share)

    def fresh(self, head: str, setting: Setting) -> Iterator[Cell]:
        """The runs of a chosen setting: every size and seed."""
        return (Cell(head, size, seed, setting) for size in self.sizes for seed in self.seeds)

    def config(self, cell: Cell) -> RunConfig:
        """What a cell trains. Raises ConfigError."""
        size, setting = self.sizes[cell.size], cell.setting
        tree: dict[str, Any] = {**self.base, "run": str(self.out / "runs" / cell.name)}
        tree["head"] = self.heads[cell.head].settings_alone()
        for section, own in (("model", size.model), ("train", {**size.train, "seed": cell.seed}), ("optim", {})):
            tree[section] = {**(tree.get(section) or {}), **own}
        if "lr" in setting:
            tree["optim"]["lr"] = setting["lr"]
        whole = runs.from_tree(tree)  # checked, with all defaults
        steps = max(1, round(whole.train.steps * cell.share))
        warmup = setting.get("warmup", whole.optim.warmup_steps / whole.train.steps)
        tree["train"]["steps"] = steps
        tree["optim"] |= {"min_lr": whole.optim.lr * self.lr_floor, "warmup_steps": round(warmup * steps)}
        tree["optim"] |= {
            key: setting[name]
            for name, key in (("head_lr", "head_lr_scale"), ("prototype_decay", "prototype_decay"))
            if name in setting
        }
        tree["head"] |= _head_settings(whole.head, whole.model.dim, setting)
        return runs.from_tree(tree)


def from_tree(tree: dict[str, Any]) -> LanguageConfig:
    """Checks plain values, with the data of `corpus` in `base.data`. Raises ConfigError."""
    corpus, base = tree.get("corpus"), tree.get("base")
    if isinstance(corpus, str) and isinstance(base, dict):
        try:
            data = read_tree(check_path(corpus)).get("data")
        except ValueError as error:
            raise ConfigError(f"corpus: {error}") from None
        own = base.get("data") or {}
        if not isinstance(data, dict) or not isinstance(own, dict):
            raise ConfigError(f"corpus={corpus}: expected a recipe with a `data` section, and base.data to add to it")
        tree = {**tree, "base": {**base, "data": {**data, **own}}}
    return validate(LanguageConfig, tree)


def _head_settings(head: HeadConfig, dim: int, setting: Setting) -> dict[str, Any]:
    """The head's own settings at a width, of multiples of what they are by default; what is 1 stays as it is."""
    from model.head import HarmonicHead

    made = HarmonicHead(1, dim, seed=0, device="meta", **head.arguments())
    first, last = made.exponents
    ramp = head.exponent.model_dump() if isinstance(head.exponent, ExponentRamp) else None
    found: dict[str, Any] = {}
    for name, times in setting.items():
        if times == 1:
            continue
        if name == "init":
            found["init_std"] = made.init_std * times
        elif name == "feature_length":
            found["feature_length"] = made.feature_length * times
        elif name == "exponent" and head.exponent == "learned":
            found["exponent_start"] = first * times
        elif name == "exponent":
            found["exponent"] = {**ramp, "first": first * times, "last": last * times} if ramp else first * times
    return found


def check_configs(study: LanguageConfig) -> None:
    """Raises ConfigError if a run of the study could not be trained: every trial at every rung, and, as nobody knows
    which is chosen, at every size and with every seed.
    """
    for head in study.heads:
        for number, setting in enumerate(study.settings(head)):
            cells = [study.trial(head, number, rung, setting) for rung in range(len(study.tuning.rungs))]
            cells += list(study.fresh(head, setting)) if not number else []
            cells += [Cell(head, size, study.seeds[0], setting) for size in study.sizes]
            for cell in cells:
                try:
                    study.config(cell)
                except ConfigError as error:
                    raise ConfigError(f"{cell.name}: {error}") from None
