"""`python -m pretrain.study`: a matched grid, trained once, measured, compared seed by seed."""

from __future__ import annotations

import csv
import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from common.errors import ConfigError
from common.exits import EXIT_DIVERGED, EXIT_PREEMPTED
from common.settings import read_tree, validate
from model.config import HeadConfig
from pretrain.config import load
from pretrain.records import Eval, Record, Train
from pretrain.runtime.endings import EXIT_RECORD, leave_exit
from pretrain.study import grid
from pretrain.study.__main__ import main
from pretrain.study.grid import Cell, LanguageConfig
from tests.support.pages import Tree
from tests.support.ranks import run_ranks
from tests.support.records import read_records
from tests.support.tiny import make_text, outcome_of, text_config

SHAPE = ("pca90", "effective_rank", "first_2", "displacement_pca90", "hidden_pca90", "start_share")


def tree(folder: Path, **changes: Any) -> dict[str, Any]:
    """A study of two heads, two rates and two seeds on the text of `make_text(folder / "data")`."""
    usual = {"train__steps": 3, "evaluation__every": 1, "logging__every": 1, "train__micro_batch": 4}
    run = text_config(folder, **usual).model_dump(mode="json", exclude={"run": True, "head": True})
    del run["train"]["seed"], run["optim"]["lr"], run["optim"]["min_lr"]
    return {
        "kind": "language",
        "title": "two heads",
        "out": str(folder / "study"),
        "baseline": "softmax",
        "heads": {"softmax": {"distance": "dot"}, "cosine": {"distance": "cosine"}},
        "lrs": [0.001, 0.01],
        "seeds": [1, 2],
        "base": run,
        **changes,
    }


def study(folder: Path, **changes: Any) -> LanguageConfig:
    return validate(LanguageConfig, tree(folder, **changes))


def check_run(config: Path) -> None:
    cfg = load(config)
    ended = outcome_of(cfg)
    leave_exit(cfg.run, "of the tests", ended.code, ended.reason, ended.step)


@pytest.fixture
def launched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the runs that a study launches; one rank of the tests trains them instead."""
    names: list[str] = []

    def start(config: Path, options: list[str]) -> int:
        names.append(config.stem)
        run_ranks(check_run, 1, tmp_path, config=config)
        return 0

    monkeypatch.setattr(grid, "start", start)
    make_text(tmp_path / "data")
    return names


def asked(folder: Path, **changes: Any) -> str:
    """A study's file."""
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(tree(folder, **changes), sort_keys=False))
    return str(path)


@pytest.mark.slow
def test_a_study_from_the_grid_to_the_page(tmp_path: Path, launched: list[str], capsys: Any) -> None:
    assert main([asked(tmp_path)]) == 0
    sweep = [f"{head}-lr{lr}-seed1" for lr in ("0.001", "0.01") for head in ("softmax", "cosine")]
    found = json.loads((tmp_path / "study" / "results.json").read_text())
    rates = {head["name"]: head["lr"] for head in found["heads"]}
    assert launched[:4] == sweep and len(set(launched)) == len(launched)
    assert {f"{head}-lr{lr:g}-seed2" for head, lr in rates.items()} <= set(launched[4:])

    def held_out(head: str, lr: float, seed: int) -> list[float]:
        run = tmp_path / "study" / "runs" / Cell(head, lr, seed).name
        return [record["bits_per_byte"] for record in read_records(run) if record["kind"] == "eval"]

    softmax, cosine = found["heads"]
    for head in (softmax, cosine):
        ends = {lr: held_out(head["name"], lr, 1)[-1] for lr in (0.001, 0.01)}
        assert head["lr_at_edge"]
        assert [one["bits_per_byte"] for one in head["sweep"][:2]] == list(ends.values())
        assert head["bits_per_byte"]["values"] == pytest.approx(
            [held_out(head["name"], head["lr"], s)[-1] for s in (1, 2)]
        )
        assert head["started"] == sum(head["name"] in name for name in launched)
        assert (head["diverged"], head["seeds"]) == (0, [1, 2])
        assert [point["bits_per_byte"] for point in head["eval_curve"]] == held_out(head["name"], head["lr"], 1)
        assert [point["tokens"] for point in head["train_curve"]] == [256, 512, 768]
        assert head["scree"][-1] == pytest.approx(1) and len(head["scree"]) == 32
        assert len(head["projection"]["points"]) == 300 and head["tokens_per_s"] > 0
        assert head["j_per_token"] is None and head["train_curve"][-1]["joules"] is None
    assert softmax["difference"] is None and "no GPU" in found["not_measured"]["gpu"]
    apart = [one - other for one, other in zip(*(h["bits_per_byte"]["values"] for h in (cosine, softmax)), strict=True)]
    told = cosine["difference"]
    assert told["values"] == pytest.approx(apart, abs=1e-6) and told["low"] < told["mean"] < told["high"]
    assert told["mean"] == pytest.approx(sum(apart) / 2, abs=1e-6)
    assert told["documents_low"] < told["mean"] < told["documents_high"]
    with (tmp_path / "study" / "results.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [row["outcome"] for row in rows] == ["done"] * len(launched)
    assert sum(row["chosen"] == "True" for row in rows) == 4
    for row in rows:
        assert all(bool(row[name]) == (row["chosen"] == "True") for name in SHAPE)
        assert bool(row["less_baseline"]) == (row["chosen"] == "True" and row["head"] == "cosine")
    assert [float(row["less_baseline"]) for row in rows if row["less_baseline"]] == pytest.approx(told["values"])
    assert (softmax["exponent"], cosine["exponent"]) == (None, "sqrt_dim")
    page = Tree((tmp_path / "study" / "study.html").read_text())
    assert page.row("softmax").startswith("softmax 0.0") and page.row("cosine").startswith("cosine exponent sqrt_dim")
    assert not re.search(r"\d\.\d{7}", page.text), "a figure that nobody rounded"
    assert "cosine" in capsys.readouterr().out

    before = (tmp_path / "study" / "results.json").read_bytes()
    count = len(launched)
    assert main([asked(tmp_path)]) == 0 and len(launched) == count, "nothing is trained or measured again"
    assert (tmp_path / "study" / "results.json").read_bytes() == before
    other = tree(tmp_path)["base"]
    other["optim"]["weight_decay"] = 0.05
    assert main([asked(tmp_path, base=other)]) == 2
    assert "was trained with other settings" in capsys.readouterr().err and len(launched) == count


def test_a_rate_that_was_lucky_with_one_seed_does_not_stay_the_best(tmp_path: Path) -> None:
    made = study(tmp_path, lrs=[0.001, 0.01, 0.1], seeds=[1, 2, 3])
    ends = {
        ("softmax", 0.01): (2.0, 2.6, None),
        ("softmax", 0.001): (2.2, 2.1, 2.0),
        ("softmax", 0.1): (4.0, None, None),
        ("cosine", 0.01): (1.8, "diverged", None),
        ("cosine", 0.001): (2.5, 2.5, 2.5),
        ("cosine", 0.1): ("diverged", None, None),
    }
    asked = []
    for cell in grid.cells(made):
        asked.append((cell.head, cell.lr, cell.seed))
        end = ends[cell.head, cell.lr][cell.seed - 1]
        assert end is not None, f"{cell} was not to be trained"
        run = made.config(cell).run
        run.mkdir(parents=True)
        (run / EXIT_RECORD).write_text(json.dumps({"code": EXIT_DIVERGED if end == "diverged" else 0}))
        bits = None if end == "diverged" else end
        (run / "metrics.jsonl").write_text(Eval(step=3, seconds=1.0, loss=0.0, bits_per_byte=bits).line() + "\n")
    others = [
        *(("softmax", 0.01, 2), ("cosine", 0.01, 2), ("softmax", 0.001, 2), ("cosine", 0.001, 2)),
        *(("softmax", 0.001, 3), ("cosine", 0.001, 3)),
    ]
    assert asked[:6] == [(head, lr, 1) for lr in (0.001, 0.01, 0.1) for head in ("softmax", "cosine")]
    assert asked[6:] == others
    assert grid.chosen_lr(made, "softmax") == grid.chosen_lr(made, "cosine") == 0.001
    again = list(grid.cells(made))
    assert sorted(map(repr, again)) == sorted(repr(Cell(*one)) for one in asked), "all that is there, and no more"


def test_a_study_that_is_not_done_has_a_report(tmp_path: Path, launched: list[str], monkeypatch: Any) -> None:
    """It trains nothing, and tells what there is."""
    train, stop = grid.start, ending(EXIT_PREEMPTED, EXIT_PREEMPTED)
    monkeypatch.setattr(grid, "start", lambda config, options: (stop if len(launched) == 3 else train)(config, options))
    assert main([asked(tmp_path)]) == EXIT_PREEMPTED and len(launched) == 3
    monkeypatch.setattr(grid, "start", None)
    assert main([asked(tmp_path), "--report"]) == 0
    softmax, cosine = json.loads((tmp_path / "study" / "results.json").read_text())["heads"]
    assert [one["outcome"] for one in softmax["sweep"]] == ["done", "done", None]
    assert [one["outcome"] for one in cosine["sweep"]] == ["done", None, None]
    assert softmax["seeds"] == [1] and softmax["bits_per_byte"]["low"] is None
    assert (cosine["lr"], cosine["started"], cosine["seeds"]) == (0.001, 1, [1])
    told = Tree((tmp_path / "study" / "study.html").read_text()).text
    assert "3 of 6 runs are not done: all of this may change." in told and "6 runs (3 done, 3 not done)" in told


def test_only_parts_that_every_run_measured_are_compared() -> None:
    from pretrain.study.results import common_parts

    gpu = {"measured": ["gpu"], "not_measured": {"cpu": "no RAPL", "dram": "no RAPL"}}
    both = {"measured": ["gpu", "cpu"], "not_measured": {"dram": "no DRAM counter"}}
    none = {"measured": [], "not_measured": {"gpu": "no GPU", "cpu": "no RAPL", "dram": "no RAPL"}}
    assert common_parts([both, both]) == (["gpu", "cpu"], {"dram": "no DRAM counter"})
    assert common_parts([both, gpu]) == (["gpu"], {"dram": "no DRAM counter", "cpu": "no RAPL"})
    assert common_parts([gpu, none])[0] == [] and common_parts([gpu, none])[1]["gpu"] == "no GPU"
    assert common_parts([]) == ([], {})


def test_an_exponent_is_told_as_it_was_set() -> None:
    from pretrain.study.results import exponent

    ramp = {"first": 1.0, "last": 8.0}
    heads: tuple[dict[str, Any], ...] = (
        {"distance": "dot"},
        {},
        {"exponent": 28.0},
        {"exponent": "learned"},
        {"exponent": ramp},
        {"distance": "cosine_softmax"},
        {"distance": "squared_euclidean_softmax"},
    )
    told = [exponent(validate(HeadConfig, head)) for head in heads]
    assert told == [None, "sqrt_dim", 28.0, "learned", "1 to 8", "learned", "the distance's own"]


def test_the_recipe_is_the_study_of_ten_heads() -> None:
    recipe = Path("configs/study-small.yaml")
    made = validate(LanguageConfig, read_tree(recipe))
    grid.check(made)
    distances = {name: head.distance for name, head in made.heads.items()}
    names = "euclidean cosine manhattan chebyshev minkowski canberra braycurtis hamming mahalanobis"
    assert distances == {"softmax": "dot", **{name: name for name in names.split()}}
    assert made.heads["minkowski"].params == {"p": 3} and made.baseline == "softmax"
    assert len(made.seeds) == 3 and len(made.lrs) == 5
    assert f"overtone study {recipe}" in recipe.read_text()


def ending(code: int, record: int | None) -> Callable[[Path, list[str]], int]:
    """A launcher whose run ends at once."""

    def start(config: Path, options: list[str]) -> int:
        cfg = load(config)
        cfg.run.mkdir(parents=True, exist_ok=True)
        if record is not None:
            (cfg.run / EXIT_RECORD).write_text(json.dumps({"code": record, "reason": "", "step": 1}))
        return code

    return start


def test_runs_that_diverge_are_counted_and_never_chosen(
    tmp_path: Path, launched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    train = grid.start

    def start(config: Path, options: list[str]) -> int:
        lost = "cosine" in config.stem or config.stem == "softmax-lr0.01-seed1"
        return (ending(EXIT_DIVERGED, EXIT_DIVERGED) if lost else train)(config, options)

    monkeypatch.setattr(grid, "start", start)
    assert main([asked(tmp_path, seeds=[1])]) == 0
    found = json.loads((tmp_path / "study" / "results.json").read_text())
    softmax, cosine = found["heads"]
    assert (softmax["lr"], softmax["diverged"], softmax["started"]) == (0.001, 1, 2)
    assert (cosine["lr"], cosine["diverged"], cosine["started"], cosine["bits_per_byte"]) == (None, 2, 2, None)
    assert [run["outcome"] for run in found["runs"]] == ["done", "diverged", "diverged", "diverged"]
    assert softmax["bits_per_byte"]["low"] is None, "one seed has no interval"


def test_a_stopped_run_stops_the_study_with_its_code(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    make_text(tmp_path / "data")
    for code, record in ((EXIT_PREEMPTED, EXIT_PREEMPTED), (1, None)):
        monkeypatch.setattr(grid, "start", ending(code, record))
        assert main([asked(tmp_path)]) == code
        assert "softmax-lr0.001-seed1: exit code" in capsys.readouterr().err
    assert not (tmp_path / "study" / "results.json").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals) -> None:
    """The launcher is given a SIGTERM, and Ctrl-C as every process of a terminal; it is waited for."""
    code = (
        "import os, signal, sys, time\n"
        "signal.signal(int(sys.argv[2]), lambda *_: sys.exit(75))\n"
        "os.kill(os.getppid(), int(sys.argv[2]))\n"
        "if int(sys.argv[2]) == signal.SIGINT: os.kill(os.getpid(), signal.SIGINT)\n"
        "time.sleep(60)"
    )
    monkeypatch.setattr(grid, "LAUNCH", [sys.executable, "-c", code])
    before = signal.getsignal(number)
    assert grid.start(tmp_path, [str(int(number))]) == EXIT_PREEMPTED
    assert signal.getsignal(number) is before


def test_two_at_once_are_refused(tmp_path: Path, launched: list[str], capsys: Any) -> None:
    import fcntl

    (tmp_path / "study").mkdir()
    with (tmp_path / "study" / "lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert main([asked(tmp_path)]) == 2
    assert "another process works on this study" in capsys.readouterr().err and launched == []


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path, launched: list[str], capsys: Any) -> None:
    (tmp_path / "file").touch()
    assert main([asked(tmp_path, out=str(tmp_path / "file" / "study"))]) == 2
    assert "cannot be written" in capsys.readouterr().err and launched == []


def test_settings_that_cannot_be_meant(tmp_path: Path) -> None:
    base = tree(tmp_path)["base"]
    for changes, why in (
        ({"baseline": "dot"}, "baseline=dot is none of the heads: softmax, cosine"),
        ({"lrs": [0.1, 0.1]}, "a value twice"),
        ({"heads": {"softmax": {"distance": "euclid"}}}, "euclid"),
        ({"heads": {"a/b": {}}, "baseline": "a/b"}, "letters, digits"),
        ({"base": {**base, "run": "x"}}, "base.run is set by the study: use out"),
        ({"base": {**base, "optim": {"lr": 1.0}}}, "base.optim.lr is set by the study: use lrs"),
        ({"base": {**base, "modell": {}}}, "modell"),
        ({"seed": 1}, "seed"),
    ):
        with pytest.raises(ConfigError, match=why):
            grid.check(study(tmp_path, **changes))


def test_a_config_of_no_kind_is_refused(tmp_path: Path, capsys: Any) -> None:
    assert main([asked(tmp_path, kind="langauge")]) == 2
    assert "kind='langauge': expected one of language, algorithmic" in capsys.readouterr().err


def test_heads_of_a_seed_start_from_one_trunk(tmp_path: Path) -> None:
    """But for the gain of the last norm, which sets the length of hidden states that a head is made for."""
    from pretrain.modules import build_modules
    from pretrain.runtime.ranks import Ranks

    made = study(tmp_path)
    one = Ranks(0, 1, 0, 1, torch.device("cpu"))
    trunks = [build_modules(made.config(Cell(head, 0.01, 1)), one)[0].state_dict() for head in made.heads]
    other = build_modules(made.config(Cell("softmax", 0.01, 2)), one)[0].state_dict()
    assert {name for name in trunks[0] if not torch.equal(trunks[0][name], trunks[1][name])} <= {"norm.weight"}
    assert not torch.equal(trunks[0]["blocks.0.attention.qkv.weight"], other["blocks.0.attention.qkv.weight"])


def test_intervals_are_students() -> None:
    from pretrain.study.results import interval

    found = interval([1.0, 2.0, 3.0])
    assert found["mean"] == 2.0 and found["high"] - 2.0 == pytest.approx(2.0 - found["low"])
    assert found["high"] == pytest.approx(2 + 4.302653 / 3**0.5)
    assert interval([5.0]) == {"mean": 5.0, "low": None, "high": None, "values": [5.0]}


def test_a_curve_says_what_training_had_taken() -> None:
    from pretrain.study.results import curve

    def train(step: int, joules: float | None) -> Train:
        return Train(step=step, tokens=10 * step, seconds=2.0, loss=None, loss_mean=5.0 / step, gpu_j=joules)

    held = Eval(step=1, seconds=1.0, loss=4.0, bits_per_byte=2.0, gpu_j=9.0)
    records: list[Record] = [train(1, 3.0), held, train(2, 4.0)]
    assert curve(records, Train, ["gpu"]) == [
        {"step": 1, "tokens": 10, "seconds": 2.0, "joules": 3.0, "loss": 5.0},
        {"step": 2, "tokens": 20, "seconds": 4.0, "joules": 7.0, "loss": 2.5},
    ]
    (held_out,) = curve(records, Eval, ["gpu"])
    assert held_out == {"step": 1, "tokens": 10, "seconds": 2.0, "joules": 3.0, "loss": 4.0, "bits_per_byte": 2.0}
    assert [point["joules"] for point in curve([train(1, None), train(2, 4.0)], Train, ["gpu"])] == [None, None]


@pytest.mark.slow
def test_the_command_launches_real_runs(tmp_path: Path) -> None:
    """From text that is not prepared yet."""
    make_text(tmp_path / "data")
    (tmp_path / "data").rename(tmp_path / "other")
    path = asked(tmp_path, heads={"softmax": {"distance": "dot"}}, seeds=[1])
    words = [sys.executable, "-m", "pretrain.study", path, "lrs=[0.01]", "--num-gpus", "1"]
    found = subprocess.run(words, capture_output=True, text=True, timeout=240)
    assert found.returncode == 0, found.stderr
    (head,) = json.loads((tmp_path / "study" / "results.json").read_text())["heads"]
    assert head["lr"] == 0.01 and not head["lr_at_edge"] and head["bits_per_byte"]["mean"] > 0
    assert "run 1 of 1: softmax-lr0.01-seed1" in found.stdout + found.stderr
