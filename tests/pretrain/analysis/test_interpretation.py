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
from pretrain.analysis.papers import function_vectors, parallelogram_2502, spectrum_2603
from pretrain.analysis.start import noise_rows, start_of, still_noise
from pretrain.analysis.tables import geometry_tables
from pretrain.analysis.words import NEAREST, RELATIONS, token_of, token_pairs
from pretrain.checkpoints.loading import load_weights
from pretrain.inference import load_model
from pretrain.modules import build_modules
from pretrain.run_folder import RunFolder
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
    "went on": {"resume": "euclidean", "resume_allow": ["train.steps"], "train__steps": 6},
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
        if "resume" in changes:
            changes = {**changes, "resume": str(base / changes["resume"])}
        run_to_end(tiny_config(**{**where, "train__steps": 4, **changes}))


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
    began = head.prototypes.detach().double().clone()
    load_weights(source.checkpoint, decoder, head)
    w = head.prototypes.detach().double()
    seen = w
    if name == "cosine":
        seen, began = (one / one.norm(dim=1, keepdim=True) for one in (w, began))
    if name == "mahalanobis":
        seen, began = (
            one * (dict(head.named_parameters())["factor"].detach().double() / 2).exp() for one in (w, began)
        )
    spectra = found["spectra"]
    assert spectra["prototypes"]["first_2"] == pytest.approx(geometry.spectrum(seen).explained(2), rel=1e-4)
    rank = geometry.effective_rank(seen - seen.mean(0))
    assert spectra["prototypes"]["effective_rank"] == pytest.approx(rank, rel=1e-4)
    check_start(found, seen, began)
    hidden, _ = interpretation.hidden_states(source.run.open_model(precision="float32"), source.split, None)
    if name in ("euclidean", "softmax", "went on"):
        rank = spectrum_2603(hidden).effective_rank
        assert spectra["hidden"]["arxiv_2603_10225"]["effective_rank"] == pytest.approx(rank, rel=1e-4)
    assert (spectra["embedding"] is None) == found["tied"] == (name == "cosine")
    assert (found["parallelograms"]["embedding"] is None) == found["tied"]
    kept = {"euclidean": ["2", "4"], "went on": ["6"]}
    assert list(found["norms"]) == kept.get(name, ["4"])
    assert found["norms"][str(found["step"])]["median"] == pytest.approx(
        w.norm(dim=1).quantile(0.5).item(), rel=1e-5
    ), "as stored"
    plural = found["parallelograms"]["prototypes"]["plural"]
    pairs = torch.tensor(token_pairs(source.tokenizer, RELATIONS["plural"]))
    assert (plural["pairs"], plural["left_out"]) == (3, len(RELATIONS["plural"]) - 3)
    assert plural["loss"] == pytest.approx(geometry.parallelogram_loss(seen, pairs).loss, rel=1e-4)
    theirs = parallelogram_2502(geometry.plane(seen), pairs)
    assert plural["arxiv_2502_01628"] == pytest.approx(theirs._asdict(), rel=1e-3)
    assert plural["function_vectors"] == pytest.approx(function_vectors(seen, pairs)._asdict(), rel=1e-3)
    gender = found["parallelograms"]["prototypes"]["gender"]
    assert gender["loss"] is gender["function_vectors"]["shared"] is gender["arxiv_2502_01628"]["loss"] is None
    classes = found["classes"]
    assert classes["classes"] >= len(WORDS) and 0 < classes["nc3"] < 4
    assert (classes["centre_distance"] is None) == (name == "softmax")
    assert set(found["nearest"]) == {word for word in NEAREST if word in WORDS}
    (text, distance), *others = found["nearest"]["file"]["own"]
    assert len(others) == interpretation.NEIGHBOURS - 1 and isinstance(text, str)
    best = geometry.nearest(w, [single(source.tokenizer, "file")], 1, head.eval().score_function)
    assert distance == pytest.approx(best.distances.item(), rel=1e-6)


def check_start(found: dict[str, Any], seen: torch.Tensor, began: torch.Tensor) -> None:
    """Of a run that began afresh what it learnt is `seen` less `began`; of another one nothing is known of it."""
    start, spectra, with_count = found["start"], found["spectra"], found["first_component_with_count"]
    noise = geometry.spectrum(noise_rows(*seen.shape))
    assert found["noise"]["prototypes"]["dimensions_90"] == noise.dimensions(0.9)
    if found["step"] == 6:
        assert start["unknown"] == "its records begin after 4 updates: it went on from other weights"
        assert spectra["displacement"] is with_count["displacement"] is start["share"] is None
        return
    learnt = seen - began
    assert start["unknown"] is None
    assert {name: value for name, value in start.items() if name != "unknown"} == pytest.approx(
        still_noise(seen, began)._asdict(), rel=1e-4
    )
    assert 0.5 < start["share"] < 1, "after four updates"
    assert spectra["displacement"]["first_2"] == pytest.approx(geometry.spectrum(learnt).explained(2), rel=1e-3)
    assert spectra["displacement"]["dimensions_90"] < spectra["prototypes"]["dimensions_90"]
    assert all(0 <= one <= 1 for of in with_count.values() for one in of.values()) and len(with_count) == 2


def test_a_start_that_cannot_be_vouched_for_is_unknown(trained: Path, tmp_path: Path) -> None:
    """Of a configuration that draws other prototypes, and of a run that has no record of lengths, as older ones."""
    run, older = RunFolder(trained / "euclidean"), RunFolder(tmp_path)
    assert start_of(run, run.settings()).unknown is None
    for change in ("train.seed=4321", "head.init_std=0.5"):
        found = start_of(run, run.settings([change]))
        assert found.prototypes is None and "but the run recorded" in str(found.unknown)
    lines = run.metrics.read_text().splitlines(keepends=True)
    older.metrics.write_text("".join(line for line in lines if '"lengths"' not in line))
    assert "do not tell how long" in str(start_of(older, run.settings()).unknown)


def test_runs_are_compared_on_the_same_tokens(trained: Path, capsys: pytest.CaptureFixture) -> None:
    runs = [str(trained / name) for name in ("euclidean", "cosine", "softmax")]
    assert report.main([*runs, "--interpret"]) == 0
    told = capsys.readouterr().out
    assert "parallelogram loss, plural" in told and "(3 of 30 pairs)" in told and "linear CKA" in told
    written = json.loads((trained / "cosine" / report.INTERPRETED).read_text())
    found = reported(capsys, *runs, "--interpret")["geometry"]
    assert {key: value for key, value in written.items() if key != "cka"} == found["runs"][runs[1]]
    labels, first, *_ = (list(column.cells) for column in geometry_tables(found)[0].columns)
    cells, figures = dict(zip(map(str, labels), map(str, first), strict=True)), found["runs"][runs[0]]
    learnt, noise = figures["spectra"]["displacement"], figures["noise"]["prototypes"]
    told = f"{learnt['dimensions_90']} (noise {noise['dimensions_90']})"
    assert cells["less their start: dimensions for 90% of the variance"] == told
    assert cells["start of the prototypes"] == "known" and "hidden: effective rank (2603.10225)" in cells
    plural = figures["parallelograms"]["prototypes"]["plural"]["arxiv_2502_01628"]
    told = f"{plural['loss']:.2f}, shuffled {plural['shuffled']:.2f}"
    assert cells["... of 2 components (2502.01628), plural"] == told
    assert cells["... cosine of differences, gender"] == "-" and len(cells) == len(labels)
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
