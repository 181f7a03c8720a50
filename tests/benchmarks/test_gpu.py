"""`python -m benchmarks.gpu`: all of it at small sizes, and what it does when a stage fails, hangs or is cut off."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import checks, energy, head, ranks, train
from benchmarks.gpu.findings import Findings
from benchmarks.gpu.stages import STAGES, Stage, chosen
from benchmarks.machine import slug

SCRIPT = (
    "import json, os, subprocess, sys, time\nwrite = lambda **found: open(sys.argv[2], 'w').write(json.dumps(found))\n"
)
SLEEPER = "[sys.executable, '-c', 'import time; time.sleep(600)']"


def stage(name: str, script: str) -> Stage:
    return Stage(name, f"what {name} does", 1.0, 0.1, command=(sys.executable, "-c", SCRIPT + script))


def run(folder: Path, stages: Sequence[Stage], monkeypatch: pytest.MonkeyPatch, minutes: float = 1) -> tuple[int, Any]:
    """The exit code, and what the JSON says of the stages."""
    monkeypatch.setattr(command, "gpu_name", lambda: None)
    code = command.main(["--minutes", str(minutes), "--out", str(folder)], stages)
    return code, json.loads((folder / "gpu-cpu.json").read_text())["stages"]


# Counts of what there is none of; small sizes may do with memory that lay free.
MAY_BE_ZERO = ("failed", "exit_code", "skipped", "extra_mib")


def not_positive(tree: Any, path: str) -> list[str]:
    """Where figures in plain values are not above 0, and what they are."""
    if isinstance(tree, dict):
        return [
            n for key, value in tree.items() if key not in MAY_BE_ZERO for n in not_positive(value, f"{path}/{key}")
        ]
    if isinstance(tree, list):
        return [n for index, value in enumerate(tree) for n in not_positive(value, f"{path}[{index}]")]
    is_number = isinstance(tree, int | float) and not isinstance(tree, bool)
    return [f"{path}: {tree}"] if is_number and not tree > 0 else []


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.timeout(900)
def test_the_whole_command_without_a_gpu(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "benchmarks.gpu", "--minutes", "13", "--small", "--out", str(tmp_path / "out")]
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, env=hidden, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"gpu-cpu.json", "gpu-cpu.md", "gpu-cpu.log"}
    found = json.loads((tmp_path / "out" / "gpu-cpu.json").read_text())
    assert found["small"] and found["format"] == 1 and list(found["stages"]) == [one.name for one in STAGES]
    page = (tmp_path / "out" / "gpu-cpu.md").read_text()
    for name, result in found["stages"].items():
        assert name in done.stdout and f"| {name} | {result['outcome']} |" in page
        assert result["seconds"] > 0 and not result["problems"] and not result["left_out"]
        if result["outcome"] == "skipped":
            assert result["reason"] == "needs a GPU" and name == "energy"
        else:
            assert result["outcome"] == "ok" and result["headline"]
            assert not not_positive([result["figures"], result["tables"].get("products", [])], name)
    stages = found["stages"]
    assert {"copy_tb_s", "bf16_square_256_tflop_s", "flash-attn"} <= set(stages["facts"]["figures"])
    assert stages["tests"]["figures"]["passed"] >= 5
    assert {row["head"] for row in stages["head"]["tables"]["products"]} >= set(head.PRODUCTS)
    assert {row["head"] for row in stages["head"]["tables"]["entry by entry"]} == {"manhattan", *head.ENTRYWISE}
    assert all(row["launches"] > 0 for row in stages["head"]["tables"]["kernels"])
    assert [row["run"] for row in stages["train"]["tables"]["runs"]] == ["euclidean", "plain PyTorch, softmax"]
    assert all(row["tokens_per_s"] > 0 for row in stages["train"]["tables"]["runs"])
    assert stages["train"]["tables"]["resume"][0]["steps"] >= train.MORE
    assert stages["ranks"]["figures"]["largest_relative_difference"] <= ranks.APART


def test_a_stage_that_fails_is_named_and_the_others_go_on(tmp_path: Path, monkeypatch, capsys) -> None:
    stages = [
        stage("broken", "print('out of order', file=sys.stderr); sys.exit(3)"),
        stage("wrong", "write(figures={'x_ms': 2.5}, problems=['x is too large'])"),
        stage("sound", "write(figures={'y_ms': 1.5}, headline=['y is fine'])"),
    ]
    code, found = run(tmp_path, stages, monkeypatch)
    assert code == 1
    assert (found["broken"]["outcome"], found["broken"]["reason"]) == ("failed", "ended with exit code 3")
    assert "out of order" in found["broken"]["output_tail"]
    assert (found["wrong"]["outcome"], found["wrong"]["reason"]) == ("failed", "x is too large")
    assert found["wrong"]["figures"] == {"x_ms": 2.5} and found["sound"]["outcome"] == "ok"
    shown = capsys.readouterr().out
    assert "not done: broken, wrong\n" in shown and "y is fine" in shown and "x is too large" in shown
    page = (tmp_path / "gpu-cpu.md").read_text()
    assert "| x_ms | 2.5 |" in page and "out of order" in page


@pytest.mark.parametrize("session", [False, True], ids=["its group", "a session of its own"])
def test_a_stage_over_its_limit_is_killed_with_its_children(session: bool, tmp_path: Path, monkeypatch) -> None:
    hanging = f"child = subprocess.Popen({SLEEPER}, start_new_session={session})\n"
    hanging += "write(figures={'child': child.pid})\ntime.sleep(600)"
    stages = [stage("first", "write(figures={'x_ms': 1.5})"), stage("hangs", hanging), stage("last", "write()")]
    code, found = run(tmp_path, stages, monkeypatch, minutes=0.2)
    assert code == 1
    assert [one["outcome"] for one in found.values()] == ["ok", "timed out", "ok"]
    assert found["first"]["figures"] == {"x_ms": 1.5}
    assert not alive(found["hangs"]["figures"]["child"])


def test_what_a_stage_leaves_running_is_ended(tmp_path: Path, monkeypatch) -> None:
    script = f"write(figures={{'child': subprocess.Popen({SLEEPER}).pid}})"
    code, found = run(tmp_path, [stage("leaves", script)], monkeypatch)
    assert code == 0
    time.sleep(0.1)
    assert not alive(found["leaves"]["figures"]["child"])


def test_results_are_on_disk_after_each_stage_and_within_one(tmp_path: Path, monkeypatch) -> None:
    looks = f"found = json.load(open({str(tmp_path / 'gpu-cpu.json')!r}))['stages']\n"
    looks += "assert found['first']['figures'] == {'x_ms': 1.5} and found['first']['outcome'] == 'ok'\n"
    looks += "assert found['second']['outcome'] is None or found['second']['outcome'] == 'running'\n"
    within = "write(figures={'y_ms': 2.5})\n"
    within += (
        f"for _ in range(200):\n time.sleep(0.05)\n try: found = json.load(open({str(tmp_path / 'gpu-cpu.json')!r}))\n"
    )
    within += " except ValueError: continue\n if found['stages']['second']['figures']: sys.exit(0)\nsys.exit(1)"
    stages = [stage("first", "write(figures={'x_ms': 1.5})"), stage("second", looks + within)]
    code, found = run(tmp_path, stages, monkeypatch)
    assert code == 0, found["second"]["output_tail"]


def test_a_stage_without_time_is_a_failure_and_skipped_or_cut_short_is_none(
    tmp_path: Path, monkeypatch, capsys
) -> None:
    skips = stage("skips", "write(not_run='Zeus is not installed')")
    code, found = run(tmp_path, [skips], monkeypatch)
    assert code == 0 and (found["skips"]["outcome"], found["skips"]["reason"]) == ("skipped", "Zeus is not installed")
    code, found = run(tmp_path, [skips, stage("slow", "write(left_out=['the last row'])")], monkeypatch)
    assert code == 0 and found["slow"]["outcome"] == "cut short" and "the last row" in found["slow"]["reason"]
    late = Stage("late", "what it does", 1.0, 3600, command=("false",))
    code, found = run(tmp_path, [skips, late], monkeypatch)
    assert code == 1 and found["late"]["outcome"] == "no time" and "it needs 3600" in found["late"]["reason"]


def test_a_stage_without_its_packages_is_skipped(tmp_path: Path) -> None:
    path = tmp_path / "findings.json"
    assert Stage("one", "", 1.0, 1.0, "benchmarks.gpu.facts", needs=("json", "no_such_package")).run(path, 9, True) == 0
    assert json.loads(path.read_text())["not_run"] == "not installed: no_such_package"


def test_a_command_that_is_told_to_end_ends_its_stage(tmp_path: Path) -> None:
    script = f"write(figures={{'child': subprocess.Popen({SLEEPER}).pid}})\ntime.sleep(600)"
    program = "import sys\nfrom benchmarks.gpu import __main__ as command\nfrom benchmarks.gpu.stages import Stage\n"
    program += "command.gpu_name = lambda: None\n"
    program += (
        f"stages = [Stage('one', 'what it does', 1.0, 1.0, command=(sys.executable, '-c', {SCRIPT + script!r}))]\n"
    )
    program += f"sys.exit(command.main(['--out', {str(tmp_path)!r}], stages))"
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = {}
    for _ in range(300):
        if (tmp_path / "gpu-cpu.json").exists():
            found = json.loads((tmp_path / "gpu-cpu.json").read_text())["stages"]["one"]
        if found.get("figures"):
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    shown, _ = process.communicate(timeout=30)
    assert process.returncode == 1 and "ended by SIGTERM" in shown
    one = json.loads((tmp_path / "gpu-cpu.json").read_text())["stages"]["one"]
    assert one["outcome"] == "interrupted" and not alive(one["figures"]["child"])


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--minutes", "0"], "--minutes 0: expected a number above 0, such as --minutes 9"),
        (["--minutes", "nan"], "--minutes nan: expected a number above 0"),
        (["--stages", "facts,had"], "there is no stage had; give some of facts,tests,head,train,ranks,energy"),
        (["--stages", ","], "names no stage"),
        (["--out", "README.md"], "--out README.md: "),
    ],
)
def test_bad_input_is_refused(words: list[str], told: str, capsys) -> None:
    assert command.main(words) == 2
    assert told in capsys.readouterr().err


def test_stages_keep_their_order_and_share_what_is_left() -> None:
    assert [one.name for one in chosen("energy, facts", STAGES)] == ["facts", "energy"]
    a, b = Stage("a", "", 1.0, 5.0), Stage("b", "", 3.0, 5.0)
    assert command.limit_of(a, [b], 100) == 25
    assert command.limit_of(b, [], 90) == 90
    assert command.limit_of(a, [b], 8) == 5  # its least
    assert command.limit_of(a, [b], 4) == 4


def test_a_page_by_hand_is_not_written_over(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "gpu-cpu.md").write_text("by hand")
    monkeypatch.setattr(command, "gpu_name", lambda: None)
    assert command.main(["--out", str(tmp_path)], [stage("one", "write()")]) == 0
    assert (tmp_path / "gpu-cpu.md").read_text() == "by hand"
    assert len(list(tmp_path.glob("gpu-cpu-20*.md"))) == 1 and len(list(tmp_path.iterdir())) == 4
    assert slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"


WORKER = """
import json, os, sys, time
say = lambda **line: print(json.dumps(line), flush=True)
first = int(sys.argv[1])
say(rows=["a", "dies", "hangs", "b"], skipped={"Liger": "not installed"})
for index in range(first, 4):
    say(begun=index)
    if index == 1:
        os._exit(7)
    if index == 2:
        time.sleep(600)
    row = dict(head="dot", design=str(index), tokens=1, dim=1, vocab=1, ratio=1.5, loss=1.0 + index)
    row["kernels"] = [{"kernel": "k", "ms": 1.0}]
    say(done=index, table="products", row=row)
"""


def test_a_row_that_dies_or_hangs_costs_that_row(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(head, "ROW_S", 0.5)
    monkeypatch.setattr(head, "NEED_S", 0.1)
    findings = Findings(tmp_path / "findings.json", 60, small=False, scratch=tmp_path)
    head.Watched(findings, [sys.executable, "-c", WORKER]).run()
    assert [row["design"] for row in findings.tables["products"]] == ["0", "3"]
    assert len(findings.tables["kernels"]) == 2 and findings.skipped == {"Liger": "not installed"}
    dies, hangs, differs = findings.problems
    assert dies == "dies: its process ended with code 7" and hangs == "hangs: no answer within 0 s"
    assert "loss is 4, and 1 with the other design" in differs
    assert not findings.left_out and json.loads((tmp_path / "findings.json").read_text())["problems"]


def test_the_most_valuable_rows_of_the_head_come_first() -> None:
    rows = head.plan(False, (False, True), ["softmax, Liger"], 3)
    first = [(row.head, row.fused, row.dim, row.vocab) for row in rows[:6]]
    assert first == [(name, fused, 768, 50_304) for name in head.PRODUCTS for fused in (False, True)]
    assert rows[6].head == "softmax, Liger" and rows[7].vocab == 50_257
    assert [row.tile for row in rows if row.table == "tiles"] == [0, 1, 2]
    assert {row.tokens for row in rows if row.table == "entry by entry"} == {4096}


@pytest.mark.parametrize("by_keyword", [False, True])
def test_a_tile_is_chosen_for_a_while(by_keyword: bool) -> None:
    class Module:
        TILES = ("small", "large")

        @staticmethod
        def scores(tile: str = "small") -> str:
            return tile

    if not by_keyword:
        Module.tile = staticmethod(lambda dim: "small")  # type: ignore[attr-defined]
    ask = (lambda: Module.scores()) if by_keyword else (lambda: Module.tile(768))  # type: ignore[attr-defined]
    with head.with_tile(Module, "large") as used:
        assert ask() == "large" and used
    assert ask() == "small"


def test_power_readings_are_integrated_by_their_own_times() -> None:
    text = "".join(f"2026/11/27 12:00:{k // 10:02d}.{k % 10}00, {100 + k}.00\n" for k in range(20)) + "2026/11/27 12:0"
    power = energy.readings(text + "\n2026/11/27 12:00:03.000, [N/A]\n")
    assert len(power) == 20
    start = power[0][0]
    assert energy.integral_j(power, start, start + 1.9) == pytest.approx(1.9 * 109.5)
    assert energy.integral_j(power, start, start + 0.5) is None


def test_figures_are_of_the_steps_after_the_first() -> None:
    def record(step: int, seconds: float, joules: float | None) -> dict[str, Any]:
        return {"kind": "train", "step": step, "losses": [1.0], "loss": 1.0, "seconds": seconds, "gpu_j": joules,
                "tokens_per_s": 100 / seconds, "mfu": 0.5 / seconds, "data_wait_s": 0.0}  # fmt: skip

    found = train.steady([record(1, 90, 9), record(2, 8, 9), record(3, 8, 9), record(4, 1, 20), record(5, 3, 40)])
    assert found is not None and found["tokens_per_s"] == 50 and found["steps_measured"] == 2
    assert found["gpu_j_per_token"] == 60 / 200 and found["mfu"] == pytest.approx(0.25)
    assert train.steady([record(1, 90, 9)]) is None
    without = train.steady([record(1, 90, None), record(2, 8, None)])
    assert without is not None and without["gpu_j_per_token"] is None


def test_a_tally_counts_what_was_cut_off(tmp_path: Path) -> None:
    tally = tmp_path / "tally"
    tally.write_text('["a", "passed"]\n["b", "failed"]\n["b", "passed"]\n["c", "skip')
    assert checks.outcomes(tally) == {"a": "passed", "b": "failed"}
    assert checks.outcomes(tmp_path / "none") == {}
    assert checks.files_with_marks()[-1] == "tests/model/test_gpu_kernels.py"


def test_losses_are_compared_over_all_steps() -> None:
    truth = [4.0, 2.0, 1.0, 1.0, 1.0, 1.0]
    assert ranks.furthest(truth, [4.0, 2.002, 1.0, 1.0, 1.0, 1.0]) == pytest.approx(1e-3)
    assert ranks.furthest(truth, truth[:5]) is None and ranks.furthest(truth, [None, *truth[1:]]) is None


def test_the_head_is_measured_without_pydantic() -> None:
    program = "import sys\nclass No:\n    def find_spec(self, name, path=None, target=None):\n"
    program += "        if name.split('.')[0] in ('pydantic', 'deepspeed', 'zeus', 'datasets', 'psutil', 'yaml'):\n"
    program += "            raise ImportError(name)\nsys.meta_path.insert(0, No())\nimport benchmarks.head\n"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_the_design_is_handed_to_heads_that_are_products(monkeypatch) -> None:
    import torch

    from benchmarks import head as benchmark

    given: list[dict[str, Any]] = []
    monkeypatch.setattr(benchmark, "harmonic_loss", lambda *inputs, **options: given.append(options))
    x = torch.zeros(2, 4)
    for row, fused in (("cosine", None), ("cosine", True), ("dot", False), ("manhattan", True)):
        benchmark.loss_of(row, fused)(x, x, torch.zeros(2, dtype=torch.int64))
    assert [options.get("fused") for options in given] == [None, True, False, None]
    assert "fused" not in given[0]
