"""Held-out figures: every token once, the true likelihood, the same on any number of ranks."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from torch.nn import functional as F

from common.errors import ConfigError
from common.files import sha256_of
from data.loader import EvaluationWindows
from data.manifest import fingerprint
from data.shards import open_split
from model.reference import scores_reference
from pretrain import evaluate
from pretrain.analysis import evaluation as evaluation_task
from pretrain.analysis.scoring import Difference, Evaluation, compare, unigram_bits_per_byte
from pretrain.analysis.scoring import evaluate as evaluate_windows
from pretrain.checkpoints.loading import load_weights
from pretrain.config import RunConfig, load
from pretrain.inference import Model
from pretrain.modules import build_modules
from pretrain.runtime import ranks as process
from pretrain.runtime.ranks import Ranks
from tests.support.commands import call
from tests.support.ranks import run_ranks
from tests.support.records import read_records
from tests.support.shards import EOS
from tests.support.tiny import (
    T,
    V,
    make_data,
    run_to_end,
    tiny_config,
)
from tests.support.variants import VARIANTS

ALONE = Ranks(0, 1, 0, 1, torch.device("cpu"))


@pytest.fixture(autouse=True)
def own_environment() -> Iterator[None]:
    """What starts a process group leaves its variables behind; other tests' processes must not inherit them."""
    with mock.patch.dict(os.environ):
        yield


def check_training(base: Path) -> None:
    kinds: dict[str, dict[str, Any]] = {
        "run": {},
        "tied": {"model__tied": True, "head__distance": "cosine", "head__exponent": "learned"},
        "bf16": {"train__precision": "bf16", "parallel__zero": 1},
    }
    for name, changes in kinds.items():
        run_to_end(tiny_config(run=str(base / name), data__path=str(base / "data"), train__steps=4, **changes))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("trained")
    make_data(base / "data", test_tokens=97)
    run_ranks(check_training, 1, base, base=base)
    return base


def reference(cfg: RunConfig, decoder: Any, head: Any, stride: int, name: str = "val") -> tuple[np.ndarray, np.ndarray]:
    """Each token's nats and whether it is the most probable, by float64 arithmetic, token by token: from the first T
    tokens or those that its window holds.
    """
    decoder.double().eval()
    head.eval()
    split = open_split(cfg.data.path, name)
    stream = [split.eos_id, *split.read(0, split.tokens).tolist()]  # stream[i] is read when token i is scored
    nats, hits = [], []
    for token in range(split.tokens):
        last = (token // stride + 1) * stride  # one past the last token of the window
        inputs = torch.tensor([stream[max(last - T, 0) : token + 1]])
        with torch.no_grad():
            embedded = F.embedding(inputs, head.prototypes.double()) if cfg.model.tied else inputs
            hidden = decoder(embedded)[0, -1:]
            scores = scores_reference(hidden, head.prototypes, head.score_function, head.exponent)[0]
        nats.append(F.cross_entropy(scores, torch.tensor(stream[token + 1])).item())
        hits.append(scores.argmax().item() == stream[token + 1])
    return np.array(nats), np.array(hits)


def of_run(run: Path, stride: int = T) -> tuple[np.ndarray, np.ndarray]:
    cfg = load(run / "config.yaml")
    decoder, head = build_modules(cfg, ALONE)
    load_weights(run / "checkpoints" / "step-00000004", decoder, head)
    return reference(cfg, decoder, head, stride)


def check_evaluation(tasks: list[tuple[Path, int]], vocab: int) -> list[dict[str, Any]]:
    ranks = process.with_groups(process.start(), vocab)
    opened = (evaluation_task.open_task(run, stride=stride) for run, stride in tasks)
    results = [evaluation_task.run_task(task, ranks)[0] for task in opened]
    if ranks.world == 1:
        process.stop()
    return [{**found.as_dict(), **found.standard_errors(), "nats": found.nats} for found in results]


@pytest.mark.parametrize(("world", "vocab"), [pytest.param(1, 1, marks=pytest.mark.slow), (4, 2)])
def test_evaluation_is_the_reference_on_any_number_of_ranks_and_groups(trained: Path, world: int, vocab: int) -> None:
    """float32 to 1e-6; in bf16 a row may round otherwise in another batch, no more."""
    split = open_split(trained / "data", "val")
    tasks = [(trained / name, stride) for name in ("run", "tied") for stride in (T, 3)]
    in_bf16 = trained / "bf16"
    arguments: dict[str, Any] = {"tasks": [*tasks, (in_bf16, T)], "vocab": vocab}
    every = run_ranks(check_evaluation, world, trained, **arguments) if world > 1 else [check_evaluation(**arguments)]
    assert all(str(results) == str(every[0]) for results in every), "every rank has the whole result, bit for bit"
    for found, (run, stride) in zip(every[0], tasks, strict=False):
        nats, hits = of_run(run, stride)
        sizes = (found["tokens"], found["text_bytes"], found["documents"])
        assert sizes == (split.tokens, split.text_bytes, split.documents)
        assert found["loss"] == pytest.approx(nats.mean(), rel=1e-6)
        assert found["perplexity"] == pytest.approx(math.exp(nats.mean()), rel=1e-5)
        assert found["bits_per_byte"] == pytest.approx(nats.sum() / math.log(2) / split.text_bytes, rel=1e-6)
        assert found["accuracy"] == pytest.approx(hits.mean())
        by_document = np.add.reduceat(nats, split.document_starts())
        np.testing.assert_allclose(found["nats"], by_document, rtol=2e-6)
    alone = next(record for record in read_records(in_bf16) if record["kind"] == "eval")
    assert every[0][-1]["loss"] == pytest.approx(alone["loss"], abs=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_evaluation_is_the_normalised_likelihood_of_every_head(trained: Path, variant: str) -> None:
    distance, params = variant.split()[0], {k: v for k, v in VARIANTS[variant].items() if k != "seed"}
    cfg = tiny_config(data__path=str(trained / "data"), head__distance=distance, head__params=params)
    windows = EvaluationWindows(open_split(trained / "data", "val"), T)
    found = evaluate_windows(Model(cfg, *build_modules(cfg, ALONE), step=1, eos_id=EOS).score, windows, 3, ALONE)
    decoder, head = build_modules(cfg, ALONE)
    nats, hits = reference(cfg, decoder, head, T)
    assert found.loss == pytest.approx(nats.mean(), rel=1e-6)
    assert found.accuracy == pytest.approx(hits.mean())
    with torch.no_grad():
        hidden = decoder(torch.arange(T)[None] if not cfg.model.tied else None).float()
    torch.testing.assert_close(head.log_probs(hidden).logsumexp(-1), torch.zeros(1, T), atol=1e-5, rtol=0)


def told(capsys: pytest.CaptureFixture, *arguments: object) -> Any:
    capsys.readouterr()
    assert evaluate.main([*map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def refused(capsys: pytest.CaptureFixture, *arguments: object) -> str:
    capsys.readouterr()
    assert evaluate.main([*map(str, arguments)]) == 2
    return capsys.readouterr().err


def test_the_command_says_what_training_said(trained: Path, capsys: pytest.CaptureFixture) -> None:
    done = call("-m", "pretrain.evaluate", str(trained / "run" / "checkpoints" / "step-00000004"))
    assert done.returncode == 0, done.stderr
    found = told(capsys, trained / "run")
    assert f"perplexity {found['perplexity']:.3f}" in done.stdout
    logged = next(record for record in read_records(trained / "run") if record["kind"] == "eval")
    for name in ("loss", "accuracy", "bits_per_byte"):
        assert found[name] == pytest.approx(logged[name], rel=1e-5), "training's own evaluation says the same"
    assert "neither a run folder" in refused(capsys, trained / "nowhere")


@pytest.mark.slow
def test_under_the_launcher_it_says_the_same(trained: Path, capsys: pytest.CaptureFixture) -> None:
    launcher = Path(sys.executable).with_name("deepspeed")
    command = [str(launcher), "--num_gpus", "2", "--module", "pretrain.evaluate", str(trained / "run"), "--json"]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "PATH": f"{launcher.parent}:{os.environ['PATH']}"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("{")]
    assert json.loads(line)["loss"] == pytest.approx(told(capsys, trained / "run")["loss"], rel=1e-6)


def test_sources_are_told_apart_and_add_up(trained: Path, capsys: pytest.CaptureFixture) -> None:
    found = told(capsys, trained / "run")
    parts = found["sources"]
    assert tuple(parts) == open_split(trained / "data", "val").sources == ("some", "other")
    for key in ("tokens", "text_bytes", "documents"):
        assert sum(part[key] for part in parts.values()) == found[key]
    nats = sum(part["loss"] * part["tokens"] for part in parts.values())
    assert nats == pytest.approx(found["loss"] * found["tokens"])
    assert evaluate.main([str(trained / "run")]) == 0
    shown = capsys.readouterr().out
    assert "other" in shown and f"{parts['some']['bits_per_byte']:.4f}" in shown


def test_stride_is_a_choice_of_context(trained: Path, capsys: pytest.CaptureFixture) -> None:
    assert told(capsys, trained / "run", "--stride", 3)["stride"] == 3
    assert told(capsys, trained / "run", "--stride", T) == told(capsys, trained / "run")
    assert "a stride of 9: expected 1 to 8" in refused(capsys, trained / "run", "--stride", 9)


# ---- standard errors and comparisons


def evaluation(nats: np.ndarray, tokens: np.ndarray, text_bytes: np.ndarray) -> Evaluation:
    return Evaluation(nats, tokens // 2, tokens, text_bytes)


def drawn(seed: int, documents: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    draw = np.random.default_rng(seed)
    tokens = draw.integers(20, 400, documents)
    return tokens * draw.normal(3.0, 0.5, documents), tokens, tokens * 4


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 1000), st.integers(30, 400))
def test_standard_errors_are_those_of_a_ratio(seed: int, documents: int) -> None:
    nats, tokens, text_bytes = drawn(seed, documents)
    found = evaluation(nats, tokens, text_bytes)
    residual = nats - found.loss * tokens  # linearised: Cochran, Sampling Techniques, 1977, section 6.4
    expected = math.sqrt(documents) * residual.std(ddof=1) / tokens.sum()
    errors = found.standard_errors()
    assert errors["loss_se"] == pytest.approx(expected, rel=0.15)
    assert errors["bits_per_byte_se"] == pytest.approx(expected / math.log(2) / 4, rel=0.15)
    assert errors == evaluation(nats, tokens, text_bytes).standard_errors(), "seeded"


def test_without_known_bytes_there_are_no_bits_per_byte() -> None:
    nats, tokens, text_bytes = drawn(0, 5)
    text_bytes[2] = -1
    found = evaluation(nats, tokens, text_bytes)
    assert found.as_dict()["bits_per_byte"] is None and found.as_dict()["text_bytes"] is None
    assert found.standard_errors()["bits_per_byte_se"] is None and found.standard_errors()["loss_se"]


def test_one_document_has_no_error() -> None:
    one = evaluation(*drawn(0, 1))
    assert one.standard_errors() == {"loss_se": None, "bits_per_byte_se": None}
    assert compare(one, one) == Difference(0)


def test_pairing_sees_a_difference_that_single_errors_would_hide() -> None:
    nats, tokens, text_bytes = drawn(1, 200)
    a, b = evaluation(nats, tokens, text_bytes), evaluation(nats - 0.01 * tokens, tokens, text_bytes)
    single = a.standard_errors()["bits_per_byte_se"]
    found = compare(a, b)
    assert found.bits_per_byte_difference == pytest.approx(0.01 / 4 / math.log(2))
    assert single is not None and found.low is not None and found.high is not None
    assert found.low <= found.bits_per_byte_difference <= found.high and found.high - found.low < single / 100
    assert compare(a, a) == Difference(0, 0, 0, 0)


def test_two_runs_are_compared_on_the_same_documents(trained: Path, capsys: pytest.CaptureFixture) -> None:
    a, b, difference = told(capsys, trained / "run", trained / "tied", "--paired")
    assert difference["bits_per_byte_difference"] == pytest.approx(a["bits_per_byte"] - b["bits_per_byte"])
    low, high = difference["low"], difference["high"]
    assert low < difference["bits_per_byte_difference"] < high
    assert evaluate.main([str(trained / "run"), str(trained / "tied"), "--paired"]) == 0
    assert f"95% interval {low:+.5f} to {high:+.5f}" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        evaluate.main([str(trained / "run"), "--paired"])


def test_other_documents_are_not_compared(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    def elsewhere(name: str, **data: int) -> Path:
        shutil.copytree(trained / "run", tmp_path / name)
        make_data(tmp_path / f"{name}-data", **data)
        config = tmp_path / name / "config.yaml"
        config.write_text(config.read_text().replace(str(trained / "data"), str(tmp_path / f"{name}-data")))
        return tmp_path / name

    more = elsewhere("more", val_tokens=177)
    assert "4 and 5 documents" in refused(capsys, trained / "run", more, "--paired")
    other = elsewhere("other", train_tokens=1960)  # the held-out tokens are drawn after these
    assert "document 0 is another text" in refused(capsys, trained / "run", other, "--paired")
    same = elsewhere("same")
    assert told(capsys, trained / "run", same, "--paired")[2]["bits_per_byte_difference"] == 0


# ---- the split that training never looks at


def test_a_test_split_is_scored_and_compared_like_any_other(trained: Path, capsys: pytest.CaptureFixture) -> None:
    cfg = load(trained / "run" / "config.yaml")
    decoder, head = build_modules(cfg, ALONE)
    load_weights(trained / "run" / "checkpoints" / "step-00000004", decoder, head)
    for name, tokens in (("test", 97), ("val", 137)):
        found = told(capsys, trained / "run", "--split", name)
        nats, _ = reference(cfg, decoder, head, T, name)
        split = open_split(trained / "data", name)
        assert (found["split"], found["tokens"], found["documents"]) == (
            name,
            tokens + split.documents,
            -(-tokens // 40),
        )
        assert found["loss"] == pytest.approx(nats.mean(), rel=1e-6)
    a, b, difference = told(capsys, trained / "run", trained / "tied", "--split", "test", "--paired")
    assert a["split"] == b["split"] == "test" and a["tokens"] == open_split(trained / "data", "test").tokens
    assert difference["bits_per_byte_difference"] == pytest.approx(a["bits_per_byte"] - b["bits_per_byte"])
    assert evaluate.main([str(trained / "run"), "--split", "test"]) == 0
    assert "step-00000004 on test: perplexity" in capsys.readouterr().out
    logged = {record["text_sha256"] for record in read_records(trained / "run") if record["kind"] == "eval"}
    assert logged == {told(capsys, trained / "run")["text_sha256"]}, "training scores val"


def test_a_run_without_a_test_split_says_what_makes_one(trained: Path, tmp_path: Path, capsys) -> None:
    data = make_data(tmp_path / "data")
    complaint = refused(capsys, trained / "run", "--split", "test", "--data", data)
    assert "no split 'test'; it has train, val. Set data.test_fraction" in complaint


def same(a: Evaluation, b: Evaluation) -> bool:
    return all(np.array_equal(mine, vars(b)[name]) for name, mine in vars(a).items())


def test_figures_by_document_are_kept_for_each_split_and_checkpoint(trained: Path, tmp_path: Path, monkeypatch) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained / "run", run)
    first = {name: evaluation_task.scored_documents(run, name) for name in ("val", "test")}
    files = sorted(path.name for path in run.glob("documents-*"))
    assert files == ["documents-test-step-00000004.npz", "documents-val-step-00000004.npz"]
    for name, found in first.items():
        split = open_split(trained / "data", name)
        assert found.tokens.sum() == split.tokens and np.array_equal(found.text_bytes, split.document_bytes())
        direct, _ = evaluation_task.run_task(evaluation_task.open_task(run, name), ALONE)
        assert same(found, direct)
    shutil.copy(run / files[0], run / "kept")
    with monkeypatch.context() as patched:
        patched.setattr(evaluation_task, "run_task", lambda *_: pytest.fail("scored again"))
        for name, found in first.items():
            assert same(evaluation_task.scored_documents(run, name), found)
            checkpoint = run / "checkpoints" / "step-00000004"
            assert same(evaluation_task.scored_documents(checkpoint, name), found)
    # What is not of this split, checkpoint and data, or cannot be read, is not taken for it.
    for wrong in (run / "documents-val-step-00000004.npz", trained / "run" / "config.yaml", Path(os.devnull)):
        shutil.copyfile(wrong, run / files[0])
        assert same(evaluation_task.scored_documents(run, "test"), first["test"])
        assert (run / files[0]).read_bytes() == (run / "kept").read_bytes()
    other = trained / "bf16" / "checkpoints" / "step-00000004"
    shutil.copy(trained / "bf16" / "config.yaml", run)
    shutil.rmtree(run / "checkpoints" / "step-00000004")
    shutil.copytree(other, run / "checkpoints" / "step-00000004")
    assert not same(evaluation_task.scored_documents(run, "test"), first["test"])


# ---- real text and two tokenizers


def test_runs_with_different_tokenizers_are_compared_on_the_same_texts(english: Path, capsys) -> None:
    a, b, difference = told(capsys, english / "small", english / "large", "--paired")
    assert a["tokens"] != b["tokens"] and a["text_bytes"] == b["text_bytes"]
    assert difference["bits_per_byte_difference"] == pytest.approx(a["bits_per_byte"] - b["bits_per_byte"])


def test_the_tokenizer_must_be_that_of_the_run(english: Path, tmp_path: Path, capsys) -> None:
    assert "a vocabulary of 330" in refused(capsys, english / "small", "--data", english / "large-data")
    shutil.copytree(english / "small-data", tmp_path / "data")
    (tmp_path / "data" / "tokenizer.model").write_bytes(b"another")
    assert "tokenizer.model" in refused(capsys, english / "small", "--data", tmp_path / "data")


def test_text_files_are_scored_as_they_are(english: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run = english / "small"
    split = open_split(english / "small-data", "val")
    tokenizer = evaluation_task.open_tokenizer(english / "small-data")
    starts = [*split.document_starts().tolist(), split.tokens]
    files = []
    for number, (start, end) in enumerate(zip(starts, starts[1:], strict=False)):
        files.append(tmp_path / f"{number}.md")
        files[-1].write_bytes(tokenizer.decode(split.read(start, end - start).tolist()).encode())
    prepared, plain = told(capsys, run), told(capsys, run, "--text", *files)
    sources = plain.pop("sources")
    assert prepared.pop("split") == "val" and plain.pop("split") == "text"
    assert plain == prepared, "the same documents give the same figures, prepared or not"
    assert sum(path.stat().st_size for path in files) == plain["text_bytes"]
    assert list(sources) == [str(path) for path in files] and sources[str(files[0])]["loss_se"] is None


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, "cannot be read"),
        (b"", "empty"),
        (b"caf\xe9", "cannot be read as UTF-8"),
        (b"\xff\xfe", "the text is UTF-16, expected UTF-8"),
        (b"a", "fewer than one window"),
    ],
)
def test_text_that_cannot_be_scored_is_refused(english: Path, tmp_path: Path, capsys, content, complaint: str) -> None:
    if content is not None:
        (tmp_path / "text").write_bytes(content)
    assert complaint in refused(capsys, english / "small", "--text", tmp_path / "text")


# ---- bad input


@pytest.fixture
def copied(trained: Path, tmp_path: Path) -> Path:
    shutil.copytree(trained / "run", tmp_path / "run")
    return tmp_path / "run"


def test_a_split_that_is_missing_or_has_no_window_is_refused(trained: Path, tmp_path: Path, capsys) -> None:
    assert "no split 'dev'; it has train, val, test" in refused(capsys, trained / "run", "--split", "dev")
    make_data(tmp_path / "short", val_tokens=5)
    told = refused(capsys, trained / "run", "--data", tmp_path / "short")
    assert "the val split has 6 tokens, fewer than one window of 8" in told
    make_data(tmp_path / "empty")
    path = tmp_path / "empty" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["splits"]["val"] |= {"tokens": 0, "documents": 0, "text_bytes": 0, "shards": []}
    path.write_text(json.dumps({**manifest, "fingerprint": fingerprint(manifest)}))
    assert "the val split has 0 tokens" in refused(capsys, trained / "run", "--data", tmp_path / "empty")
    assert "no prepared data here" in refused(capsys, trained / "run", "--data", tmp_path / "nowhere")


def test_another_models_checkpoint_is_refused(copied: Path, trained: Path, capsys) -> None:
    config = copied / "config.yaml"
    config.write_text(config.read_text().replace("dim: 32", "dim: 64"))
    assert "model.dim is 32 in this checkpoint, but 64 was given" in refused(capsys, copied)
    config.write_text((trained / "run" / "config.yaml").read_text().replace(f"vocab_size: {V}", f"vocab_size: {V + 1}"))
    assert f"has a vocabulary of {V}, " in refused(capsys, copied)


def test_another_tokenizers_checkpoint_is_refused(copied: Path, tmp_path: Path, capsys) -> None:
    make_data(tmp_path / "data")
    manifest = json.loads((tmp_path / "data" / "manifest.json").read_text())
    (tmp_path / "data" / "tokenizer.model").write_bytes(b"another model of as many pieces")
    manifest["tokenizer_sha256"] = sha256_of(tmp_path / "data" / "tokenizer.model")
    manifest["fingerprint"] = fingerprint(manifest)
    (tmp_path / "data" / "manifest.json").write_text(json.dumps(manifest))
    assert "the tokenizer's hash is" in refused(capsys, copied, "--data", tmp_path / "data")


def poison(run: Path, tensor: str) -> None:
    """Puts a NaN into a tensor of the newest checkpoint and makes its manifest agree."""
    folder = run / "checkpoints" / "step-00000004"
    (file,) = folder.glob("*.safetensors")
    with safe_open(file, "numpy") as opened:
        metadata = opened.metadata()
    tensors = {name: values.copy() for name, values in load_file(file).items()}
    (name,) = [name for name in tensors if tensor in name]
    tensors[name].flat[0] = np.nan
    save_file(tensors, file, metadata=metadata)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][file.name] = {"size": file.stat().st_size, "sha256": sha256_of(file)}
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("tensor", ["prototypes.fp32", "blocks.1.mlp.up.weight.fp32"])
def test_weights_that_are_not_finite_are_named(copied: Path, capsys, tensor: str) -> None:
    poison(copied, tensor)
    told = refused(capsys, copied)
    assert f"{tensor.removesuffix('.fp32')} holds values that are not finite" in told and "1 such tensor" in told


def check_poisoned(run: Path) -> str:
    ranks = process.start()
    try:
        evaluation_task.run_task(evaluation_task.open_task(run), process.with_groups(ranks, 2))
    except ConfigError as error:
        return str(error)
    return "scored"


def test_a_nan_in_one_ranks_shard_stops_all_ranks(copied: Path, tmp_path: Path) -> None:
    poison(copied, "prototypes.fp32")
    assert all("head.prototypes" in message for message in run_ranks(check_poisoned, 2, tmp_path, run=copied))


def test_unigram_bits_are_counted_on_the_training_split(tmp_path: Path) -> None:
    make_data(tmp_path / "data")
    train, val = (open_split(tmp_path / "data", name) for name in ("train", "val"))
    counts = np.bincount(train.read(0, train.tokens), minlength=67) + 1.0
    nats = sum(-math.log(counts[token] / counts.sum()) for token in val.read(0, val.tokens))
    assert unigram_bits_per_byte(train, val) == pytest.approx(nats / math.log(2) / val.text_bytes)
