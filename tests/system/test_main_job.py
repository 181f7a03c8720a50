"""The main job at reduced size, as a user runs it: prepare, train under the real launcher, stop, resume, evaluate,
report.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pretrain.config import load
from tests.support.commands import call
from tests.support.ranks import run_ranks
from tests.support.tiny import run_to_end

SMALL = [
    "data.source={kind: files, paths: ['{base}/text/*.txt'], separator: '@@@'}",
    "data.path={base}/prepared",
    "run={base}/run",
    "data.tokenizer.vocab_size=384",
    "data.val_fraction=0.2",
    "model.seq_len=32",
    "model.layers=2",
    "model.heads=2",
    "model.dim=32",
    "train.tokens_per_step=256",
    "train.micro_batch=4",
    "optim.warmup_steps=4",
    "evaluation.every=10",
    "checkpoint.every=5",
    "logging.every=1",
]
PYTHON = [sys.executable, "-m"]


def anew(*arguments: str) -> subprocess.CompletedProcess[str]:
    """In a Python of its own, which starts others."""
    return subprocess.run([*PYTHON, *arguments], capture_output=True, text=True, timeout=240)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """Prepared data of this repository's own words."""
    base = tmp_path_factory.mktemp("main-job")
    (base / "text").mkdir()
    words = "@@@".join(path.read_text() for path in sorted(Path("data").rglob("*.py")))
    (base / "text" / "words.txt").write_text(words.replace("\n\n", "@@@"))
    made = anew("data", "prepare", "configs/quickstart.yaml", *settings(base))
    assert made.returncode == 0, made.stderr
    return base


def settings(base: Path, *more: str) -> list[str]:
    return [setting.replace("{base}", str(base)) for setting in SMALL] + list(more)


def records(run: Path, kind: str) -> list[dict]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [record for record in found if record["kind"] == kind]


def test_quickstart_at_reduced_size(base: Path) -> None:
    """Two ranks under deepspeed; run again it reuses what is done; one rank goes on from the same checkpoints."""
    command = ["launch", "run", "configs/quickstart.yaml", "--num-gpus", "2", *settings(base, "train.steps=20")]
    trained = anew(*command)
    assert trained.returncode == 0, trained.stdout[-3000:] + trained.stderr[-3000:]
    port = trained.stdout.partition("--master_port ")[2].split()[0]
    assert not list(Path("/dev/shm").glob(f"deepspeed_*_{port}_*")), "memory that nobody frees"
    run = base / "run"
    losses = [record["loss"] for record in records(run, "train")]
    assert len(losses) == 20 and losses[-1] < losses[0] - 0.3
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"latest", "step-00000015", "step-00000020"}
    assert len(list((run / "checkpoints" / "step-00000020").glob("*.safetensors"))) == 2, "each rank wrote its part"
    assert list(run.glob("events.out.tfevents.*"))
    assert json.loads((run / "exit.json").read_text())["code"] == 0

    again = anew(*command)
    assert again.returncode == 0 and "resumed from" in again.stdout
    assert [record["loss"] for record in records(run, "train")] == losses, "nothing was trained twice"
    assert [record["step"] for record in records(run, "eval")] == [10, 20], "nor evaluated twice"

    report = call("-m", "pretrain.report", str(run))
    assert report.returncode == 0 and "not measured: no energy counter" in report.stdout
    assert f"{records(run, 'eval')[-1]['bits_per_byte']:.4f}" in report.stdout
    held_out = call("-m", "pretrain.evaluate", str(run), "--json")
    assert json.loads(held_out.stdout)["loss"] == pytest.approx(records(run, "eval")[-1]["loss"], rel=2e-3)

    verified = call("-m", "pretrain.verify", str(run))
    assert verified.returncode == 0 and verified.stdout.startswith("PASS: 2 checkpoints are whole; "), verified.stdout
    exported = call("-m", "pretrain.export", str(run), "--out", str(base / "weights"))
    assert exported.returncode == 0 and (base / "weights" / "model.safetensors").exists(), exported.stderr

    changed = call("-m", "pretrain", "configs/quickstart.yaml", *settings(base, "train.steps=20", "model.layers=3"))
    assert changed.returncode == 2 and "model.layers was 2 and is 3" in changed.stderr
    assert "Traceback" not in changed.stderr


def test_sigterm_saves_and_the_resumed_run_is_the_unbroken_one(base: Path) -> None:
    """`launch run` on two ranks, stopped by SIGTERM, exits 75 with a checkpoint; run again it ends as if unbroken."""

    more = settings(base, "train.steps=50", "checkpoint.every=1000", "evaluation.every=1000")
    command = ["launch", "run", "configs/quickstart.yaml", "--num-gpus", "2", *more, f"run={base / 'cut'}"]
    process = subprocess.Popen([*PYTHON, *command], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 10/"):
            process.send_signal(signal.SIGTERM)
            break
    process.stdout.read()
    assert process.wait(timeout=60) == 75
    ended = json.loads((base / "cut" / "exit.json").read_text())
    assert ended["code"] == 75 and ended["reason"].startswith("stopped by") and 10 <= ended["step"] < 50
    assert (base / "cut" / "checkpoints" / f"step-{ended['step']:08d}").is_dir()
    assert anew(*command).returncode == 0
    cfg = load("configs/quickstart.yaml", [*more, f"run={base / 'whole'}"])
    whole = run_ranks(run_to_end, 2, base, cfg=cfg)[0]
    assert len(whole) == 50 and [record["loss"] for record in records(base / "cut", "train")] == whole


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["head.exponnent=3"], "did you mean head.exponent?"),
        (["train.steps=many"], "train.steps"),
        (["head.exponent=0"], "must be positive"),
        (["parallel.vocab=3"], "does not divide the world of 2"),
        (["train.tokens_per_step=288"], "must be a multiple of"),
        (["data.tokenizer.vocab_size=100000"], "does not fit dtype uint16"),
        (["data.path=/nowhere"], "data prepare"),
        (["not-an-override"], "key=value"),
    ],
)
def test_bad_input_stops_before_anything_starts(base: Path, overrides: list[str], told: str) -> None:
    target = f"run={base / 'never'}"
    refused = anew("launch", "run", "configs/quickstart.yaml", "--num-gpus", "2", *settings(base, target, *overrides))
    assert refused.returncode == 2, refused.stderr
    assert told in refused.stderr and "Traceback" not in refused.stderr
    assert not (base / "never").exists()


def test_too_many_bad_steps_end_the_run(base: Path) -> None:
    """A learning rate that is not a rate: weights overflow, steps are skipped, and the run says so with its own
    code.
    """
    more = ["train.steps=60", "optim.lr=1.0e30", "optim.min_lr=0", "optim.max_skipped=3", f"run={base / 'diverged'}"]
    ended = call("-m", "pretrain", "configs/quickstart.yaml", *settings(base, *more, "train.precision=float32"))
    assert ended.returncode == 3, ended.stderr[-2000:]
    assert "steps in a row were not finite" in ended.stderr
    assert records(base / "diverged", "train")[-1]["skipped"] > 0
