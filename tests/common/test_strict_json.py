"""What is written as JSON is JSON: numbers that are not finite are null, in files and on standard output."""

from __future__ import annotations

import ast
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common import strict_json
from common.errors import ConfigError
from common.exits import EXIT_DIVERGED
from common.strict_json import from_json, plain, to_json
from pretrain.analysis.scoring import Evaluation
from pretrain.config import dump, load
from pretrain.energy.sustainability import learning_stability, to_target
from pretrain.recorder import Recorder
from pretrain.records import Eval, Train
from pretrain.replay import _distance
from pretrain.report import main as report
from pretrain.run_folder import RunFolder
from pretrain.study import records as studied
from tests.support.ranks import run_ranks
from tests.support.records import read_records
from tests.support.tiny import make_data, tiny_config

FOLDERS = ("model", "pretrain", "launch", "benchmarks")


def strict(text: str) -> Any:
    """As readers do that know no NaN."""

    def refuse(name: str) -> Any:
        raise AssertionError(f"{name} is no JSON: {text[:200]}")

    return json.loads(text, parse_constant=refuse)


def test_numbers_that_are_not_finite_are_null_wherever_they_are() -> None:
    tree = {"a": math.nan, "b": [1.5, -math.inf, (2, math.inf, {"c": math.nan})], "d": "NaN", "e": True}
    expected = {"a": None, "b": [1.5, None, [2, None, {"c": None}]], "d": "NaN", "e": True}
    assert plain(tree) == strict(to_json(tree)) == strict(to_json(tree, indent=1)) == expected
    assert from_json('{"loss": NaN, "norms": [Infinity, -Infinity, 1.0]}') == {"loss": None, "norms": [None, None, 1.0]}


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "not valid JSON"),
        (b'{"a": 1', "not valid JSON"),
        (b'{"a": 1} x', "not valid JSON"),
        (b"\xff", "can't decode byte"),
        (b"[" * 100_000, "nested more than 64 deep"),
        (b"[" * 65 + b"]" * 65, "nested more than 64 deep"),
        (b'{"a": 1, "a": 2}', "the key 'a' is there twice"),
        (b"[NaN]", "NaN is no finite number"),
        (b"[1e999]", "1e999 is no finite number"),
        (b"9" * 5000, "Exceeds the limit"),
        (rb'["\ud800"]', "a text holds the character"),
        (rb'{"a\u0000b": 1}', "a text holds the character"),
    ],
)
def test_what_others_may_have_written_is_read_strictly(content: bytes, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        strict_json.strict(content)


def test_what_may_be_read_is_what_was_written() -> None:
    tree: dict[str, Any] = {"a": [1, -2.5, None, True, "é🙂"], "b": {"c": 2**64 - 1}, "d": [[]] * 3}
    assert strict_json.strict(json.dumps(tree)) == strict_json.strict(to_json(tree, indent=1).encode()) == tree
    assert strict_json.strict(b"[" * 64 + b"]" * 64)


def writers(source: str) -> list[int]:
    """Lines with a call of `json.dump` or `json.dumps` that does not say allow_nan=False."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    found = []
    for call in calls:
        name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
        told = any(k.arg == "allow_nan" and ast.unparse(k.value) == "False" for k in call.keywords)
        if name in ("dump", "dumps") and not told and "json" in ast.unparse(call.func):
            found.append(call.lineno)
    return found


@pytest.mark.parametrize("path", [p for folder in FOLDERS for p in sorted(Path(folder).rglob("*.py"))], ids=str)
def test_nothing_is_written_that_json_has_not(path: Path) -> None:
    assert not writers(path.read_text())


def test_the_walk_sees_writers() -> None:
    assert writers("import json\njson.dumps(x)\n") == [2] and writers("json.dump(x, f, allow_nan=True)") == [1]
    assert not writers("json.dumps(x, allow_nan=False)")


def check_diverged(base: Path) -> None:
    changes = {"optim__lr": 1e30, "optim__clip": None, "optim__max_skipped": 2, "head__distance": "dot"}
    cfg = tiny_config(
        run=str(base / "run"), data__path=str(base / "data"), evaluation__every=1, logging__every=1, **changes
    )
    from pretrain.opening import open_run
    from pretrain.runtime import ranks as process

    run = open_run(cfg, process.start())
    assert run.train().code == EXIT_DIVERGED
    run.close()


@pytest.mark.slow
def test_a_run_that_diverges_leaves_json_and_can_be_reported(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    make_data(tmp_path / "data")
    run_ranks(check_diverged, 1, tmp_path, base=tmp_path)
    records = [strict(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    lost = [one for one in records if one["kind"] == "train" and one["skipped"]]
    assert lost and all(one["loss"] is None and one["loss_mean"] is None and one["losses"] == [None] for one in lost)
    assert read_records(tmp_path / "run") == records
    for state in (tmp_path / "run").glob("checkpoints/*/*.json"):
        strict(state.read_text())
    assert report([str(tmp_path / "run"), "--json", "--energy", "target_loss=1.0"]) == 0
    assert strict(capsys.readouterr().out)["runs"][str(tmp_path / "run")]["loss"] is None
    assert report([str(tmp_path / "run"), "--energy", "target_loss=1.0"]) == 0


NOT_FINITE = {
    "optim.clip=.inf": "optim.clip: given inf",
    "optim.lr=1e999": "optim.lr: given inf",
    "head.params={p: -.inf}": "head.params.p: given -inf",
    "deepspeed={a: [.nan]}": "deepspeed.a.0: given nan",
}


@pytest.mark.parametrize("setting", NOT_FINITE)
def test_settings_that_are_not_finite_are_refused(setting: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(dump(tiny_config()))
    with pytest.raises(ConfigError, match=f"^{NOT_FINITE[setting]}; expected a finite number"):
        load(tmp_path / "config.yaml", [setting])


def test_a_loss_that_is_not_finite_reaches_no_target_and_is_no_rise() -> None:
    records = [Eval(step=1, seconds=1.0, loss=None), Eval(step=2, seconds=1.0, loss=2.0)]
    found = to_target(records, 2.5)
    assert found is not None and found["step"] == 2 and to_target(records[:1], 2.5) is None
    assert learning_stability([None] * 3, [2.0, None, 2.5, 1.0])["largest_rise"] == 0.5
    assert learning_stability([None] * 3, [None, 2.0])["rises"] is None


def test_a_logged_loss_of_null_is_repeated_by_one_that_is_not_finite() -> None:
    assert _distance(math.nan, math.nan) == _distance(math.inf, math.nan) == 0.0
    assert _distance(1.0, math.nan) == _distance(math.nan, 1.0) == math.inf and _distance(1.5, 1.0) == 0.5


def test_a_loss_beyond_what_a_float_holds_has_no_perplexity() -> None:
    one = np.array([1])
    found = Evaluation(np.array([710.0]), one, one, one)
    assert found.perplexity == math.inf and strict(to_json(found.as_dict()))["perplexity"] is None


def test_a_study_counts_a_run_with_such_a_held_out_loss_as_diverged(tmp_path: Path) -> None:
    cfg = tiny_config(run=str(tmp_path))
    (tmp_path / "exit.json").write_text('{"code": 0}')
    for loss, expected in (("NaN", studied.DIVERGED), ("null", studied.DIVERGED), ("2.5", studied.DONE)):
        record = f'{{"kind": "eval", "step": 3, "seconds": 1.0, "loss": {loss}, "bits_per_byte": {loss}}}'
        (tmp_path / "metrics.jsonl").write_text(record)
        assert studied.outcome(cfg) == expected


def test_records_of_an_older_program_become_json_when_a_run_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    rows = [(1, "NaN"), (2, "Infinity")]
    path.write_text("".join(f'{{"kind": "train", "step": {k}, "seconds": 1.0, "loss": {loss}}}\n' for k, loss in rows))
    recorder = Recorder(RunFolder(tmp_path), 2, 5, tensorboard=True)
    recorder.record(Train(step=2, seconds=1.0, loss=math.nan, lr=math.inf, losses=(math.nan,)))
    recorder.close()
    assert [strict(line).get("loss") for line in path.read_text().splitlines()] == [None, None, None]
