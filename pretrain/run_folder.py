"""A run folder: what is in it, under which names, and how it is opened.

Light until something is opened: torch and pydantic come with the first method that needs them, so that launchers and
help do without.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

from common.errors import ConfigError
from pretrain import records
from pretrain.checkpoints import folder as checkpoints
from pretrain.checkpoints import traces
from pretrain.records import Kind, Lines
from pretrain.runtime import endings

if TYPE_CHECKING:
    from pretrain.config import RunConfig
    from pretrain.inference import Model
    from pretrain.runtime.ranks import Ranks

Result = TypeVar("Result")

CONFIG = "config.yaml"  # resolved
METRICS = "metrics.jsonl"  # the records
INTERPRETED = "interpret.json"  # the figures of `report --interpret`
MEASURED = "measured.json"  # those of a study
DOCUMENTS = "documents"  # begins the names of files with an evaluation by document


@dataclass
class RunFolder:
    """The folder `path` of a run, which need not be there yet, and what stands in it under which name."""

    path: Path

    def __post_init__(self) -> None:
        self.config = self.path / CONFIG
        self.metrics = self.path / METRICS
        self.checkpoints_folder = self.path / checkpoints.CHECKPOINTS
        self.exit_record = self.path / endings.EXIT_RECORD
        self.interpreted = self.path / INTERPRETED
        self.measured = self.path / MEASURED

    def documents(self, split: str, checkpoint: Path) -> Path:
        """The file with a checkpoint's figures by document of a split, as `scored_documents` keeps them."""
        return self.path / f"{DOCUMENTS}-{split}-{checkpoint.name}.npz"

    @classmethod
    def containing(cls, path: Path) -> RunFolder:
        """The run folder that `path` is, or that the checkpoint `path` is of. Raises ConfigError if it is neither."""
        for place in (Path(os.path.abspath(path)), path.resolve()):  # a link may stand in a run, or lead to one
            run = cls(place.parent.parent if os.path.exists(place / checkpoints.MANIFEST) else place)
            if os.path.exists(run.config):
                return run
        raise ConfigError(f"{place}: neither a run folder nor a checkpoint of one (there is no {run.config})")

    @classmethod
    def trained(cls, path: Path) -> RunFolder:
        """The folder of a run that has begun. Raises ConfigError."""
        run = cls(path)
        if not os.path.exists(run.config) or not os.path.lexists(run.metrics):
            raise ConfigError(f"{path}: not a run folder (no {CONFIG} and {METRICS} in it); give one that was trained")
        return run

    def settings(self, overrides: Sequence[str] = ()) -> RunConfig:
        """The run's resolved configuration, with `key=value` overrides. Raises ConfigError."""
        from pretrain.config import load

        return load(self.config, overrides)

    def records(self, model: type[Kind]) -> list[Kind]:
        """Those of a kind (`Record`: all) in their order; none if the run has left none. Raises ConfigError."""
        return records.of_kind(self.lines().records, model)

    def lines(self) -> Lines:
        """All that metrics.jsonl holds, and what is wrong with it, which is warned of. Raises ConfigError."""
        return records.read(self.metrics)

    def exit(self) -> endings.Exit | None:
        """How its last job ended; None if none did, or it did not tell."""
        return endings.read_exit(self.path)

    def check_resume(self, resume: str) -> None:
        """Raises ConfigError if the setting `resume` asks for what is not there, or forbids what is."""
        folder = self.checkpoints_folder
        if resume in ("auto", "never"):
            traces.check_place(folder)
        traces.check_resume(folder, resume, checkpoints.to_resume(folder, resume))

    def checkpoints(self) -> list[Path]:
        """Those that were published, oldest first, whole or not."""
        return checkpoints.checkpoints(self.checkpoints_folder)

    def checkpoint(self, path: Path | None = None, ranks: Ranks | None = None) -> Path:
        """The newest whole checkpoint, or `path` if that is one, to evaluate it. With `ranks`, all of them call it.

        Raises:
            ConfigError: there is none, or none is whole.
        """
        from pretrain.checkpoints.resume import find

        asked = "auto" if self._is_own(path) else os.path.abspath(str(path))
        found = find(self.checkpoints_folder, asked, ranks, moments=False)
        if found is None:
            raise ConfigError(f"{self.path}: there is no checkpoint in it yet; train it first")
        return found

    def _is_own(self, path: Path | None) -> bool:
        return path is None or path.resolve() == self.path.resolve()

    def read(self, work: Callable[[Path], Result], path: Path | None = None, ranks: Ranks | None = None) -> Result:
        """What `work` makes of the newest whole checkpoint, or of `path` if that is one. Collective.

        The run may train meanwhile: it leaves the checkpoint alone until `work` is done. Where the file system has no
        locks that tell it so, and the newest one vanishes, `work` is called again with the next.

        Raises:
            ConfigError: as `checkpoint`; Vanished: the one that was asked for was deleted while it was read.
        """
        from pretrain.checkpoints.reading import again, held_by_all

        def once() -> Result:
            checkpoint = self.checkpoint(path, ranks)
            with held_by_all(checkpoint, ranks):
                return work(checkpoint)

        return again(once) if self._is_own(path) else once()

    def open_model(
        self,
        checkpoint: Path | None = None,
        *,
        data: Path | None = None,
        ranks: Ranks | None = None,
        precision: Literal["bf16", "float32"] | None = None,
    ) -> Model:
        """A checkpoint's decoder and head, for evaluation. Collective.

        Args:
            checkpoint: None: the newest whole one.
            data: the prepared folder whose ids it is to read; None: the run's own.
            ranks: the layout; None: this process alone, without compilation, which a few passes are not worth.
            precision: None: that of training.
        Raises:
            ConfigError: no whole checkpoint, no data, data of another tokenizer than the run's, or a weight that is not
                finite.
        """
        from data.manifest import read_manifest
        from pretrain.inference import load_model
        from pretrain.runtime.ranks import alone

        cfg = self.settings()
        manifest = read_manifest(data or cfg.data.path)
        if ranks is None:
            ranks = alone()
            cfg = cfg.model_copy(update={"model": cfg.model.model_copy(update={"compile": False})})
        if precision is not None:
            cfg = cfg.model_copy(update={"train": cfg.train.model_copy(update={"precision": precision})})
        layout, tokenizer, eos_id = ranks, manifest["tokenizer_sha256"], manifest["eos_id"]
        if checkpoint is not None:
            return load_model(checkpoint, cfg, tokenizer, eos_id, layout)
        return self.read(lambda newest: load_model(newest, cfg, tokenizer, eos_id, layout), ranks=ranks)


def settings_if_any(path: Path, overrides: Sequence[str] = ()) -> RunConfig | None:
    """The configuration of a run folder or checkpoint, for what has to be set before the ranks meet; None if it cannot
    be read, which they say together.
    """
    try:
        return RunFolder.containing(path).settings(overrides)
    except ConfigError:
        return None
