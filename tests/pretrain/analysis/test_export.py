"""`python -m model export`: from a run to a folder that works alone, or to an error and no folder."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from data.nanogpt import EOS, VOCAB_SIZE, import_nanogpt
from data.vocabulary import open_tokenizer
from pretrain.analysis.export import _facts
from pretrain.checkpoints.contents import read_state
from pretrain.config import dump, load
from pretrain.export import main
from pretrain.run_folder import RunFolder
from tests.support.ranks import run_ranks
from tests.support.tiny import make_text, run_to_end, text_config, tiny_config

pytest.importorskip("transformers")

RUNS: dict[str, dict[str, Any]] = {
    "causal": {
        "model__tied": True, "model__document_mask": True, "head__distance": "mahalanobis",
        "head__exponent": {"first": 1.0, "last": 4.0, "steps": 3}, "checkpoint__every": 2,
    },
    "masked": {"model__objective": "masked", "head__exponent": "learned"},
}  # fmt: skip
TEXT = "one café at a time 🙂 "  # and a NUL, which no argument of a command can hold
ALONE = """
import re, sys, torch
for name in ("data", "model", "pretrain", "launch"):
    sys.modules[name] = None
text, *folders = sys.argv[1:]
for FOLDER in folders:
    (usage,) = re.findall(r"```python\\n(.*?)```", open(FOLDER + "/README.md").read(), re.DOTALL)
    exec(usage)
    ids = tokenizer(text + chr(0), return_tensors="pt")["input_ids"]
    with torch.no_grad():
        torch.save((ids, model.eval()(ids).logits.log_softmax(-1)), FOLDER + ".pt")
"""


def check_runs(base: Path) -> None:
    from pretrain.runtime import ranks as process

    process.stop = lambda: None  # the tests' own group
    for name, changes in RUNS.items():
        run_to_end(text_config(base, **{**changes, "run": str(base / name)}))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("export")
    make_text(base / "data")
    run_ranks(check_runs, 1, base, base=base)
    return base


@pytest.mark.slow
def test_folders_work_alone_and_offline(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By what their cards say, in a process that has none of our code."""
    folders = {name: tmp_path / "new" / name for name in RUNS}
    for name, out in folders.items():
        assert main(["--format", "transformers", str(trained / name), "--out", str(out)]) == 0
        assert "step-00000004" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "new").iterdir()} == RUNS.keys()

    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    alone = [sys.executable, "-c", ALONE, TEXT, *map(str, folders.values())]
    used = subprocess.run(alone, capture_output=True, text=True, timeout=300, cwd=tmp_path, env=environment)
    assert used.returncode == 0 and used.stdout, used.stderr

    for name, out in folders.items():
        run = RunFolder(trained / name)
        cfg, model = run.settings(), run.open_model()
        tokenizer = open_tokenizer(cfg.data.path)
        ids, log_probs = torch.load(f"{out}.pt")
        opening = [tokenizer.eos_id] if cfg.model.causal else []
        assert ids.tolist() == [opening + tokenizer.encode(TEXT + "\0")]
        torch.testing.assert_close(log_probs, model.head.log_probs(model.hidden(ids)), atol=1e-5, rtol=0)
        exponent = json.loads((out / "config.json").read_text())["exponent"]
        assert exponent == {"causal": 4.0, "masked": None}[name], "the end of its ramp, or a weight"


def test_the_card_tells_what_the_run_came_to(trained: Path, tmp_path: Path) -> None:
    from data.manifest import fingerprint, read_manifest
    from tests.support.records import read_records

    assert main(["--format", "transformers", str(trained / "causal"), "--out", str(tmp_path / "out")]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    cells = dict(re.findall(r"^\| (.+?) \| (.+) \|$", card, re.MULTILINE))
    (held_out,) = [record for record in read_records(trained / "causal") if record["kind"] == "eval"]
    assert cells["updates"] == "4 of 4" and cells["training tokens"] == "1,024"
    assert cells["held-out perplexity"] == f"{held_out['perplexity']:.4f}"
    assert cells["held-out bits/byte"] == f"{held_out['bits_per_byte']:.4f}"
    assert cells["held-out figures are of update"] == "4"
    assert cells["energy, of all phases"] == "not measured"
    assert cells["fingerprint of the data"] == f"`{fingerprint(read_manifest(trained / 'data'))}`"
    cfg, state = load(trained / "causal" / "config.yaml"), read_state(RunFolder(trained / "causal").checkpoint())
    measured = _facts(RunFolder(trained / "causal"), {**state, "joules": {"gpu": 1000.0, "cpu": 234.6}}, cfg, 1)
    assert measured["energy, of all phases"] == "1,235 J (gpu, cpu)"
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert cells["parameters"] == f"{sum(w.numel() for w in weights.values()):,}"
    assert (trained / "causal" / "config.yaml").read_text().strip() in card


def test_an_earlier_checkpoint_has_its_own_figures(trained: Path, tmp_path: Path) -> None:
    """Half way up the exponent's ramp, before anything was held out."""
    given = trained / "causal" / "checkpoints" / "step-00000002"
    assert main(["--format", "transformers", str(given), "--out", str(tmp_path / "out")]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| updates | 2 of 4 |" in card and "| held-out perplexity | not measured |" in card
    assert json.loads((tmp_path / "out" / "config.json").read_text())["exponent"] == 2.5


def test_weights_in_several_files(trained: Path, tmp_path: Path) -> None:
    from model.hf.modeling_overtone import OvertoneForCausalLM

    assert main(["--format", "transformers", str(trained / "causal"), "--out", str(tmp_path / "one")]) == 0
    small = ["--out", str(tmp_path / "many"), "--max-gb", "3e-5"]
    assert main(["--format", "transformers", str(trained / "causal"), *small]) == 0
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    loaded = OvertoneForCausalLM.from_pretrained(tmp_path / "many")
    whole = load_file(tmp_path / "one" / "model.safetensors")
    found = loaded.state_dict()
    assert found.keys() == whole.keys() and all(torch.equal(found[name], whole[name]) for name in whole)


def test_what_cannot_be_exported(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, out = str(trained / "causal"), tmp_path / "out"
    (tmp_path / "there").mkdir()
    (tmp_path / "file").touch()
    shutil.copytree(trained / "causal", tmp_path / "empty", ignore=shutil.ignore_patterns("checkpoints"))
    shutil.copytree(trained / "causal", tmp_path / "changed")
    config = tmp_path / "changed" / "config.yaml"
    config.write_text(config.read_text().replace("layers: 2", "layers: 3"))
    (tmp_path / "imported").mkdir()
    cfg = tiny_config(data__path=str(imported(tmp_path)), data__tokenizer__vocab_size=VOCAB_SIZE)
    (tmp_path / "imported" / "config.yaml").write_text(dump(cfg))
    before = sorted(tmp_path.rglob("*"))
    for arguments, why in (
        ([run, "--out", str(tmp_path / "there")], "exists already; give a new folder"),
        ([run, "--out", str(tmp_path / "file" / "out")], "cannot be made"),
        ([str(trained / "nowhere"), "--out", str(out)], "neither a run folder nor a checkpoint"),
        ([str(tmp_path / "empty"), "--out", str(out)], "there is no checkpoint, but there were some, as"),
        ([str(tmp_path / "changed"), "--out", str(out)], "model.layers is 2 in this checkpoint, but 3 was given"),
        ([str(tmp_path / "imported"), "--out", str(out)], "was imported as tokens"),
    ):
        assert main(["--format", "transformers", *arguments]) == 2
        assert why in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def imported(base: Path) -> Path:
    """A folder of prepared data without a vocabulary."""
    (base / "bins").mkdir()
    for split in ("train", "val"):
        np.array([1, 2, 3, EOS] * 40, dtype="<u2").tofile(base / "bins" / f"{split}.bin")
    import_nanogpt(base / "bins", base / "ids", log=lambda _: None)
    return base / "ids"
