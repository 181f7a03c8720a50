"""`python -m pretrain.export`: the run's own float32 masters, from any layout, in files that others can read."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from data.loader import EvaluationWindows
from data.shards import open_split
from model.decoder import Decoder
from model.head import HarmonicHead
from pretrain import export
from pretrain.analysis.evaluation import open_task, run_task
from pretrain.analysis.scoring import evaluate
from pretrain.checkpoints import weights
from pretrain.checkpoints.weights import INDEX
from pretrain.config import RunConfig, load
from pretrain.inference import Model
from pretrain.modules import build_modules
from pretrain.runtime.ranks import Ranks
from tests.support.checks import flip
from tests.support.ranks import run_ranks
from tests.support.shards import EOS
from tests.support.tiny import V, make_data, opened, tiny_config

VARIANTS: dict[str, dict[str, Any]] = {
    "zero-0": {"parallel__zero": 0, "parallel__vocab": 2},
    "zero-1": {"parallel__zero": 1, "model__tied": True, "head__exponent": "learned", "train__precision": "bf16"},
    "zero-2": {"parallel__zero": 2, "parallel__vocab": 2, "train__precision": "bf16"},
    "zero-3": {"parallel__zero": 3, "parallel__vocab": 2, "head__distance": "mahalanobis"},
}
ONE_PROCESS = Ranks(0, 1, 0, 1, torch.device("cpu"))


def config(base: Path, name: str) -> RunConfig:
    usual = {"data__path": str(base / "data"), "train__steps": 4, "checkpoint__every": 2, "train__micro_batch": 2}
    return tiny_config(run=str(base / name), **usual, **VARIANTS[name])


def check_masters(base: Path) -> dict[str, dict[str, np.ndarray]]:
    """Trains every variant; the masters that its ranks held at the end, gathered, by the exported names."""
    import deepspeed

    from model.vocab_parallel import full_rows

    found = {}
    for name in VARIANTS:
        with opened(config(base, name)) as run:
            assert run.train().code == 0
            head, engine = run.trainer.head, run.trainer.engine
            plain = type(engine.optimizer).__name__ == "AdamW"
            masters = {
                f"decoder.{key}": (p.detach() if plain else deepspeed.utils.safe_get_full_fp32_param(p)).clone().numpy()
                for key, p in engine.module.named_parameters()
            }
            masters |= {f"head.{key}": p.detach().clone().numpy() for key, p in head.named_parameters()}
            masters["head.prototypes"] = full_rows(head.prototypes.detach(), head.shard).numpy()
            found[name] = masters
    return found


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, np.ndarray]]]:
    base = tmp_path_factory.mktemp("export")
    make_data(base / "data")
    return base, run_ranks(check_masters, 2, base, base=base)[0]


def exported(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


@pytest.mark.parametrize("name", VARIANTS)
def test_weights_are_the_masters_and_score_as_the_run(trained, name: str, tmp_path: Path) -> None:
    base, masters = trained
    assert export.main([str(base / name), "--out", str(tmp_path / "out")]) == 0
    found = exported(tmp_path / "out")
    assert found.keys() == masters[name].keys()
    for key, expected in masters[name].items():
        assert found[key].dtype == torch.float32 and np.array_equal(found[key].numpy(), expected), key
    assert found["head.prototypes"].shape == (V, 32), "no row of padding"

    cfg = load(tmp_path / "out" / "config.yaml")
    decoder, head = build_modules(cfg, ONE_PROCESS)
    strict_load(decoder, head, found)
    windows = EvaluationWindows(open_split(cfg.data.path, "val"), cfg.model.seq_len)
    scored = evaluate(Model(cfg, decoder, head, step=4, eos_id=EOS).score, windows, cfg.train.micro_batch, ONE_PROCESS)
    assert scored.as_dict() == run_task(open_task(base / name), ONE_PROCESS)[0].as_dict()


def strict_load(decoder: Decoder, head: HarmonicHead, found: dict[str, torch.Tensor]) -> None:
    for prefix, module in (("decoder.", decoder), ("head.", head)):
        own = {name.removeprefix(prefix): t for name, t in found.items() if name.startswith(prefix)}
        module.load_state_dict(own, strict=True)


@pytest.mark.slow
def test_an_export_needs_no_deepspeed_and_its_files_keep_to_their_size(trained, tmp_path: Path) -> None:
    base, masters = trained
    blocked = "import sys; sys.modules['deepspeed'] = None; from pretrain.export import main; sys.exit(main())"
    arguments = [str(base / "zero-3"), "--out", str(tmp_path / "new" / "out"), "--max-gb", "3e-5"]
    done = subprocess.run([sys.executable, "-c", blocked, *arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert not done.stderr and "step-00000004" in done.stdout
    out = tmp_path / "new" / "out"
    index = json.loads((out / INDEX).read_text())
    files = sorted(path.name for path in out.glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert set(index["weight_map"].values()) == set(files)
    assert index["metadata"] == {"total_size": sum(a.nbytes for a in masters["zero-3"].values()), "step": 4}
    for file in files:
        held = load_file(out / file)
        assert held.keys() == {name for name, where in index["weight_map"].items() if where == file}
        assert len(held) == 1 or sum(t.nbytes for t in held.values()) <= 3e4
    assert exported(out).keys() == masters["zero-3"].keys()


def test_one_checkpoint_of_a_run_is_exported_by_a_relative_path(trained, tmp_path: Path, monkeypatch, capsys) -> None:
    base, masters = trained
    monkeypatch.chdir(base / "zero-0" / "checkpoints")
    assert export.main(["step-00000002", "--out", str(tmp_path / "out")]) == 0
    assert "step-00000002" in capsys.readouterr().out
    found = exported(tmp_path / "out")
    assert found.keys() == masters["zero-0"].keys()
    assert not np.array_equal(found["head.prototypes"].numpy(), masters["zero-0"]["head.prototypes"])


def test_what_cannot_be_exported_is_refused_and_nothing_is_written(trained, tmp_path: Path, capsys) -> None:
    base, _ = trained
    (tmp_path / "there").mkdir()
    (tmp_path / "file").touch()
    for arguments, told in (
        ([str(base / "zero-0"), "--out", str(tmp_path / "there")], "exists already"),
        ([str(base / "zero-0"), "--out", str(tmp_path / "file" / "out")], "cannot be made"),
        ([str(base / "zero-0"), "--out", str(tmp_path / "out"), "--max-gb", "0"], "must be positive"),
        ([str(base / "nowhere"), "--out", str(tmp_path / "out")], "neither a run folder nor a checkpoint"),
    ):
        assert export.main(arguments) == 2
        assert told in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"there", "file"} and not list((tmp_path / "there").iterdir())


def test_an_export_is_whole_or_absent(trained, tmp_path: Path, monkeypatch, capsys) -> None:
    base, _ = trained

    def full(*_: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(weights, "publish", full)
    assert export.main([str(base / "zero-0"), "--out", str(tmp_path / "out")]) == 2
    assert "no space left" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_damaged_checkpoint_is_not_exported(trained, tmp_path: Path, capsys) -> None:
    base, _ = trained
    newest = base / "zero-1" / "checkpoints" / "step-00000004"
    victim = next(newest.glob("*.safetensors"))
    flip(victim)
    assert export.main([str(newest), "--out", str(tmp_path / "out")]) == 2
    assert victim.name in capsys.readouterr().err and not (tmp_path / "out").exists()
    flip(victim)


def test_a_checkpoint_under_another_name_is_exported_with_its_step(trained, tmp_path: Path) -> None:
    base, _ = trained
    run = shutil.copytree(base / "zero-1", tmp_path / "run")
    copy = shutil.copytree(run / "checkpoints" / "step-00000004", run / "checkpoints" / "best")
    assert export.main([str(copy), "--out", str(tmp_path / "out")]) == 0
    assert json.loads((tmp_path / "out" / INDEX).read_text())["metadata"]["step"] == 4


def test_weights_of_another_model_than_the_config_says_are_not_exported(trained, tmp_path: Path, capsys) -> None:
    base, _ = trained
    run = shutil.copytree(base / "zero-1", tmp_path / "run")
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("layers: 2", "layers: 3"))
    assert export.main([str(run), "--out", str(tmp_path / "out")]) == 2
    assert "model.layers is 2 in this checkpoint, but 3 was given" in capsys.readouterr().err
