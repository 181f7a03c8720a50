"""A corpus of 400 short documents, its settings, and runs on it that are killed."""

import hashlib
import json
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from common.settings import validate
from data import writing
from data.config import DataConfig
from data.manifest import read_manifest
from data.shards import open_split
from data.tokenizer import Tokenizer

ROOT = Path(__file__).parents[2]
WORDS = "harmonic loss measures the distance between a hidden state and every prototype of vocabulary"


def text(number: int) -> str:
    random = np.random.default_rng(number)
    return " ".join(random.choice(WORDS.split(), size=40)) + f" {number}.\n"


TEXTS = [text(number) for number in range(400)]


def write_corpus(path: Path, texts: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def settings(tmp_path: Path, **changes: Any) -> dict[str, Any]:
    return {
        "path": str(tmp_path / "prepared"),
        "source": {"kind": "files", "paths": [str(tmp_path / "corpus.jsonl")]},
        "tokenizer": {"vocab_size": 350},
        "shard_tokens": 2000,
        "val_fraction": 0.1,
        **changes,
    }


def config(tmp_path: Path, **changes: Any) -> DataConfig:
    return validate(DataConfig, settings(tmp_path, **changes))


def quiet(line: str) -> None:
    pass


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def decoded(folder: Path, split: str) -> list[str]:
    tokenizer, data = Tokenizer(folder / "tokenizer.model"), open_split(folder, split)
    bounds = [*data.document_starts().tolist(), data.tokens]
    return [
        tokenizer.decode(data.read(start, end - start - 1).tolist())
        for start, end in zip(bounds[:-1], bounds[1:], strict=True)
    ]


def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that shows a second more for each document, so that there are many commits."""
    ticks = count()
    monkeypatch.setattr(writing, "time", SimpleNamespace(monotonic=lambda: float(next(ticks))))


def assert_same(one: Path, other: Path) -> None:
    """All files but the manifest are equal to the byte, and the manifest but for where the text was."""
    assert names(one) == names(other)
    for name in set(names(one)) - {"manifest.json"}:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    manifests = [{**read_manifest(folder), "inputs": None, "settings": None} for folder in (one, other)]
    assert manifests[0] == manifests[1]


def held_out(text: str, fraction: float) -> bool:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64 < fraction


class Killed(BaseException):
    pass


def killed_at(monkeypatch: pytest.MonkeyPatch, *places: int) -> None:
    """Runs end before they take these documents, counted over all runs."""
    taken, inner = count(), writing.Writing.take

    def take(*given: Any) -> None:
        if next(taken) in places:
            raise Killed
        inner(*given)

    monkeypatch.setattr(writing.Writing, "take", take)
