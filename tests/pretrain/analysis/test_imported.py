"""A run on tokens that nanoGPT prepared, whose text nobody knows: trained, scored and reported without bits/byte."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from data.nanogpt import EOS, VOCAB_SIZE, import_nanogpt
from pretrain.config import RunConfig
from pretrain.evaluate import main as evaluate
from pretrain.report import main as report
from tests.support.ranks import run_ranks
from tests.support.records import read_records
from tests.support.tiny import T, run_to_end, tiny_config


def config(base: Path) -> RunConfig:
    source = {"data__source": {"kind": "prepared"}, "data__tokenizer__vocab_size": VOCAB_SIZE}
    return tiny_config(run=str(base / "run"), data__path=str(base / "data"), train__steps=2, logging__every=1, **source)


def check_run(base: Path) -> tuple[int, int]:
    from pretrain.runtime import ranks as process

    process.stop = lambda: None  # the tests' own group
    run_to_end(config(base))
    return evaluate([str(base / "run"), "--json"]), evaluate([str(base / "run"), "--text", __file__])


@pytest.mark.slow
def test_a_run_on_imported_tokens(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    stream = np.random.default_rng(1).integers(0, EOS, size=800, dtype=np.uint16)
    stream[60::70] = EOS
    (tmp_path / "bins").mkdir()
    for split, ids in (("train", stream), ("val", stream[:100])):
        ids.astype("<u2").tofile(tmp_path / "bins" / f"{split}.bin")
    import_nanogpt(tmp_path / "bins", tmp_path / "data", log=lambda _: None)
    assert run_ranks(check_run, 1, tmp_path, base=tmp_path) == [(0, 2)]
    told = capfd.readouterr()
    assert '"bits_per_byte": null' in told.out and "imported as tokens" in told.err
    held_out = [record for record in read_records(tmp_path / "run") if record["kind"] == "eval"]
    assert held_out[-1]["bits_per_byte"] is None and 0 < math.log(held_out[-1]["perplexity"]) < 2 * math.log(VOCAB_SIZE)
    assert held_out[-1]["tokens"] > 10 * T
    assert report([str(tmp_path / "run")]) == 0
