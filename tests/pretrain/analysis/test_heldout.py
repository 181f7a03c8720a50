"""Figures stand side by side where they are of one held-out text; what is not known to be the same stands apart."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from common.errors import ConfigError
from data.shards import open_split
from pretrain import evaluate, report
from pretrain.analysis.heldout import HeldOut, check_one_text, comparable, text_sha256
from pretrain.analysis.summary import summarise
from tests.support.ranks import run_ranks
from tests.support.records import read_records
from tests.support.tiny import run_to_end, tiny_config


def known(text: str | None, **others: Any) -> HeldOut:
    given = {"tokenizer_sha256": "t", "data_fingerprint": None, "objective": "causal", "scored": True, **others}
    return HeldOut(text, **given)


def test_runs_are_grouped_by_what_they_were_scored_on() -> None:
    found = {
        "a": known("x", data_fingerprint="1"),
        "b": known("y", data_fingerprint="2"),
        "c": known("x", tokenizer_sha256="u", data_fingerprint="3"),
        "old": known(None, data_fingerprint="2"),
        "unknown": known(None),
        "masked": known("x", objective="masked"),
        "unscored": known(None, scored=False),
        "older": known(None),
    }
    expected = [["a", "c", "unscored"], ["b", "old"], ["unknown"], ["masked"], ["older"]]
    assert comparable(found) == expected, "two of which nothing is known are not the same"
    assert comparable({"one": found["unscored"]}) == [["one"]]
    check_one_text({name: found[name] for name in ("a", "c", "unknown", "unscored")})
    for other in ("b", "masked"):
        with pytest.raises(ConfigError, match=f"a and {other} were scored on other held-out texts"):
            check_one_text({"a": found["a"], other: found[other]})


def check_other(base: Path) -> None:
    """A run on text with other letters, under the tokenizer of `small`."""
    from common.settings import validate
    from data.config import DataConfig
    from data.prepare import prepare

    turned = (base / "text.jsonl").read_text().translate(str.maketrans("as", "sa"))
    (base / "turned.jsonl").write_text(turned)
    data = {
        "path": str(base / "turned-data"),
        "source": {"kind": "files", "paths": [str(base / "turned.jsonl")]},
        "tokenizer": {"vocab_size": 290, "model": str(base / "small-data" / "tokenizer.model")},
        "val_fraction": 0.3,
    }
    prepare(validate(DataConfig, data), log=lambda _: None)
    run_to_end(tiny_config(run=str(base / "turned"), data=data, train__steps=2))


@pytest.fixture(scope="module")
def runs(english: Path) -> Path:
    run_ranks(check_other, 1, english, base=english)
    return english


def told(capsys: pytest.CaptureFixture, *arguments: object) -> str:
    capsys.readouterr()
    assert report.main([str(one) for one in arguments]) == 0
    return capsys.readouterr().out


@pytest.mark.slow
def test_an_evaluation_says_which_text_it_is_of_whatever_the_tokenizer(runs: Path, capsys: Any) -> None:
    found = {name: read_records(runs / name) for name in ("small", "large", "turned")}
    texts = {name: next(one for one in records if one["kind"] == "eval") for name, records in found.items()}
    assert texts["small"]["text_sha256"] == texts["large"]["text_sha256"] != texts["turned"]["text_sha256"]
    assert texts["small"]["tokenizer_sha256"] == texts["turned"]["tokenizer_sha256"]
    assert texts["small"]["data_fingerprint"] == open_split(runs / "small-data", "val").fingerprint
    capsys.readouterr()
    assert evaluate.main([str(runs / "large"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["text_sha256"] == texts["large"]["text_sha256"]
    split = open_split(runs / "small-data", "val")
    assert text_sha256(split, runs / "turned-data") == texts["small"]["text_sha256"], "the same tokenizer reads it"


@pytest.mark.slow
def test_texts_that_differ_get_tables_of_their_own(runs: Path, capsys: pytest.CaptureFixture) -> None:
    small, turned = runs / "small", runs / "turned"
    out = told(capsys, small, turned)
    assert "held-out figures do not compare" in out and out.count("held-out bits/byte") == 2
    first, second = out.split("held-out bits/byte")[1:]
    figures = [f"{summarise(run)['bits_per_byte']:.4f}" for run in (small, turned)]
    assert figures[0] in first.splitlines()[0] and figures[1] in second.splitlines()[0]
    assert json.loads(told(capsys, small, turned, "--json"))["comparable"] == [[str(small)], [str(turned)]]
    alone = told(capsys, small)
    assert "do not compare" not in alone and "held-out perplexity" in alone


@pytest.mark.slow
def test_two_tokenizers_of_one_text_share_a_table_of_bits_per_byte(runs: Path, capsys: pytest.CaptureFixture) -> None:
    out = told(capsys, runs / "small", runs / "large")
    assert out.count("held-out bits/byte") == 1 and "Their tokenizers differ: bits/byte compare" in out
    table = out.split("Their tokenizers differ")[0]
    assert "held-out perplexity" not in table and "final training loss" not in table
    assert json.loads(told(capsys, runs / "small", runs / "large", "--json"))["comparable"] == [
        [str(runs / "small"), str(runs / "large")]
    ]


def of_an_older_program(run: Path, to: Path, forget: bool = False) -> Path:
    """A copy of a run whose records do not say what it was scored on; nor its checkpoints, if they are to forget."""
    shutil.copytree(run, to)
    names = ("text_sha256", "tokenizer_sha256", "data_fingerprint")
    lines = [json.loads(line) for line in (to / "metrics.jsonl").read_text().splitlines()]
    kept = [{name: value for name, value in line.items() if name not in names} for line in lines]
    (to / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    if forget:
        shutil.rmtree(to / "checkpoints")
    return to


@pytest.mark.slow
def test_older_runs_are_known_by_their_data_or_not_at_all(runs: Path, tmp_path: Path, capsys: Any) -> None:
    small = of_an_older_program(runs / "small", tmp_path / "small")
    turned = of_an_older_program(runs / "turned", tmp_path / "turned")
    found = json.loads(told(capsys, runs / "large", small, turned, "--json"))
    assert found["comparable"] == [[str(runs / "large"), str(small)], [str(turned)]], "the data are still there"
    for run in (small, turned):
        config = (run / "config.yaml").read_text().replace(str(runs), str(tmp_path / "gone"))
        (run / "config.yaml").write_text(config)
    found = json.loads(told(capsys, runs / "small", small, turned, "--json"))
    assert found["comparable"] == [[str(runs / "small"), str(small)], [str(turned)]], "by the data's fingerprint"
    lost = of_an_older_program(runs / "small", tmp_path / "lost", forget=True)
    out = told(capsys, runs / "small", lost)
    assert "held-out text unknown" in out and out.count("held-out bits/byte") == 2
