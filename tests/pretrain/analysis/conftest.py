"""What tests of several analyses look at."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.support.ranks import run_ranks
from tests.support.tiny import run_to_end, tiny_config

WORDS = "the model reads a page of plain words and says what comes next because it has seen such pages before"


@pytest.fixture(scope="module")
def english(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs on the same text under two tokenizers, `small` and `large`."""
    base = tmp_path_factory.mktemp("english")
    draw = np.random.default_rng(0)
    lines = [json.dumps({"text": " ".join(draw.choice(WORDS.split(), 60)) + " \u2581 caf\u00e9"}) for _ in range(60)]
    (base / "text.jsonl").write_text("\n".join(lines))
    run_ranks(check_english, 1, base, base=base)
    return base


def check_english(base: Path) -> None:
    from common.settings import validate
    from data.config import DataConfig
    from data.prepare import prepare

    for name, vocab_size in (("small", 290), ("large", 330)):
        data = {
            "path": str(base / f"{name}-data"),
            "source": {"kind": "files", "paths": [str(base / "text.jsonl")]},
            "tokenizer": {"vocab_size": vocab_size},
            "val_fraction": 0.3,
        }
        prepare(validate(DataConfig, data), log=lambda _: None)
        run_to_end(tiny_config(run=str(base / name), data=data, train__steps=2))
