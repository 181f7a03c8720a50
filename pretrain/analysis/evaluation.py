"""Held-out scores of a run: what is scored with what, whether two runs are scored on the same documents.

The number is the true negative log-likelihood: no smoothing, no clamp.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from common.errors import ConfigError
from common.files import replacing, sha256_of
from data.loader import EvaluationWindows
from data.manifest import check_tokenizer, read_manifest
from data.shards import open_split
from data.texts import Texts
from data.vocabulary import open_tokenizer
from pretrain.analysis.heldout import documents_of, tokens_of
from pretrain.analysis.scoring import Evaluation, evaluate, scoring
from pretrain.checkpoints.folder import MANIFEST
from pretrain.config import RunConfig
from pretrain.inference import Model
from pretrain.run_folder import RunFolder
from pretrain.runtime.ranks import Ranks, alone


@dataclass(frozen=True)
class Task:
    """What is to be scored with what, opened and found to fit; no weight was read yet."""

    path: Path  # of the run or checkpoint
    cfg: RunConfig
    folder: Path  # prepared data; their tokenizer reads texts
    tokenizer_sha256: str | None  # None: imported tokens
    windows: EvaluationWindows


def open_task(
    path: Path, split: str = "val", data: Path | None = None, texts: Sequence[Path] = (), stride: int | None = None
) -> Task:
    """Opens a run's configuration and a split of its data (or of another folder's, or text files), cheaply.

    Raises:
        ConfigError: no such run or data, a vocabulary or tokenizer that does not fit, a split without a window.
    """
    cfg = RunFolder.containing(path).settings()
    folder = data or cfg.data.path
    check_tokenizer(folder, read_manifest(folder))
    opened = Texts(texts, open_tokenizer(folder)) if texts else open_split(folder, split)
    if opened.vocab_size != cfg.model.vocab_size:
        raise ConfigError(
            f"{folder} has a vocabulary of {opened.vocab_size}, {path} one of {cfg.model.vocab_size}; "
            "give data that were prepared with the run's tokenizer"
        )
    if stride is not None and not cfg.model.causal:
        raise ConfigError(f"{path} is a masked model, which sees both sides of a token: it takes no stride")
    windows = EvaluationWindows(opened, cfg.model.seq_len, stride)
    return Task(path, cfg, folder, opened.tokenizer_sha256, windows)


def run_task(task: Task, ranks: Ranks) -> tuple[Evaluation, Path]:
    """Scores a task in the layout that `ranks` describe; returns the checkpoint too. Collective. Raises ConfigError."""
    run = RunFolder.containing(task.path)

    def opened(checkpoint: Path) -> tuple[Model, Path]:
        return run.open_model(checkpoint, data=task.folder, ranks=ranks), checkpoint

    model, checkpoint = run.read(opened, task.path, ranks)
    micro_batch = task.cfg.evaluation.micro_batch or task.cfg.train.micro_batch
    score = scoring(model.score, task.cfg.model, task.folder)
    return evaluate(score, task.windows, micro_batch, ranks), checkpoint


def scored_documents(path: Path, split: str = "val") -> Evaluation:
    """Scores a run's newest whole checkpoint, or the checkpoint `path`, on a split of the run's own data, by document,
    in this process alone. What it came to is kept in the run folder for each split and checkpoint, and read from there
    the next time.

    Raises:
        ConfigError: as `open_task`, or no checkpoint is whole.
    """
    run = RunFolder.containing(path)
    task = open_task(path, split)
    checkpoint = run.checkpoint(path)
    known = _kept(run.documents(split, checkpoint), _scored_with(task, checkpoint))
    if known is not None:
        return known
    result, checkpoint = run_task(task, alone())
    with replacing(run.documents(split, checkpoint)) as draft, draft.open("wb") as stream:
        np.savez(stream, scored_with=np.array(_scored_with(task, checkpoint)), **vars(result))
    return result


def _scored_with(task: Task, checkpoint: Path) -> str:
    """What tells the figures of one checkpoint on one split from all others, though names be the same."""
    data = read_manifest(task.folder)["fingerprint"]
    return f"{task.windows.split.name} of {data} by {sha256_of(checkpoint / MANIFEST)}"


def _kept(file: Path, scored_with: str) -> Evaluation | None:
    """What `scored_documents` kept; None if it kept nothing, something else, or what cannot be read any more."""
    try:
        with np.load(file, allow_pickle=False) as found:
            if str(found["scored_with"]) == scored_with:
                return Evaluation(**{field.name: found[field.name] for field in fields(Evaluation)})
    except (OSError, ValueError, KeyError, EOFError, BadZipFile):
        pass
    return None


def by_source(task: Task, result: Evaluation) -> dict[str, Evaluation]:
    """The result of each source by its name, without those that have no document; empty where the data know of one."""
    split = task.windows.split
    if len(split.sources) < 2:
        return {}
    of_document = split.document_sources()
    parts = {name: result.of(of_document == number) for number, name in enumerate(split.sources)}
    return {name: part for name, part in parts.items() if len(part.nats)}


def check_same_documents(a: Task, b: Task) -> None:
    """Raises ConfigError unless both tasks score the same texts, document by document.

    With one tokenizer, tokens are compared; with two, what they decode to, which is the text itself for tokenizers with
    byte fallback, as all are that this program trains.
    """
    first, second = a.windows.split, b.windows.split
    refusal = f"{a.path} and {b.path} cannot be compared"
    if a.cfg.model.causal != b.cfg.model.causal:
        raise ConfigError(f"{refusal}: a masked model's pseudo-likelihood is no likelihood")
    if (first.document_bytes() < 0).any():
        raise ConfigError(f"{refusal}: the bytes of their documents are not known, so there are no bits/byte")
    if first.documents != second.documents or (first.document_bytes() != second.document_bytes()).any():
        raise ConfigError(
            f"{refusal}: their data have {first.documents} and {second.documents} documents, or documents of other "
            "lengths; give the data of one of them (--data), or text files (--text)"
        )
    texts: list[Iterator[str | bytes]] = [
        _contents(task, decoded=a.tokenizer_sha256 != b.tokenizer_sha256) for task in (a, b)
    ]
    for number, (mine, theirs) in enumerate(zip(*texts, strict=True)):
        if mine != theirs:
            raise ConfigError(
                f"{refusal}: document {number} is another text in the one than in the other (or a tokenizer without "
                "byte fallback does not give its text back); give the data of one of them (--data), or text files "
                "(--text)"
            )


def _contents(task: Task, decoded: bool) -> Iterator[str | bytes]:
    """What tells documents apart, one after the other: bytes of their tokens, or their text."""
    if decoded:
        return documents_of(task.windows.split, open_tokenizer(task.folder))
    return (tokens.tobytes() for tokens in tokens_of(task.windows.split))
