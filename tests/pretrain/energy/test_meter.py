"""Energy: counters' readings become joules by phase and node; what was not measured is None; a budget ends a run."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common.errors import ConfigError
from pretrain.analysis.summary import summarise
from pretrain.checkpoints import contents
from pretrain.checkpoints import folder as checkpoint
from pretrain.config import RunConfig
from pretrain.energy import meter as energy
from pretrain.energy.meter import (
    NO_COUNTER,
    Meter,
    Spent,
    ZeusCounter,
    zeus_counter,
)
from pretrain.report import main
from pretrain.runtime import ranks as process
from pretrain.runtime.ranks import Ranks
from tests.support.ranks import run_ranks
from tests.support.records import read_records
from tests.support.replay import Replay, gpus
from tests.support.tiny import make_data, outcome_of, tiny_config


def alone() -> Ranks:
    return Ranks(0, 1, 0, 1, torch.device("cpu"))


def test_phases_are_accounted_apart() -> None:
    meter = Meter(alone(), Replay(gpus((100, 7), (110, 12.5), (110, 12.5), (112, 12.5))))
    with meter.window("train") as train:
        pass
    with meter.window("eval") as held_out:
        pass
    assert train[0].as_dict() == {"gpu_j": 15.5, "cpu_j": None, "dram_j": None}
    assert held_out[0].joules == {"gpu": 2.0} and held_out[0].total_j == 2.0
    assert train[0].seconds > 0


def test_all_parts_add_up() -> None:
    trace = [
        {"gpu": [0.0], "cpu": [5.0, 6.0], "dram": [1.0, 1.0]},
        {"gpu": [8.0], "cpu": [9.0, 7.0], "dram": [1.5, 2.0]},
    ]
    meter = Meter(alone(), Replay(trace, missing={}))
    with meter.window("train") as spent:
        pass
    assert spent[0].as_dict() == {"gpu_j": 8.0, "cpu_j": 5.0, "dram_j": 1.5} and spent[0].total_j == 14.5


def test_unmeasured_is_none_and_says_why() -> None:
    meter = Meter(alone(), None)
    with meter.window("train") as spent:
        pass
    assert spent[0].as_dict() == {"gpu_j": None, "cpu_j": None, "dram_j": None} and spent[0].total_j is None
    assert meter.measured == () and meter.missing == dict.fromkeys(("gpu", "cpu", "dram"), NO_COUNTER)


def test_a_window_shorter_than_the_update_period_is_none_and_the_next_one_has_its_joules() -> None:
    meter = Meter(alone(), Replay(gpus(50, 50, 50, 74)))
    spent = []
    for phase in ("save", "train"):
        meter.begin(phase)
        spent.append(meter.end())
    assert [one.as_dict()["gpu_j"] for one in spent] == [None, 24.0]
    assert [one.total_j for one in spent] == [0.0, 24.0], "a sum over windows loses nothing"


def test_a_wrap_around_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """RAPL's counter starts again from 0; Zeus adds its range once it has noticed."""
    monkeypatch.setattr(energy, "PAUSE_S", 0.0)
    trace = [{"cpu": [x]} for x in (262_140.0, 7.0, 9.0, 262_152.0, 262_152.0, 262_160.0)]
    counter = Replay(trace, missing={"gpu": "no GPU is used", "dram": "RAPL shows no DRAM"})
    meter = Meter(alone(), counter)
    spent = []
    for _ in range(2):
        meter.begin("train")
        spent.append(meter.end().joules["cpu"])
    assert spent == [12.0, 8.0] and counter.taken == 6


def test_a_counter_that_went_back_for_good_is_lost_not_negative(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(energy, "WRAP_NOTICED_S", 0.0)
    meter = Meter(alone(), Replay(gpus(50, 40)))
    meter.begin("train")
    assert meter.end().total_j is None and "went back" in meter.missing["gpu"]


def test_a_counter_that_fails_is_told_once_and_the_run_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    meter = Meter(alone(), Replay([*gpus(0, 10), OSError("GPU is lost"), *gpus(30)]))
    totals = []
    for _ in range(3):
        meter.begin("train")
        totals.append(meter.end().total_j)
    assert totals == [10.0, None, None]
    assert meter.missing["gpu"] == "the counter failed: OSError('GPU is lost')" and len(caplog.records) == 1


def test_one_window_at_a_time() -> None:
    meter = Meter(alone(), None)
    meter.begin("train")
    with pytest.raises(AssertionError, match="train is still open"):
        meter.begin("eval")


@given(st.lists(st.floats(0, 1e6), min_size=2, max_size=30))
def test_windows_without_gaps_sum_to_the_counter(steps: list[float]) -> None:
    counts = [sum(steps[:k]) for k in range(1, len(steps) + 1)]
    trace = [reading for before, after in zip(counts, counts[1:], strict=False) for reading in gpus(before, after)]
    meter = Meter(alone(), Replay(trace))
    total = 0.0
    for _ in counts[1:]:
        meter.begin("train")
        total += meter.end().total_j or 0.0
    assert total == pytest.approx(counts[-1] - counts[0], abs=1e-6)


NODES = [{}, {"broken": 1}, {"fails": 1}]


def check_two_nodes() -> list[tuple[list[float | None], dict[str, str]]]:
    """Two ranks as two nodes of one rank each, for each of NODES: a counter fails in the second window."""
    real = process.start()
    ranks = Ranks(real.rank, real.world, 0, 1, real.device)
    told = []
    for case in NODES:
        trace: list = gpus(0, 10 * (real.rank + 1), 100, 101)
        if real.rank == case.get("fails"):
            trace[3] = OSError("gone")
        meter = Meter(ranks, None if real.rank == case.get("broken") else Replay(trace))
        found = []
        for _ in range(2):
            meter.begin("train")
            found.append(meter.end().as_dict()["gpu_j"])
        told.append((found, meter.missing))
    return told


def test_nodes_are_summed_and_one_unmeasured_node_makes_none(tmp_path: Path) -> None:
    one, other = run_ranks(check_two_nodes, 2, tmp_path)
    rapl = dict.fromkeys(("cpu", "dram"), "RAPL: no permission (node of rank 0)")
    assert (
        one
        == other
        == [
            ([30.0, 2.0], rapl),
            ([None, None], {"gpu": f"{NO_COUNTER} (node of rank 1)", **rapl}),
            ([30.0, None], {"gpu": "the counter failed: OSError('gone') (node of rank 1)", **rapl}),
        ]
    )


def check_own_gpus() -> list[tuple[list[float | None], dict[str, str]]]:
    """Two ranks of one node that see a GPU of their own alone: both counters work, or one is none."""
    real = process.start()
    told = []
    for counters in (2, 1):
        ranks = Ranks(real.rank, 2, real.rank, 2, real.device, own_gpu=True)
        rapl = {"cpu": [0.0], "dram": [0.0]} if real.rank == 0 else {}
        trace: list = [{"gpu": [0.0], **rapl}, {"gpu": [10.0 * (real.rank + 1)], **{part: [5.0] for part in rapl}}]
        meter = Meter(ranks, Replay(trace, missing={}) if real.rank < counters else None)
        meter.begin("train")
        told.append((list(meter.end().as_dict().values()), meter.missing))
    return told


def test_ranks_that_see_their_own_gpu_alone_measure_it(tmp_path: Path) -> None:
    one, other = run_ranks(check_own_gpus, 2, tmp_path)
    assert one == other == [([30.0, 5.0, 5.0], {}), ([None, 5.0, 5.0], {"gpu": NO_COUNTER})]


def test_a_counter_is_of_the_gpus_that_its_rank_speaks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(energy, "ZeusCounter", lambda gpus, owed: (gpus, owed))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    gpu = torch.device("cuda", 0)
    assert zeus_counter(Ranks(0, 8, 0, 4, gpu)) == (4, ("gpu", "cpu", "dram"))
    assert zeus_counter(Ranks(1, 8, 1, 4, gpu)) is None
    assert zeus_counter(Ranks(0, 8, 0, 8, gpu)) == (4, ("gpu", "cpu", "dram")), "ranks that share are counted once"
    assert zeus_counter(Ranks(0, 8, 0, 4, gpu, own_gpu=True)) == (1, ("gpu", "cpu", "dram"))
    assert zeus_counter(Ranks(1, 8, 1, 4, gpu, own_gpu=True)) == (1, ("gpu",))


def make_rapl(folder: Path) -> None:
    """RAPL's files: a package with DRAM, and a laptop's zone of the whole machine."""
    for zone, name, microjoules in (("0", "package-0", 5e6), ("0/intel-rapl:0:0", "dram", 2e6), ("1", "psys", 9e6)):
        at = folder / f"intel-rapl:{zone}"
        at.mkdir(parents=True)
        for file, text in (("name", name), ("energy_uj", int(microjoules)), ("max_energy_range_uj", 262143328850)):
            (at / file).write_text(f"{text}\n")


@pytest.fixture
def rapl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Zeus reads RAPL's counters from this folder, which is not there yet."""
    import zeus.device.cpu
    from zeus.device.cpu import rapl as of_zeus

    folder = tmp_path / "intel-rapl"
    monkeypatch.delenv("ZEUSD_SOCK_PATH", raising=False)
    monkeypatch.delenv("ZEUSD_HOST_PORT", raising=False)
    monkeypatch.setattr(of_zeus, "RAPL_DIR", str(folder))
    monkeypatch.setattr(of_zeus, "CONTAINER_RAPL_DIR", str(tmp_path / "none"))
    monkeypatch.setattr(zeus.device.cpu, "_cpus", None)
    of_zeus.rapl_is_available.cache_clear()
    yield folder
    of_zeus.rapl_is_available.cache_clear()


def test_zeus_reads_rapl_without_counting_the_package_twice(rapl: Path) -> None:
    make_rapl(rapl)
    counter = ZeusCounter(0)
    trackers = [counter._cpus.cpus[0].rapl_file, counter._cpus.cpus[0].dram]
    try:
        assert counter.missing == {"gpu": "no GPU is used"}
        assert counter.read() == {"cpu": [5.0], "dram": [2.0]}
        meter = Meter(alone(), counter)
        meter.begin("train")
        (rapl / "intel-rapl:0" / "energy_uj").write_text("6500000\n")
        assert meter.end().as_dict() == {"gpu_j": None, "cpu_j": 1.5, "dram_j": None}
    finally:
        for file in trackers:
            file.wraparound_tracker._stop()


def test_a_machine_without_counters_says_what_is_missing(rapl: Path) -> None:
    counter = zeus_counter(alone())
    assert counter is not None and set(counter.missing) == {"gpu", "cpu", "dram"} and counter.read() == {}
    assert zeus_counter(Ranks(1, 2, 1, 2, torch.device("cpu"))) is None, "rank 0 of the node measures"


def test_rapl_that_may_not_be_read_says_so(rapl: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from zeus.device.cpu import rapl as of_zeus
    from zeus.device.cpu.common import ZeusCPUNoPermissionError

    make_rapl(rapl)

    def refuse(*_: object) -> None:
        raise ZeusCPUNoPermissionError("RAPL requires root privileges")

    monkeypatch.setattr(of_zeus.RAPLFile, "__init__", refuse)  # root may read any file
    assert ZeusCounter(0).missing["cpu"] == "RAPL requires root privileges"


def config(base: Path, **changes: Any) -> RunConfig:
    usual = {"run": str(base / "run"), "data__path": str(base / "data"), "train__steps": 6, "logging__every": 2}
    more = {"evaluation__every": 4, "checkpoint__every": 4, "energy__grid": 500, "energy__price_per_kwh": 0.3}
    return tiny_config(**{**usual, **more, **changes})


def measured(cfg: RunConfig, counter: energy.Counter | None) -> Any:
    """Trains, on a node with this counter."""
    from pretrain import opening

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(opening, "zeus_counter", lambda _: counter)
        return outcome_of(cfg)


# Readings at both ends of the windows of a run of 6 steps: train to 2, to 4, eval, save, train to 6, eval, save; the
# last one closes without a step.
WINDOWS = [(0, 1000), (1000, 2500), (2500, 2600), (2600, 2600), (2605, 3605), (3605, 3705), (3705, 3725), (3725, 3725)]


def check_a_run(base: Path) -> None:
    cfg = config(base)
    counter = Replay(gpus(*(at for window in WINDOWS for at in window)))
    assert measured(cfg, counter).reason == "done"
    records = read_records(cfg.run)
    phases = ["train", "eval", "save"]  # a save is recorded when it is published, which may be some steps later
    found = [(r["step"], phases.index(r["kind"]), r["gpu_j"]) for r in records if r["kind"] in phases]
    assert sorted(found, key=lambda one: one[:2]) == [
        (2, 0, 1000.0), (4, 0, 1500.0), (4, 1, 100.0), (4, 2, None), (6, 0, 1000.0), (6, 1, 100.0), (6, 2, 20.0),
    ]  # fmt: skip
    assert records[0]["kind"] == "counters" and records[0]["measured"] == ["gpu"]
    assert all(len(r["grad_norms"]) == len(r["losses"]) == 2 for r in records if r["kind"] == "train")
    assert contents.read_state(checkpoint.checkpoints(cfg.run / "checkpoints")[-1])["joules"] == {"gpu": 3700.0}


def test_a_run_with_a_counter_from_its_readings_to_the_report(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    make_data(tmp_path / "data")
    run_ranks(check_a_run, 1, tmp_path, base=tmp_path)
    run = tmp_path / "run"
    loss = next(r["loss"] for r in read_records(run) if r["kind"] == "eval")
    found = summarise(run, ["pue=1.2", f"target_loss={loss}"])
    tokens = 6 * 64
    assert found["gpu_j"] == {"train": 3500.0, "eval": 200.0, "save": 20.0}
    assert found["cpu_j"] == {"train": None, "eval": None, "save": None}
    assert found["gpu_j_per_token"] == found["j_per_token"] == 3500 / tokens
    assert found["j_per_step"] == 3500 / found["step"]
    assert found["to_target"] == {"loss": loss, "step": 4, "tokens": 4 * 64, "joules": 2500.0}
    site = 3720 / 3.6e6 * 1.2
    assert found["footprint"]["site_kwh"] == pytest.approx(site)
    assert found["footprint"]["gco2e"] == pytest.approx(site * 500) and found["footprint"]["embodied_gco2e"] is None
    assert found["footprint"]["cost"] == pytest.approx(site * 0.3)
    assert found["gradient_stability"]["residual_variance"] is None and found["gradient_stability"]["judged"] == 0

    assert main([str(run), "--energy", "pue=1.2", f"target_loss={loss}"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "3,500 J" in told and "PUE 1.2" in told and "at 500 g/kWh, given" in told and "GFLOPs/token" in told
    assert "2,500 J" in told and "CPU energy was not measured: RAPL: no permission" in told
    assert main([str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["runs"][str(run)]["footprint"]["joules"] == 3720.0
    assert main([str(run), "--energy", "grid=atlantis"]) == 2
    assert "'atlantis' must be a number in gCO2e/kWh" in capsys.readouterr().err


def check_no_counter(base: Path) -> None:
    measured(config(base, train__steps=2), None)
    budget = config(base, run=str(base / "other"), energy__stop_at_joules=100)
    with pytest.raises(ConfigError, match="could never stop by it, since no energy is measured here: gpu: no energy"):
        measured(budget, None)
    assert not (base / "other").exists()
    with pytest.raises(ConfigError, match="step-00000002 does not know what was spent before it"):
        measured(config(base, train__steps=2, energy__stop_at_joules=100), Replay(gpus(0, 1)))


def test_without_a_counter_all_joules_are_null_and_a_budget_is_refused(tmp_path: Path, capsys) -> None:
    make_data(tmp_path / "data")
    run_ranks(check_no_counter, 1, tmp_path, base=tmp_path)
    assert main([str(tmp_path / "run"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["runs"][str(tmp_path / "run")]
    assert all(joules is None for part in ("gpu", "cpu", "dram") for joules in found[f"{part}_j"].values())
    keys = ("joules", "kwh", "site_kwh", "gco2e", "cost", "embodied_gco2e")
    assert found["j_per_token"] is None and [found["footprint"][key] for key in keys] == [None] * 6
    assert found["not_measured"]["gpu"] == NO_COUNTER and found["measured"] == []
    assert main([str(tmp_path / "run")]) == 0
    assert f"GPU energy was not measured: {NO_COUNTER}" in capsys.readouterr().out


def check_lost_part(base: Path) -> None:
    def both(*readings: float) -> Replay:
        return Replay([{"gpu": [x], "cpu": [2 * x]} for x in readings], missing={"dram": "no DRAM"})

    def joules() -> Any:
        return contents.read_state(checkpoint.checkpoints(base / "run" / "checkpoints")[-1])["joules"]

    assert measured(config(base, energy__stop_at_joules=25), both(0, 10)).step == 2
    assert joules() == {"gpu": 10.0, "cpu": 20.0}
    with pytest.raises(ConfigError, match="step-00000002 counts cpu too: RAPL: no permission"):
        measured(config(base, energy__stop_at_joules=100), Replay(gpus(0, 1)))
    assert measured(config(base), Replay(gpus(100, 107))).step == 6
    assert joules() == {"gpu": 17.0}


def test_a_sum_is_of_the_parts_that_were_measured_throughout(tmp_path: Path) -> None:
    make_data(tmp_path / "data")
    run_ranks(check_lost_part, 1, tmp_path, base=tmp_path)


FAKE_ZEUS = """
def get_gpus():
    return Gpus()

class Gpus:
    mj = [5_000, 7_000, 11_000]
    def supports_get_total_energy_consumption(self, k):
        return k != 2
    def get_total_energy_consumption(self, k):
        Gpus.mj[k] += 1_500
        return Gpus.mj[k]
"""


def test_gpus_are_read_in_joules_and_refused_without_a_counter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of Zeus' interface, on a machine without a GPU."""
    fake = types.ModuleType("zeus.device")
    exec(FAKE_ZEUS, fake.__dict__)
    monkeypatch.setitem(sys.modules, "zeus.device", fake)
    two = ZeusCounter(2)
    assert "gpu" not in two.missing
    first, second = two.read()["gpu"], two.read()["gpu"]
    assert [b - a for a, b in zip(first, second, strict=True)] == [1.5, 1.5] and len(first) == 2
    assert ZeusCounter(3).missing["gpu"] == "a GPU has no energy counter (NVIDIA's have one since Volta)"
    assert ZeusCounter(0).missing["gpu"] == "no GPU is used"


def check_budget(base: Path) -> None:
    readings = gpus(*range(0, 10000, 10))  # every window takes 10 J
    small = config(base, energy__stop_at_joules=20, logging__every=1)
    first = measured(small, Replay(readings))
    told = "J were spent of energy.stop_at_joules=20"
    assert (first.code, first.step) == (0, 2) and told in first.reason, first
    kept = checkpoint.checkpoints(base / "run" / "checkpoints")
    assert [path.name for path in kept] == ["step-00000002"]
    kinds = [(r["kind"], r["step"]) for r in read_records(base / "run") if r["kind"] not in ("train", "lengths")]
    assert kinds == [("counters", 0), ("eval", 2), ("save", 2)], "its last step is scored and saved"

    again = measured(small, Replay(readings))
    assert (again.code, again.step) == (0, 2) and told in again.reason, "nothing is trained on the same budget"
    assert len(checkpoint.checkpoints(base / "run" / "checkpoints")) == 1
    larger = measured(config(base, energy__stop_at_joules=45, logging__every=1), Replay(readings))
    assert larger.step == 4, "30 J were spent before, evaluation included"
    done = measured(config(base), Replay(readings))
    assert done.reason == "done" and done.step == 6

    lost = config(base, run=str(base / "lost"), energy__stop_at_joules=1e9)
    ended = measured(lost, Replay([*readings[:2], OSError("gone")]))
    assert (ended.code, ended.step) == (0, 4) and "energy is no longer measured" in ended.reason
    assert checkpoint.checkpoints(base / "lost" / "checkpoints")


def test_a_budget_ends_a_run_well_and_only_a_larger_one_goes_on(tmp_path: Path) -> None:
    make_data(tmp_path / "data")
    run_ranks(check_budget, 1, tmp_path, base=tmp_path)


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ({"energy__stop_at_joules": 0}, "energy.stop_at_joules"),
        ({"energy__pue": 0.9}, "energy.pue"),
        ({"energy__grid": -1}, "must be gCO2e per kWh"),
        ({"energy__grid": "atlantis"}, "or one of world, australia"),
        ({"energy__price_per_kwh": -0.1}, "energy.price_per_kwh"),
    ],
)
def test_wrong_settings_are_refused(setting: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        tiny_config(**setting)


def test_spent_of_no_part_is_none() -> None:
    assert Spent(1.0).total_j is None and Spent(1.0, {"gpu": 0.0}).as_dict()["gpu_j"] is None
