"""The whole of a run's configuration, strict, and the checks that need no accelerator: see `configs/` for examples.

Derived values (accumulation, group size, learning rate) are functions here, not more options.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, model_validator

from common.carbon_intensity import grid_intensity
from common.errors import ConfigError
from common.fields import (
    MOST_STEPS,
    MOST_TOKENS,
    FilePath,
    NotNegative,
    PathText,
    Positive,
    Seconds,
    Seed,
    Steps,
)
from common.numbers import divisors, listed
from common.settings import read_tree, validate
from common.yaml_tree import to_yaml
from data.config import DataConfig
from model.config import DecoderConfig, HeadConfig
from pretrain.deepspeed_settings import DeepSpeedSettings

DIRTIEST = 1e4  # gCO2e per kWh; burning coal in an old station gives 1,500

# What the house sets in DeepSpeed's configuration, and where to set it instead.
OWNED_BY_US = {
    "train_batch_size": "train.tokens_per_step",
    "train_micro_batch_size_per_gpu": "train.micro_batch",
    "gradient_accumulation_steps": "train.tokens_per_step and train.micro_batch",
    "gradient_clipping": "optim.clip",
    "optimizer": "optim",
    "scheduler": "optim.schedule",
    "bf16": "train.precision",
    "fp16": "train.precision",
    "data_types": "nothing: gradients accumulate in float32",
    "zero_optimization.stage": "parallel.zero",
    "zero_optimization.round_robin_gradients": "nothing: it must stay off",
    "zero_optimization.memory_efficient_linear": "nothing: it must stay off",
    "zero_optimization.cpu_offload": "deepspeed.zero_optimization.offload_optimizer.device",
    "zero_optimization.cpu_offload_param": "deepspeed.zero_optimization.offload_param.device",
    "zero_optimization.cpu_offload_use_pin_memory": "deepspeed.zero_optimization.offload_optimizer.pin_memory",
    "managed_gradient_accumulation": "nothing: the engine counts",
}

OFFLOADS = {"optimizer": 1, "param": 3}  # what ZeRO can keep in host memory, and the least stage that shares it


class TrainConfig(BaseModel, extra="forbid", frozen=True):
    """How long a run trains, on how much at a time, and in which precision."""

    steps: Steps
    tokens_per_step: int = Field(gt=0, le=MOST_TOKENS)  # of the whole world, accumulation included
    micro_batch: int = Field(gt=0, le=MOST_TOKENS)  # sequences per rank and pass
    precision: Literal["bf16", "float32"] = "bf16"
    seed: Seed = 1  # of weights, order of samples, masks, dropout
    deterministic: bool = False  # bit for bit on GPUs too: see pretrain/runtime/deterministic.py


class OptimConfig(BaseModel, extra="forbid", frozen=True):
    """AdamW, warm-up, then a cosine, a plateau with a linear end (wsd), or a constant rate."""

    lr: Positive  # the highest
    min_lr: NotNegative = 0.0
    warmup_steps: int = Field(default=0, ge=0, le=MOST_STEPS)
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    decay_fraction: float = Field(default=0.2, gt=0, le=1)  # of the steps, for wsd
    betas: tuple[float, float] = (0.9, 0.95)
    eps: Positive = 1e-8
    weight_decay: NotNegative = 0.1  # of matrices; see also_decay
    also_decay: tuple[Literal["norms", "biases", "embeddings", "prototypes"], ...] = ()
    prototype_decay: NotNegative | None = None  # of prototypes; None: weight_decay if also_decay names them, else 0
    head_lr_scale: float = Field(
        default=1.0, ge=1e-6, le=1e6
    )  # times lr: the head's own rate, of prototypes, factor and exponent
    clip: Positive | None = 1.0  # of the global norm, trunk and prototypes together
    max_skipped: Steps = 10  # non-finite steps in a row that end the run

    @model_validator(mode="after")
    def _rates_fit(self) -> OptimConfig:
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr={self.min_lr} must not be above lr={self.lr}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas={self.betas} must lie in [0, 1)")
        return self

    @model_validator(mode="after")
    def _one_decay_of_prototypes(self) -> OptimConfig:
        if self.prototype_decay is not None and "prototypes" in self.also_decay:
            raise ValueError(
                f"prototype_decay={self.prototype_decay} and also_decay={list(self.also_decay)} both say how "
                "prototypes decay: take prototypes out of also_decay"
            )
        return self

    def decay_of(self, kind: str) -> float:
        """Weight decay of a kind of parameter: see `pretrain.optim.kind_of`."""
        if kind == "prototypes" and self.prototype_decay is not None:
            return self.prototype_decay
        return self.weight_decay if kind == "matrices" or kind in self.also_decay else 0.0

    def lr_at(self, step: int, steps: int) -> float:
        """Learning rate of the update `step` (the first is 0) of `steps`."""
        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps
        if self.schedule == "constant":
            return self.lr
        if self.schedule == "wsd":
            decay = max(1, round(self.decay_fraction * steps))
            return self.min_lr + (self.lr - self.min_lr) * min(1.0, max(0, steps - step) / decay)
        progress = min(1.0, (step - self.warmup_steps) / max(1, steps - self.warmup_steps))
        return self.min_lr + (self.lr - self.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


Share = Annotated[int, Field(gt=0, le=10**6)]


class ParallelConfig(BaseModel, extra="forbid", frozen=True):
    """How ranks share the prototypes (`vocab`) and the trunk (`zero`), and what they speak by."""

    vocab: Share | Literal["node", "world"] = "node"  # ranks that share one set of prototypes
    zero: Literal[0, 1, 2, 3] = 1  # ZeRO stage of the trunk
    backend: Literal["auto", "gloo"] = "auto"  # gloo, for tests: no NCCL, and ranks may share a GPU

    def vocab_ranks(self, world: int, ranks_per_node: int) -> int:
        """Ranks of a vocabulary group in a world of `world`."""
        ranks = self.vocab if isinstance(self.vocab, int) else {"world": world, "node": ranks_per_node}[self.vocab]
        if world % ranks:
            possible = listed(divisors(world), "none")
            raise ConfigError(
                f"parallel.vocab={self.vocab}: a vocabulary group of {ranks} ranks does not divide the world of "
                f"{world}. Possible here: {possible}, or world."
            )
        return ranks


class EvaluationConfig(BaseModel, extra="forbid", frozen=True):
    """When the held-out split is scored, and what follows from it."""

    every: Steps | None = None  # None: only at the end
    micro_batch: int | None = Field(default=None, gt=0, le=MOST_TOKENS)  # None: train.micro_batch
    patience: Steps | None = None  # evaluations in a row without a new best that end the run

    @model_validator(mode="after")
    def _patience_has_evaluations(self) -> EvaluationConfig:
        if self.patience is not None and self.every is None:
            raise ValueError(f"patience={self.patience} counts periodic evaluations: set every too")
        return self


STEP_S = 60.0  # that a job which is told to stop has for the step under way, beside checkpoint.grace_s


class CheckpointConfig(BaseModel, extra="forbid", frozen=True):
    """When checkpoints are written, which of them stay, and what follows if one cannot be written."""

    every: Steps | None = None  # None: only at the end and when told to stop
    keep: Steps = 2  # newest checkpoints that stay
    keep_every: Steps | None = None  # these stay for ever
    keep_best: bool = False  # the best on held-out data is saved, and stays
    on_failure: Literal["stop", "go on"] = "stop"  # when one cannot be written: exit 4, or train and try the next
    grace_s: Seconds = 30.0  # for the save, once told to stop; a long step needs more of it

    @property
    def stop_s(self) -> float:
        """Seconds from the signal that asks a job to stop to the end of what has not saved."""
        return self.grace_s + STEP_S


Wait = Annotated[Seconds, Field(ge=1)]
Beat = Annotated[Seconds, Field(ge=5)]


class TimeoutConfig(BaseModel, extra="forbid", frozen=True):
    """Seconds after which a rank that waits ends itself, and the job with it."""

    rendezvous_s: Wait = 300.0  # from a rank's start until all have met
    first_step_s: Wait = 1800.0  # from there to the end of the first step: loading, compiling
    collective_s: Wait = 300.0  # for a pass, with all its waiting for others
    save_s: Wait = 1800.0  # for a checkpoint
    heartbeat_s: Beat = 20.0  # without a sign of life of a rank, its host or the launcher


class EnergyConfig(BaseModel, extra="forbid", frozen=True):
    """A budget, and what turns joules into emissions and cost (docs/energy.md). Nothing is ever looked up."""

    stop_at_joules: Positive | None = None  # measured, of all phases
    target_loss: Positive | None = None  # nats per held-out token
    grid: float | str | None = None  # gCO2e per kWh, or a name of common/carbon_intensity.py
    price_per_kwh: NotNegative | None = None  # the cost is in its currency
    pue: float = Field(default=1.0, ge=1, le=100)  # energy of the site over that of its machines

    @model_validator(mode="after")
    def _grid_is_known(self) -> EnergyConfig:
        if self.grid is not None and not 0 <= grid_intensity(self.grid) <= DIRTIEST:
            raise ValueError(f"grid={self.grid} must be gCO2e per kWh: a number from 0 to {DIRTIEST:g}")
        return self


class LoggingConfig(BaseModel, extra="forbid", frozen=True):
    """How often a run records its training, and whether for TensorBoard too."""

    every: Steps = 10
    tensorboard: bool = True


class RunConfig(BaseModel, extra="forbid", frozen=True):
    """The whole configuration of a run, as its run folder's config.yaml holds it, resolved."""

    run: FilePath  # the run folder
    resume: PathText = "auto"  # auto, never, or the path of a checkpoint or run folder
    resume_check: Literal["full", "size"] = "full"  # hash every file, or only compare sizes
    resume_allow: tuple[str, ...] = ()  # settings (or sections) that may differ from the checkpoint's
    data: DataConfig
    model: DecoderConfig
    head: HeadConfig = Field(default_factory=HeadConfig)  # made late: its check brings torch
    train: TrainConfig
    optim: OptimConfig
    parallel: ParallelConfig = ParallelConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    timeouts: TimeoutConfig = TimeoutConfig()
    energy: EnergyConfig = EnergyConfig()
    logging: LoggingConfig = LoggingConfig()
    deepspeed: dict[str, Any] = {}  # settings for DeepSpeed itself: pretrain/deepspeed_settings.py

    @model_validator(mode="after")
    def _sections_agree(self) -> RunConfig:
        if self.model.vocab_size != self.data.tokenizer.vocab_size:
            raise ValueError(
                f"model.vocab_size={self.model.vocab_size} must equal data.tokenizer.vocab_size="
                f"{self.data.tokenizer.vocab_size}: leave the first one out"
            )
        if self.train.tokens_per_step % self.model.seq_len:
            raise ValueError(
                f"train.tokens_per_step={self.train.tokens_per_step} must be a multiple of "
                f"model.seq_len={self.model.seq_len}"
            )
        try:
            self.head.settings.check_width(self.model.dim)
        except ValueError as error:
            raise ValueError(f"head.params: {error}") from None
        if self.head.tied_sign is not None and not self.model.tied:
            raise ValueError(
                f"head.tied_sign={self.head.tied_sign} is of tied decoders: take it out, or set model.tied"
            )
        for key, ours in OWNED_BY_US.items():
            section: Any = self.deepspeed
            for part in key.split("."):
                section = section.get(part) if isinstance(section, dict) else None
            if section is not None:
                raise ValueError(f"deepspeed.{key} is set by Overtone itself: use {ours}")
        return self

    @model_validator(mode="after")
    def _offload_can_be_served(self) -> RunConfig:
        zero = self.deepspeed.get("zero_optimization")
        for what, least in OFFLOADS.items():
            given = zero.get(f"offload_{what}") if isinstance(zero, dict) else None
            key, section = f"deepspeed.zero_optimization.offload_{what}", given if isinstance(given, dict) else {}
            device = section.get("device", "none")
            if device == "nvme":
                raise ValueError(
                    f"{key}.device=nvme: checkpoints read weights and moments from memory, and DeepSpeed keeps them in "
                    "files of its own there. Use device: cpu, more GPUs, or a higher parallel.zero."
                )
            if device == "cpu" and self.zero_stage() < least:
                raise ValueError(
                    f"{key}.device=cpu needs parallel.zero={' or '.join(map(str, range(least, 4)))}, and it is "
                    f"{self.parallel.zero}: below, every rank needs all of that on its own device"
                )
        return self

    def zero_stage(self) -> int:
        """As it runs: bf16 at stage 0 runs as stage 1, as DeepSpeed 0.19's bf16 stage 0 begins with a phantom Adam
        step.
        """
        return max(self.parallel.zero, 1) if self.train.precision == "bf16" else self.parallel.zero

    def offloads(self, what: Literal["optimizer", "param"]) -> bool:
        """Whether ZeRO keeps the trunk's masters and moments (optimizer), or its weights (param), in host memory."""
        given = self.deepspeed.get("zero_optimization", {}).get(f"offload_{what}") or {}
        return bool(given.get("device") == "cpu")

    def hidden_length(self) -> float:
        """Of the decoder's first final states, as `model.decoder.Decoder` takes it: below 0, their sign is turned."""
        return self.head.hidden_length(self.model.dim) * (self.head.tied_sign or 1)

    def sequences_per_step(self) -> int:
        """Sequences of one update, of the whole world."""
        return self.train.tokens_per_step // self.model.seq_len

    def accumulation(self, world: int) -> int:
        """Passes per update on each of `world` ranks."""
        per_pass = self.train.micro_batch * self.model.seq_len * world
        if self.train.tokens_per_step % per_pass:
            raise ConfigError(
                f"train.tokens_per_step={self.train.tokens_per_step} must be a multiple of train.micro_batch x "
                f"model.seq_len x ranks = {self.train.micro_batch} x {self.model.seq_len} x {world} = {per_pass}. With "
                f"{world} ranks, micro_batch can be {_divisors(self.sequences_per_step(), world)}. With this "
                f"micro_batch, there can be {self._worlds()} ranks."
            )
        return self.train.tokens_per_step // per_pass

    def _worlds(self) -> str:
        """The possible numbers of ranks, in words; of many, the first and the last."""
        passes, left = divmod(self.sequences_per_step(), self.train.micro_batch)
        return listed([] if left else divisors(passes), "no number of")

    def lr_at(self, step: int) -> float:
        """Learning rate of the update `step` (the first is 0)."""
        return self.optim.lr_at(step, self.train.steps)

    def head_progress(self, step: int) -> float:
        """`HarmonicHead.progress` at the update `step` (the first is 0)."""
        return self.head.progress(step, self.train.steps)


def _divisors(sequences: int, world: int) -> str:
    if sequences % world:
        return f"nothing: {sequences} sequences cannot be shared by {world} ranks"
    return listed(divisors(sequences // world), "nothing")


def from_tree(tree: dict[str, Any], written: bool = False) -> RunConfig:
    """Checks plain values. `model.vocab_size` is the tokenizer's and may be left out. Raises ConfigError.

    `head.tied_sign` may be left out too: of a tied decoder it is -1. The residual stream carries the embedding of the
    token that was read to its end; tied, that is its prototype, so a token predicts itself at first. With the final
    states' sign turned, its own prototype is the farthest of all: benchmarks/results/tied-cpu.md.

    Args:
        written: by a run, which says all that there was to say then: what it leaves out came later.
    """
    with suppress(KeyError, TypeError):  # the sections' own checks will say what is missing
        given = tree["data"]["tokenizer"]["vocab_size"]
        tree = {**tree, "model": {"vocab_size": given, **tree["model"]}}
    with suppress(KeyError, TypeError, AttributeError):
        head = tree.get("head") or {}
        if tree["model"]["tied"] is True and head.get("tied_sign") is None:
            tree = {**tree, "head": {**head, "tied_sign": 1 if written else -1}}
    cfg = validate(RunConfig, tree)
    validate(DeepSpeedSettings, cfg.deepspeed, "deepspeed")
    return cfg


def load(path: str | Path, overrides: Sequence[str] = (), written: bool = False) -> RunConfig:
    """Reads and checks a config file with `key=value` overrides; `written`: a run's own. Raises ConfigError."""
    return from_tree(read_tree(path, list(overrides)), written)


def dump(cfg: RunConfig) -> str:
    """The resolved configuration as YAML; `load` gives the same configuration back."""
    return to_yaml(cfg.model_dump(mode="json"))


def check_layout(cfg: RunConfig, world: int, ranks_per_node: int) -> None:
    """Raises ConfigError if `world` ranks cannot run this configuration."""
    cfg.accumulation(world)
    cfg.parallel.vocab_ranks(world, ranks_per_node)


def check_data(cfg: RunConfig) -> None:
    """Raises ConfigError unless the prepared data are there and are those of this configuration."""
    from common.files import sha256_of
    from data.masking import mask_id  # numpy: not needed to read a config
    from data.shards import open_split

    given = cfg.data.tokenizer.model
    for name in ("train", "val"):
        split = open_split(cfg.data.path, name)
        if given is not None and (not given.is_file() or sha256_of(given) != split.tokenizer_sha256):
            raise ConfigError(
                f"data.tokenizer.model={given} is not the tokenizer that made the shards in {cfg.data.path}. Give "
                "that one, leave the setting out, or prepare into another data.path."
            )
        if split.vocab_size != cfg.model.vocab_size:
            raise ConfigError(
                f"the shards in {cfg.data.path} have a vocabulary of {split.vocab_size}, the config one of "
                f"{cfg.model.vocab_size}. Set data.tokenizer.vocab_size={split.vocab_size}, or prepare into another "
                "data.path."
            )
        if split.tokens < cfg.model.seq_len + (name == "train"):  # in training, a window's last token is only a target
            raise ConfigError(
                f"the {name} split in {cfg.data.path} has {split.tokens} tokens, fewer than one window of "
                f"model.seq_len={cfg.model.seq_len}. Prepare more text or use a smaller model.seq_len."
            )
    if not cfg.model.causal:
        mask_id(cfg.data.path)
