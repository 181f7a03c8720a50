"""`overtone study CONFIG` of kind language: heads tuned alike, a choice that is written down, fresh seeds, results."""

from __future__ import annotations

import csv
import json
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from common.exits import EXIT_PREEMPTED
from pretrain.analysis.evaluation import open_task, run_task
from pretrain.records import Eval
from pretrain.run_folder import RunFolder
from pretrain.runtime.ranks import alone
from pretrain.study import jobs, protocol, search
from pretrain.study.__main__ import main
from pretrain.study.jobs import Jobs, Stopped
from pretrain.study.language_config import TEST, LanguageConfig
from pretrain.study.statistics import crossed
from pretrain.study.tuning import Range
from tests.support.language_study import TESTED, asked, launch_as, leave_run, measure_as, study, tree
from tests.support.pages import Tree
from tests.support.tiny import make_text


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared")
    make_text(folder / "data", **TESTED)
    return folder


@pytest.fixture
def folder(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One with prepared data."""
    shutil.copytree(prepared, tmp_path, dirs_exist_ok=True)
    monkeypatch.setattr(search, "prepare", lambda *_: None)  # it would see that the text was elsewhere
    monkeypatch.setattr("common.files.flush", lambda *_: None)  # dozens of records, which no test loses power over
    return tmp_path


def quality(name: str) -> float:
    """Bits/byte of a run that nobody trained, by its name: trial 2 is the best of softmax, and trial 1 of cosine, which
    the first rung ranks behind trial 0.
    """
    head, *rest = name.split(".")
    if rest[0].startswith("trial"):
        by_trial = {"softmax": (2.3, 2.2, 2.1, 2.4), "cosine": (2.20, 2.25, 2.5, 2.4)}[head]
        value = by_trial[int(rest[0].removeprefix("trial")) % 4]
        return value - 0.2 * (name == "cosine.trial001.rung1")
    seed = int(rest[-1].removeprefix("seed"))
    return {"softmax": 2.12, "cosine": 2.0}[head] + {11: 0.0, 12: 0.01, 13: 0.03}[seed]


def results_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "study" / "results.json").read_text())
    return found


TUNING = {**tree(Path("unused"))["tuning"], "trials": 4, "keep": 0.5}


def test_the_best_of_the_last_rung_is_chosen_and_trained_with_fresh_seeds(folder: Path, monkeypatch: Any) -> None:
    names: list[str] = []
    launch_as(monkeypatch, quality, names)
    measure_as(monkeypatch, quality)
    assert main([asked(folder, tuning=TUNING)]) == 0
    first = [f"{head}.trial{k:03d}.rung0" for k in range(4) for head in ("softmax", "cosine")]
    second = ["cosine.trial000.rung1", "softmax.trial001.rung1", "cosine.trial001.rung1", "softmax.trial002.rung1"]
    fresh = [f"{head}.d32.seed{seed}" for seed in (11, 12) for head in ("softmax", "cosine")]
    assert names == first + second + fresh
    choice = json.loads((folder / "study" / "choice.json").read_text())["heads"]
    assert [choice[head]["trial"] for head in ("softmax", "cosine")] == [2, 1]
    assert choice["cosine"]["bits_per_byte"] == 2.05 and choice["softmax"]["runs"] == 6
    assert choice["softmax"]["tokens"] == 4 * 2 * 256 + 2 * 4 * 256
    made = study(folder, tuning=TUNING)
    assert choice["cosine"]["setting"] == made.settings("cosine")[1]

    found = results_of(folder)
    softmax, cosine = found["heads"]
    assert softmax["winners_curse"]["mean"] == pytest.approx(2.125 - 2.1)
    assert cosine["winners_curse"]["trial"] == 2.05 and cosine["winners_curse"]["mean"] == pytest.approx(2.005 - 2.05)
    assert cosine["difference"]["mean"] == pytest.approx(-0.12, abs=1e-6) and softmax["difference"] is None
    assert [len(head["trials"]) for head in (softmax, cosine)] == [6, 6]
    assert found["protocol"]["counts"] == [4, 2] and found["protocol"]["comparisons"] == 1
    assert any("2 seeds" in warning for warning in found["protocol"]["warnings"])
    assert not any("may have been seen" in warning for warning in found["protocol"]["warnings"])
    with (folder / "study" / "results.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 16 and [row["trial"] for row in rows[:6]] == ["0", "1", "2", "3", "1", "2"]
    assert [float(row["less_baseline"]) for row in rows if row["less_baseline"]] == pytest.approx([-0.12, -0.12])
    page = Tree((folder / "study" / "study.html").read_text())
    assert not re.search(r"\d\.\d{7}", page.text), "a figure that nobody rounded"

    before = (folder / "study" / "results.json").read_bytes()
    assert main([asked(folder, tuning=TUNING)]) == 0 and len(names) == 16, "nothing is trained or measured again"
    assert (folder / "study" / "results.json").read_bytes() == before


def test_the_choice_is_written_before_the_first_fresh_run_and_read_after(folder: Path, monkeypatch: Any) -> None:
    names: list[str] = []
    seen = []

    def looked(name: str) -> float:
        if "seed" in name:
            seen.append((folder / "study" / "choice.json").read_text())
        return quality(name)

    launch_as(monkeypatch, looked, names)
    measure_as(monkeypatch, quality)
    assert main([asked(folder)]) == 0
    assert len(seen) == 4 and len(set(seen)) == 1
    # trials may get lost: what was chosen stays
    for file in (folder / "study" / "cells").glob("*trial*"):
        file.unlink()
    assert main([asked(folder, seeds=[11, 12], out=str(folder / "study"))]) == 0
    assert (folder / "study" / "choice.json").read_text() == seen[0]


def test_what_was_said_before_choosing_cannot_be_changed_after(folder: Path, monkeypatch: Any, capsys: Any) -> None:
    names: list[str] = []
    launch_as(monkeypatch, quality, names)
    measure_as(monkeypatch, quality)
    assert main([asked(folder)]) == 0
    count = len(names)
    for changes, told in (
        ({"seeds": [11, 12, 13]}, "other settings (seeds)"),
        ({"baseline": "cosine"}, "other settings (baseline)"),
        ({"heads": {"softmax": {"distance": "dot"}}}, "other settings (heads)"),
    ):
        assert main([asked(folder, **changes)]) == 2
        assert told in capsys.readouterr().err and len(names) == count
    assert main([asked(folder, title="another", keep="records")]) == 0
    (folder / "study" / "choice.json").unlink()
    assert main([asked(folder, seeds=[11, 12, 13])]) == 0
    assert sorted(names[count:]) == ["cosine.d32.seed13", "softmax.d32.seed13"], "trials are read from their records"
    (told, *_) = (warning for warning in results_of(folder)["protocol"]["warnings"] if "may have been seen" in warning)
    assert told.startswith("4 runs with fresh seeds were there")
    (folder / "study" / "choice.json").write_text("{}")
    assert main([asked(folder)]) == 2 and "no choice of this study" in capsys.readouterr().err


def test_trials_that_diverge_come_last_and_are_counted(folder: Path, monkeypatch: Any) -> None:
    names: list[str] = []

    def bits(name: str) -> float | None:
        head, trial, *_ = name.split(".")
        lost = head == "cosine" or trial in ("trial000", "trial002")
        return None if lost else 9.9 if "trial" in name else 2.0

    launch_as(monkeypatch, bits, names)
    measure_as(monkeypatch, bits)
    assert main([asked(folder, tuning=TUNING)]) == 0
    softmax, cosine = results_of(folder)["heads"]
    assert [trial["trial"] for trial in softmax["trials"]] == [0, 1, 2, 3, 1, 3] and softmax["chosen"]["trial"] == 1
    assert (softmax["spent"]["diverged"], softmax["spent"]["runs"]) == (2, 6)
    assert cosine["chosen"] is None and cosine["spent"]["diverged"] == 4 and cosine["bits_per_byte"] is None
    assert not any("cosine.d32" in name for name in names)
    told = Tree((folder / "study" / "study.html").read_text()).text
    assert "cosine: all 4 trials diverged." in told


def test_a_choice_at_an_edge_unsettles_the_study(folder: Path, monkeypatch: Any) -> None:
    """Of the trials of this seed, some have values in the outer tenths of ranges, and the default has not."""
    made = study(folder, tuning=TUNING)
    at_edge = [bool(search_edges(made, "softmax", k)) for k in range(4)]
    inside, outside = at_edge.index(False), at_edge.index(True)
    for chosen, behind, settled in ((inside, 0.2, True), (outside, 0.2, False), (outside, 0.0001, True)):
        out = str(folder / f"study{chosen}-{behind}")

        def bits(name: str, chosen: int = chosen, behind: float = behind) -> float:
            return 2.0 if f"trial{chosen:03d}" in name else 2.0 + behind if "trial" in name else quality(name)

        launch_as(monkeypatch, bits, [])
        measure_as(monkeypatch, quality)
        changes = {"heads": {"softmax": {"distance": "dot"}, "cosine": {"distance": "cosine"}}, "out": out}
        assert main([asked(folder, tuning=TUNING, **changes)]) == 0
        found = json.loads((Path(out) / "results.json").read_text())
        told = Tree((Path(out) / "study.html").read_text()).text
        assert found["settled"] == settled and found["best"] == ("cosine" if settled else None)
        assert ("No head is called best, better or worse here" in told) != settled
        if chosen == outside:
            edge = found["edges"][0]
            assert any(edge["setting"] not in search_edges(made, "softmax", k) for k in range(4))
            assert edge["behind"] == pytest.approx(behind) and edge["open"] != settled
            own = [
                run["val_bits_per_byte"] for run in found["runs"] if run["head"] == "softmax" and run["trial"] is None
            ]
            assert edge["spread"] == pytest.approx(np.std(own, ddof=1)) and 0.0001 < edge["spread"] < 0.2
            assert edge["head"] == "softmax" and edge["try"] in told and edge["tried"] in told


def search_edges(made: LanguageConfig, head: str, trial: int) -> dict[str, str]:
    from pretrain.study.tuning import edges

    return edges(made.space(head), made.settings(head)[trial])


def test_records_are_enough(folder: Path, monkeypatch: Any, capsys: Any) -> None:
    """Without run folders, on another machine, a study goes on and tells the same."""
    names: list[str] = []
    launch_as(monkeypatch, quality, names)
    measure_as(monkeypatch, quality)
    assert main([asked(folder, keep="records")]) == 0
    cells = folder / "study" / "cells"
    assert list((folder / "study" / "runs").iterdir()) == [] and len(list(cells.glob("*.json"))) == 12
    assert len(list(cells.glob("*.npz"))) == 4
    before, count = results_of(folder), len(names)
    for name in ("cosine.d32.seed12.json", "cosine.d32.seed12.npz"):
        (cells / name).unlink()
    assert main([asked(folder)]) == 0 and names[count:] == ["cosine.d32.seed12"]
    assert results_of(folder) == before
    (cells / "cosine.d32.seed12.npz").unlink()
    assert main([asked(folder), "--report"]) == 2
    assert "cosine.d32.seed12.npz: the nats of each document cannot be read" in capsys.readouterr().err
    record = json.loads((cells / "softmax.d32.seed11.json").read_text())
    record["settings"]["optim"]["eps"] = 1e-7
    (cells / "softmax.d32.seed11.json").write_text(json.dumps(record))
    assert main([asked(folder)]) == 2
    assert "softmax.d32.seed11.json was trained with other settings" in capsys.readouterr().err
    (cells / "softmax.d32.seed11.json").write_text("{}")
    assert main([asked(folder)]) == 2 and "no record of a run" in capsys.readouterr().err


def test_a_run_folder_of_other_settings_is_refused(folder: Path, monkeypatch: Any, capsys: Any) -> None:
    made = study(folder)
    cell = made.trial("softmax", 0, 0, made.settings("softmax")[0])
    cfg = made.config(cell)
    leave_run(cfg.model_copy(update={"optim": cfg.optim.model_copy(update={"eps": 1e-7})}), 2.0)
    assert main([asked(folder)]) == 2
    assert "was trained with other settings than this study's" in capsys.readouterr().err


def test_a_finished_run_of_fresh_seeds_with_other_settings_is_not_taken(
    folder: Path, monkeypatch: Any, capsys: Any
) -> None:
    launch_as(monkeypatch, quality, [])
    measure_as(monkeypatch, quality)
    path = asked(folder)
    assert main([path]) == 0
    shutil.rmtree(folder / "study" / "cells")  # and nothing is left but the folders of the runs
    (folder / "study" / "choice.json").unlink()
    for run in (folder / "study" / "runs").glob("*.trial*"):
        shutil.rmtree(run)
    assert main([asked(folder, base={**tree(folder)["base"], "optim": {"weight_decay": 0.3}})]) == 2
    assert "was trained with other settings than this study's" in capsys.readouterr().err


def test_without_tuning_nothing_is_the_best(folder: Path, monkeypatch: Any) -> None:
    launch_as(monkeypatch, quality, [])
    measure_as(monkeypatch, quality)
    assert main([asked(folder, tuning={**TUNING, "trials": 1, "rungs": [1]})]) == 0
    found = results_of(folder)
    assert not found["settled"] and found["best"] is None and found["edges"] == []
    told = Tree((folder / "study" / "study.html").read_text()).text
    assert "each had one trial, its default, so nothing was tuned" in told


def test_an_edge_is_judged_by_the_last_rung_that_has_a_trial_inside() -> None:
    """At the first rung the trial inside is ahead, and at the last one, which counts, behind."""

    def ran(trial: int, rung: int, value: float, ends: float | None) -> Any:
        record = {"outcome": "done", "summary": {"bits_per_byte": ends}} if ends is not None else None
        return SimpleNamespace(cell=SimpleNamespace(trial=trial, rung=rung, setting={"lr": value}), record=record)

    entry = Range(low=0.001, high=0.1)
    runs = [ran(0, 0, 0.01, 2.0), ran(1, 0, 0.1, 2.3), ran(2, 0, 0.02, 2.1), ran(0, 1, 0.01, 1.9), ran(1, 1, 0.1, 1.8)]
    assert protocol._behind(runs, "lr", entry, 1) == pytest.approx(0.1)
    assert protocol._behind(runs[:3], "lr", entry, 1) == pytest.approx(-0.3)
    assert protocol._behind([runs[1]], "lr", entry, 1) is None


def test_a_run_that_ended_unrecorded_is_recorded_and_not_trained_again(folder: Path, monkeypatch: Any) -> None:
    made = study(folder)
    cell = made.trial("softmax", 0, 0, made.settings("softmax")[0])
    leave_run(made.config(cell), 2.0)
    names: list[str] = []
    launch_as(monkeypatch, quality, names)
    measure_as(monkeypatch, quality)
    assert main([asked(folder)]) == 0 and cell.name not in names and len(names) == 11


def test_a_study_that_is_not_done_has_a_report(folder: Path, monkeypatch: Any, capsys: Any) -> None:
    names: list[str] = []
    launch_as(monkeypatch, quality, names)
    launch, stop = Jobs.launch, lambda jobs, config: EXIT_PREEMPTED
    monkeypatch.setattr(Jobs, "launch", lambda *a: (stop if len(names) == 3 else launch)(*a))
    assert main([asked(folder)]) == EXIT_PREEMPTED and len(names) == 3
    assert "cosine.trial001.rung0: exit code 75; the same command goes on" in capsys.readouterr().err
    assert not (folder / "study" / "results.json").exists()
    monkeypatch.setattr(Jobs, "launch", None)
    assert main([asked(folder), "--report"]) == 0
    found = results_of(folder)
    assert [trial["outcome"] for trial in found["heads"][0]["trials"]] == ["done", "done", None]
    assert not found["chosen"] and found["best"] is None and found["heads"][0]["chosen"] is None
    told = Tree((folder / "study" / "study.html").read_text()).text
    assert "No setting was chosen yet" in told and "3 of 6 runs are not done" in told


def test_with_several_jobs_neither_time_nor_energy_is_told(folder: Path, monkeypatch: Any) -> None:
    names: list[str] = []
    launch_as(monkeypatch, quality, names)
    measure_as(monkeypatch, quality)
    both, launch = threading.Barrier(2, timeout=60), Jobs.launch

    def together(jobs: Jobs, config: Path) -> int:
        if jobs.count == 2 and "rung0" in config.name:
            both.wait()  # two are under way at once, or this breaks
        return launch(jobs, config)

    monkeypatch.setattr(Jobs, "launch", together)
    assert main([asked(folder), "--jobs", "2"]) == 0 and sorted(names) == sorted(set(names)) and len(names) == 12
    for head in results_of(folder)["heads"]:
        assert head["tokens_per_s"] is None and head["j_per_token"] is None
        assert {point["seconds"] for point in head["train_curve"]} == {None}
    assert "--jobs" in results_of(folder)["not_measured"]["cpu"]
    # what ran beside others stays so, whoever records it
    shutil.rmtree(folder / "study" / "cells")
    assert main([asked(folder), "--report"]) == 0
    record = json.loads((folder / "study" / "cells" / "cosine.d32.seed11.json").read_text())
    assert record["shared"] and record["tokens_per_s"] is None and record["summary"]["train_seconds"] is None


def test_one_that_fails_stops_the_others_and_its_code_is_told(tmp_path: Path) -> None:
    """Launchers that wait for a signal; one fails at once."""
    code = (
        "import pathlib, signal, sys, time\n"
        "if sys.argv[1].endswith('bad'): time.sleep(0.5); sys.exit(9)\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\n"
        "time.sleep(60)"
    )
    codes: dict[str, int] = {}
    both = Jobs([], 2)

    def work(name: str) -> None:
        codes[name] = both.launch(tmp_path / name)
        if codes[name]:
            raise Stopped(name, codes[name])

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped) as stopped:
        patch.setattr(jobs, "LAUNCH", [sys.executable, "-c", code])
        both.each(work, ["bad", "good", "late"])
    assert stopped.value.code == 9 and codes["bad"] == 9 and codes["good"] in (75, -signal.SIGTERM)
    assert codes.get("late", EXIT_PREEMPTED) == EXIT_PREEMPTED, "nothing is started any more"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_all_runs_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals) -> None:
    """Launchers are given one SIGTERM and are waited for; what signals the study's whole group does not reach them."""
    code = (
        "import os, pathlib, signal, sys, time\n"
        "def told(*_):\n"
        "    signal.signal(signal.SIGTERM, lambda *_: os._exit(9))\n"  # a second signal kills
        "    time.sleep(0.3); sys.exit(75 if os.getpgid(0) == os.getpid() else 8)\n"
        "signal.signal(signal.SIGTERM, told)\n"
        "pathlib.Path(sys.argv[1]).touch()\n"
        "while len(list(pathlib.Path(sys.argv[1]).parent.iterdir())) < 2: time.sleep(0.01)\n"
        "if sys.argv[1].endswith('a'): os.kill(os.getppid(), int(sys.argv[2]))\n"
        "time.sleep(60)"
    )
    monkeypatch.setattr(jobs, "LAUNCH", [sys.executable, "-c", code])
    before = signal.getsignal(number)
    codes = []
    running = Jobs([str(int(number))], 2)

    def work(name: str) -> None:
        codes.append(running.launch(tmp_path / name))
        raise Stopped(name, codes[-1])

    with pytest.raises(Stopped):
        running.each(work, ["a", "b", "c"])
    assert codes == [EXIT_PREEMPTED] * 3 and len(list(tmp_path.iterdir())) == 2
    assert signal.getsignal(number) is before


def test_a_dry_run_tells_what_it_takes(folder: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr(Jobs, "launch", None)
    sizes = {"d32": {}, "d48": {"model": {"dim": 48}, "train": {"steps": 6}}}
    assert main([asked(folder, sizes=sizes), "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert "softmax" in told and "rung 2" in told and "d48" in told
    assert re.search(r"all\W+16\W+60 in all\W+15,360", told), told
    assert "with 2 seeds and 1 comparison, a difference is found with probability 0.8 if it is 11.55" in told
    assert not (folder / "study").exists()
    planned = search.plan(study(folder, sizes=sizes))
    assert [(one.what, one.runs, one.steps, one.tokens) for one in planned[:4]] == [
        *(("rung 1", 3, 2, 1536), ("rung 2", 1, 4, 1024)),
        *(("fresh seeds", 2, 4, 2048), ("fresh seeds", 2, 6, 3072)),
    ]


def test_two_at_once_are_refused(folder: Path, monkeypatch: Any, capsys: Any) -> None:
    import fcntl

    monkeypatch.setattr(Jobs, "launch", None)
    (folder / "study").mkdir()
    with (folder / "study" / "lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert main([asked(folder)]) == 2
    assert "another process works on this study" in capsys.readouterr().err


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "file").touch()
    assert main([asked(tmp_path, out=str(tmp_path / "file" / "study"))]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_a_config_of_no_kind_is_refused(tmp_path: Path, capsys: Any) -> None:
    assert main([asked(tmp_path, kind="langauge")]) == 2
    assert "kind='langauge': expected one of language, algorithmic" in capsys.readouterr().err


# ---- one that is real


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["gpu", "gpu-bert", "gpu-qwen2"])
def test_real_runs_from_text_to_the_page(recipe: str, tmp_path: Path) -> None:
    """The command, its launcher and its ranks, on the recipes for a GPU in small."""
    make_text(tmp_path / "data", **TESTED)
    base = tree(tmp_path)["base"]
    train = {key: base["train"][key] for key in ("steps", "tokens_per_step", "micro_batch", "precision")}
    changes = {
        "out": str(tmp_path / "study"),
        "seeds": [11, 12],
        "heads": {"softmax": {"distance": "dot"}},
        **{"tuning.trials": 1, "tuning.rungs": [1]},
        "sizes": {"d32": {"model": {"layers": 2, "heads": 2, "dim": 32}, "train": train}},
        **{"base.model.seq_len": base["model"]["seq_len"], "base.model.compile": False, "base.data": base["data"]},
        **{"base.train": {}, "base.logging.every": 1, "base.evaluation.every": 2},
    }
    given = [f"{key}={json.dumps(value)}" for key, value in changes.items()]
    words = [sys.executable, "-m", "pretrain.study", f"configs/study-{recipe}.yaml", *given, "--num-gpus", "1"]
    found = subprocess.run(words, capture_output=True, text=True, timeout=500)
    assert found.returncode == 0, found.stderr
    (softmax,) = results_of(tmp_path)["heads"]
    runs = [RunFolder(tmp_path / "study" / "runs" / f"softmax.d32.seed{seed}") for seed in (11, 12)]
    scored = [run_task(open_task(run.path, TEST), alone())[0] for run in runs]
    assert softmax["bits_per_byte"]["values"] == [one.bits_per_byte for one in scored]
    nats = np.stack([one.nats for one in scored])
    both = crossed(nats, scored[0].text_bytes)
    assert softmax["bits_per_byte"]["mean"] == pytest.approx(both.mean)
    assert (softmax["bits_per_byte"]["low"], softmax["bits_per_byte"]["high"]) == pytest.approx(
        both.interval(), rel=1e-4
    )
    last = [run.records(Eval)[-1].bits_per_byte for run in runs]
    assert softmax["val_bits_per_byte"] == pytest.approx(np.mean(last))
    assert len(softmax["projection"]["points"]) == 300 and softmax["scree"][-1] == pytest.approx(1)
    assert [point["tokens"] for point in softmax["train_curve"]] == [256, 512, 768, 1024]
    assert softmax["tokens_per_s"] > 0 and softmax["j_per_token"] is None
    page = Tree((tmp_path / "study" / "study.html").read_text())
    assert not re.search(r"\d\.\d{7}", page.text), "a figure that nobody rounded"
