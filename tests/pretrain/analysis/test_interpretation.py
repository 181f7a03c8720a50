"""`python -m pretrain.report --interpret` on tiny runs: its figures are those of the weights."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data.manifest import TOKENIZER, fingerprint, read_manifest, write_manifest
from data.tokenizer import Tokenizer, train
from pretrain import report
from pretrain.analysis import geometry, interpretation
from pretrain.analysis.words import NEAREST, RELATIONS, token_of, token_pairs
from pretrain.checkpoints.loading import load_weights
from pretrain.inference import load_model
from pretrain.modules import build_modules
from pretrain.runtime.ranks import Ranks
from tests.pretrain.analysis.test_geometry import small_chunks  # noqa: F401
from tests.support.ranks import run_ranks
from tests.support.shards import make_folder
from tests.support.tiny import run_to_end, tiny_config

WORDS = ["file", "files", "value", "values", "name", "names", "the", "not", "of", "list", "good", "better"]
RUNS: dict[str, dict[str, Any]] = {
    "euclidean": {"checkpoint__every": 2, "checkpoint__keep": 5},
    "cosine": {"head__distance": "cosine", "model__tied": True, "model__seq_len": 6, "train__tokens_per_step": 48},
    "softmax": {"head__distance": "dot"},
    "mahalanobis": {"head__distance": "mahalanobis"},
}


def make_text(folder: Path) -> int:
    """A prepared folder of random sentences, and the size of its vocabulary."""
    stream = np.random.default_rng(3)
    sentences = [" ".join(["", *stream.choice(WORDS, 12)]) for _ in range(120)]
    model = folder.with_suffix(".model")
    vocab = 330
    train(sentences, vocab, model)
    tokenizer = Tokenizer(model)
    documents = [np.array(tokenizer.encode(sentence)) for sentence in sentences]
    make_folder(folder, vocab_size=vocab, train=documents[:80], val=documents[80:])
    (folder / TOKENIZER).write_bytes(model.read_bytes())
    manifest = {**read_manifest(folder), "tokenizer_sha256": tokenizer.sha256}
    write_manifest(folder, {**manifest, "fingerprint": fingerprint(manifest)})
    return vocab


def train_all(base: Path, vocab: int) -> None:
    for name, changes in RUNS.items():
        where = {"run": str(base / name), "data__path": str(base / "data"), "data__tokenizer__vocab_size": vocab}
        run_to_end(tiny_config(**where, train__steps=4, **changes))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("interpreted")
    run_ranks(train_all, 1, base, base=base, vocab=make_text(base / "data"))
    return base


def reported(capsys: pytest.CaptureFixture, *arguments: str) -> dict[str, Any]:
    assert report.main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def single(tokenizer: Tokenizer, word: str) -> int:
    token = token_of(tokenizer, word)
    assert token is not None
    return token


def test_a_word_is_one_token_or_none(trained: Path) -> None:
    tokenizer = Tokenizer(trained / "data" / TOKENIZER)
    assert all(tokenizer.decode([single(tokenizer, word)]) == f" {word}" for word in WORDS)
    assert token_of(tokenizer, "children") is None
    found = token_pairs(tokenizer, RELATIONS["plural"])
    assert found == [(single(tokenizer, one), single(tokenizer, f"{one}s")) for one in ("file", "value", "name")]


def test_no_word_comes_twice_in_a_relation() -> None:
    for relation, pairs in RELATIONS.items():
        words = [word for pair in pairs for word in pair]
        assert len(pairs) >= 20 and len(set(words)) == len(words), relation


def test_hidden_states_are_those_of_each_window_alone(trained: Path) -> None:
    source = interpretation.open_run(trained / "cosine", (), strict=False)
    ranks = Ranks(0, 1, 0, 1, torch.device("cpu"))
    model = load_model(source.checkpoint, source.cfg, source.tokenizer.sha256, source.split.eos_id, ranks)
    hidden, targets = interpretation.hidden_states(model, source.split, None, tokens=100)
    stream = source.split.read(0, 100)
    assert targets.tolist() == stream.tolist()
    before = torch.tensor([source.split.eos_id, *stream[:-1]])
    with torch.no_grad():
        alone = torch.cat([model.decoder(model.head.prototypes[window[None]])[0] for window in before.split(6)])
    assert torch.allclose(hidden, alone, atol=1e-6)
    assert len(interpretation.hidden_states(model, source.split, None)[0]) == source.split.tokens, (
        "no more than there are"
    )


@pytest.mark.parametrize("name", RUNS)
def test_figures_of_a_run_are_those_of_its_weights(trained: Path, capsys: pytest.CaptureFixture, name: str) -> None:
    run = trained / name
    found = reported(capsys, str(run), "--interpret")["geometry"]["runs"][str(run)]
    assert found == reported(capsys, str(run), "--interpret")["geometry"]["runs"][str(run)], "deterministic"
    source = interpretation.open_run(run, (), strict=False)
    decoder, head = build_modules(source.cfg, Ranks(0, 1, 0, 1, torch.device("cpu")))
    load_weights(source.checkpoint, decoder, head)
    w = head.prototypes.detach().double()
    seen = w
    if name == "cosine":
        seen = w / w.norm(dim=1, keepdim=True)
    if name == "mahalanobis":
        seen = w * (dict(head.named_parameters())["factor"].detach().double() / 2).exp()
    spectra = found["spectra"]
    assert spectra["prototypes"]["first_2"] == pytest.approx(geometry.spectrum(seen).explained(2), rel=1e-4)
    rank = geometry.effective_rank(seen - seen.mean(0))
    assert spectra["prototypes"]["effective_rank"] == pytest.approx(rank, rel=1e-4)
    assert (spectra["embedding"] is None) == found["tied"] == (name == "cosine")
    assert (found["parallelograms"]["embedding"] is None) == found["tied"]
    assert list(found["norms"]) == (["2", "4"] if name == "euclidean" else ["4"])
    assert found["norms"]["4"]["median"] == pytest.approx(w.norm(dim=1).quantile(0.5).item(), rel=1e-5), "as stored"
    plural = found["parallelograms"]["prototypes"]["plural"]
    pairs = torch.tensor(token_pairs(source.tokenizer, RELATIONS["plural"]))
    assert (plural["pairs"], plural["left_out"]) == (3, len(RELATIONS["plural"]) - 3)
    assert plural["loss"] == pytest.approx(geometry.parallelogram_loss(seen, pairs).loss, rel=1e-4)
    assert found["parallelograms"]["prototypes"]["gender"]["loss"] is None
    classes = found["classes"]
    assert classes["classes"] >= len(WORDS) and 0 < classes["nc3"] < 4
    assert (classes["centre_distance"] is None) == (name == "softmax")
    assert set(found["nearest"]) == {word for word in NEAREST if word in WORDS}
    (text, distance), *others = found["nearest"]["file"]["own"]
    assert len(others) == interpretation.NEIGHBOURS - 1 and isinstance(text, str)
    best = geometry.nearest(w, [single(source.tokenizer, "file")], 1, head.eval().score_function)
    assert distance == pytest.approx(best.distances.item(), rel=1e-6)


def test_runs_are_compared_on_the_same_tokens(trained: Path, capsys: pytest.CaptureFixture) -> None:
    runs = [str(trained / name) for name in ("euclidean", "cosine", "softmax")]
    assert report.main([*runs, "--interpret"]) == 0
    told = capsys.readouterr().out
    assert "parallelogram loss, plural" in told and "(3 of 30 pairs)" in told and "linear CKA" in told
    written = json.loads((trained / "cosine" / report.INTERPRETED).read_text())
    found = reported(capsys, *runs, "--interpret")["geometry"]
    assert {key: value for key, value in written.items() if key != "cka"} == found["runs"][runs[1]]
    assert [pair["runs"] for pair in written["cka"]] == [runs[:2], runs[1:]]
    assert [pair["runs"] for pair in found["cka"]] == [runs[:2], runs[::2], runs[1:]]
    assert all(0 < pair[what] < 1 for pair in found["cka"] for what in ("hidden", "prototypes"))
    opened = [interpretation.measure(interpretation.open_run(Path(run), (), strict=False)) for run in runs[:2]]
    other = interpretation.Measured({}, "other data", opened[1].hidden, opened[1].prototypes)
    assert interpretation.compare({"a": opened[0], "b": other}) == [
        {"runs": ["a", "b"], "hidden": None, "prototypes": None}
    ]


def test_a_report_without_the_flag_measures_nothing(trained: Path, capsys: pytest.CaptureFixture) -> None:
    found = reported(capsys, str(trained / "softmax"))
    assert list(found) == ["runs"] and found["runs"][str(trained / "softmax")]["step"] == 4


def test_words_of_ones_own_are_looked_at_or_refused(trained: Path, capsys: pytest.CaptureFixture) -> None:
    run = str(trained / "softmax")
    found = reported(capsys, run, "--interpret", "--words", "names", "of")["geometry"]["runs"][run]
    assert list(found["nearest"]) == ["names", "of"]
    assert report.main([run, "--interpret", "--words", "of", "zebra"]) == 2
    assert "--words zebra: not single tokens" in capsys.readouterr().err
    assert report.main([run, "--words", "of"]) == 2 and "only with --interpret" in capsys.readouterr().err


def test_data_of_another_tokenizer_are_refused(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    data = tmp_path / "data"
    shutil.copytree(trained / "data", data)
    model = bytearray((data / TOKENIZER).read_bytes()) + bytes([0x7A, 0])  # an empty field that nobody knows
    (data / TOKENIZER).write_bytes(model)
    manifest = {**read_manifest(data), "tokenizer_sha256": hashlib.sha256(model).hexdigest()}
    write_manifest(data, {**manifest, "fingerprint": fingerprint(manifest)})
    shutil.copytree(trained / "softmax", tmp_path / "run", ignore=shutil.ignore_patterns(report.INTERPRETED))
    config = tmp_path / "run" / "config.yaml"
    config.write_text(config.read_text().replace(str(trained / "data"), str(data)))
    assert report.main([str(tmp_path / "run"), "--interpret"]) == 2
    assert "with another tokenizer" in capsys.readouterr().err
    shutil.rmtree(data)
    assert report.main([str(tmp_path / "run"), "--interpret"]) == 2
    assert "no prepared data here" in capsys.readouterr().err
    assert not (tmp_path / "run" / report.INTERPRETED).exists()
    assert report.main([str(tmp_path / "run")]) == 0, "the table alone needs no data"
