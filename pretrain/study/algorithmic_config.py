"""The settings of an algorithmic study (pretrain/study/algorithmic.py), and those of one of its cells."""

from __future__ import annotations

import hashlib
import itertools
import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, model_validator

from common.fields import FilePath, Name, NotNegative, Positive, Seed, Steps
from model.config import HeadConfig

MOST_CHOICES = 100  # of one kind in a study
VERSION = 3  # of what a cell's settings mean: to be raised when the same settings would give other figures

TaskName = Literal["modular_addition", "circle", "equivalence", "in_context", "permutation"]
DecayRule = Literal["all", "no_prototypes", "no_last_layer", "rate_by_norm"]


class MlpConfig(BaseModel, extra="forbid", frozen=True):
    """Embeddings of the inputs side by side, two hidden layers with SiLU, D features."""

    kind: Literal["mlp"]
    hidden: int = Field(default=100, gt=0, le=2**16)


class TransformerConfig(BaseModel, extra="forbid", frozen=True):
    """A `Decoder` with learned positions, whose last hidden state predicts."""

    kind: Literal["transformer"]
    layers: int = Field(default=2, gt=0, le=1024)
    heads: int = Field(default=2, gt=0, le=2**16)


SWEPT = ("heads", "weight_decays", "decay_rules", "lrs")
NetworkConfig = Annotated[MlpConfig | TransformerConfig, Field(discriminator="kind")]


class TaskConfig(BaseModel, extra="forbid", frozen=True):
    """How one task is trained, for all heads alike."""

    fractions: tuple[float, ...] = Field(min_length=1, max_length=MOST_CHOICES)  # of all examples, to train on; rising
    epochs: Steps  # updates: batches are full
    evaluate_every: Steps = 5  # epochs; those to generalise are counted in these

    @model_validator(mode="after")
    def _rising_fractions(self) -> TaskConfig:
        rising = all(a < b for a, b in itertools.pairwise(self.fractions))
        if not rising or not all(0 < fraction < 1 for fraction in self.fractions):
            raise ValueError(f"fractions={list(self.fractions)} must rise and lie between 0 and 1")
        return self


class Candidate(BaseModel, extra="forbid", frozen=True):
    """A learning rate and a weight decay (AdamW's) that are tried together.

    `decay_rule`: what decays. `all` weights; all but the prototypes (`no_prototypes`); nor those of the layer that
    makes features (`no_last_layer`); or all, with the rates of these two falling with their norms (`rate_by_norm`).
    """

    lr: Positive
    weight_decay: NotNegative
    decay_rule: DecayRule = "all"


class ChoiceConfig(BaseModel, extra="forbid", frozen=True):
    """Each candidate is trained at the task's largest fraction, where most heads can be told apart, with the seeds
    given here. Taken is the one with which most of them end with GOAL of the test examples right; of those the one with
    the fewest epochs until they first had it, in the median; of those the one with the best mean test accuracy; of
    those the first.
    """

    candidates: tuple[Candidate, ...] = Field(min_length=1, max_length=MOST_CHOICES)
    seeds: tuple[Seed, ...] = Field(default=(), max_length=MOST_CHOICES)

    @model_validator(mode="after")
    def _a_choice_has_seeds(self) -> ChoiceConfig:
        if len(self.candidates) > 1 and not self.seeds:
            raise ValueError(f"seeds: none given; {len(self.candidates)} candidates need at least one to choose by")
        return self


class SweepConfig(BaseModel, extra="forbid", frozen=True):
    """Weight decays and decay rules, each head with each of them, on one task, network and fraction. A head's rate is
    chosen for each of them apart, among `lrs`, as ChoiceConfig says; without decay there is one rule.
    """

    task: TaskName
    network: Literal["mlp", "transformer"]
    fraction: float = Field(gt=0, lt=1)
    heads: tuple[str, ...] = Field(min_length=1, max_length=MOST_CHOICES)
    weight_decays: tuple[NotNegative, ...] = Field(min_length=1, max_length=MOST_CHOICES)
    decay_rules: tuple[DecayRule, ...] = Field(default=("all",), min_length=1)
    lrs: tuple[Positive, ...] = Field(min_length=1, max_length=MOST_CHOICES)

    def settings(self) -> list[tuple[float, DecayRule]]:
        """What is tried: weight decays with rules."""
        pairs = itertools.product(self.weight_decays, self.decay_rules)
        return [(decay, rule) for decay, rule in pairs if decay or rule == self.decay_rules[0]]


class AlgorithmicConfig(BaseModel, extra="forbid", frozen=True):
    """A study of kind `algorithmic`: every task, network, head, fraction and seed is a cell."""

    kind: Literal["algorithmic"]
    title: Name
    out: FilePath
    processes: int = Field(default=1, gt=0, le=1024)  # cells at once, each on one thread
    tasks: dict[TaskName, TaskConfig] = Field(min_length=1)
    networks: tuple[NetworkConfig, ...] = Field(min_length=1, max_length=MOST_CHOICES)
    heads: dict[Name, HeadConfig] = Field(min_length=1, max_length=MOST_CHOICES)
    baseline: str  # one of the heads, which the others are compared with
    dim: int = Field(default=16, gt=1, le=2**16)  # of embeddings, features and prototypes
    betas: tuple[float, float] = (0.9, 0.98)  # of AdamW
    choice: ChoiceConfig
    sweep: SweepConfig | None = None  # of weight decay
    seeds: tuple[Seed, ...] = Field(min_length=1, max_length=MOST_CHOICES)

    @model_validator(mode="after")
    def _every_cell_once(self) -> AlgorithmicConfig:
        named: list[tuple[str, list[Any]]] = [
            ("networks", [network.kind for network in self.networks]),
            ("seeds", list(self.seeds)),
            ("choice.seeds", list(self.choice.seeds)),
            ("choice.candidates", list(self.choice.candidates)),
            *((f"sweep.{name}", list(getattr(self.sweep, name))) for name in SWEPT if self.sweep),
        ]
        for name, values in named:
            if len(set(values)) < len(values):
                plain = [value.model_dump() if isinstance(value, BaseModel) else value for value in values]
                raise ValueError(f"{name}={plain} must differ from each other")
        common = set(self.seeds) & set(self.choice.seeds)
        if common:
            raise ValueError(f"choice.seeds and seeds share {sorted(common)}: what is reported must not have chosen")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas={list(self.betas)} must lie in [0, 1)")
        return self

    @model_validator(mode="after")
    def _baseline_is_a_head(self) -> AlgorithmicConfig:
        if self.baseline not in self.heads:
            raise ValueError(f"baseline={self.baseline} is none of the heads: {', '.join(self.heads)}")
        return self

    @model_validator(mode="after")
    def _sweep_is_of_the_study(self) -> AlgorithmicConfig:
        if self.sweep is None:
            return self
        there: dict[str, list[str]] = {
            "heads": list(self.heads),
            "task": list(self.tasks),
            "network": [network.kind for network in self.networks],
        }
        for name, known in there.items():
            given = getattr(self.sweep, name)
            for value in given if name == "heads" else [given]:
                if value not in known:
                    raise ValueError(f"sweep.{name}: {value} is none of the study's: {', '.join(known)}")
        if len(self.sweep.lrs) > 1 and not self.choice.seeds:
            raise ValueError("choice.seeds: none given; the rates of a sweep need at least one to choose by")
        return self

    @model_validator(mode="after")
    def _there_are_examples(self) -> AlgorithmicConfig:
        from pretrain.study.tasks import TASKS, training_examples  # torch: after all else was checked

        asked = [(f"tasks.{name}.fractions", name, f) for name, task in self.tasks.items() for f in task.fractions]
        if self.sweep:
            asked.append(("sweep.fraction", self.sweep.task, self.sweep.fraction))
        for key, name, fraction in asked:
            count = len(TASKS[name]().answers)
            if not 0 < training_examples(TASKS[name](), fraction) < count:
                raise ValueError(f"{key}: {fraction} of {count} examples leaves none to train on or none to test")
        return self

    @model_validator(mode="after")
    def _decoders_can_be_made(self) -> AlgorithmicConfig:
        for network in self.networks:
            if isinstance(network, TransformerConfig) and self.dim % network.heads:
                raise ValueError(f"dim={self.dim} must be a multiple of the transformer's heads={network.heads}")
        return self


class Cell(BaseModel, extra="forbid", frozen=True):
    """Exactly what determines a cell's figures."""

    task: TaskName
    network: NetworkConfig
    head: HeadConfig
    fraction: float
    seed: int
    epochs: int
    evaluate_every: int
    dim: int
    betas: tuple[float, float]
    lr: float
    weight_decay: float
    decay_rule: DecayRule

    def settings(self) -> dict[str, Any]:
        """Plain values, as JSON gives them back."""
        return {"version": VERSION, **self.model_dump(mode="json")}

    def key(self) -> str:
        """32 hexadecimal digits of its settings' SHA-256, the same on any machine."""
        return hashlib.sha256(json.dumps(self.settings(), sort_keys=True, allow_nan=False).encode()).hexdigest()[:32]

    def file(self, folder: Path) -> Path:
        """Where its figures are kept."""
        return folder / f"{self.key()}.json"
