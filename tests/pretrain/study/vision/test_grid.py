"""The whole of a vision study: it chooses by the tuning part alone, goes on where it was, and tells all of it."""

from __future__ import annotations

import base64
import copy
import io
import itertools
import json
import math
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from common.errors import ConfigError
from common.settings import validate
from pretrain.study import __main__ as command
from pretrain.study.page.charts.bitmaps import png
from pretrain.study.page.vision import page, strip
from pretrain.study.tables import vision as table
from pretrain.study.vision import grid
from pretrain.study.vision.cell import packed
from pretrain.study.vision.config import Cell, VisionConfig
from pretrain.study.vision.grid import run
from pretrain.study.vision.results import compare, interval, of_accuracy, summarise, verdict
from tests.pretrain.study.vision.support import SMALL, config, examples, quiet
from tests.support.pages import Tree

MANY = {"trials": 400, "seeds": list(range(100, 199)), "space": {"lr": list(range(1, 21)), "init": list(range(1, 21))}}
ODD: list[Any] = [None, True, -1, 0, 1e300, "", "x", "a\0b", [], [1], {}, {"kind": 1}, [[]], 2**70]
SECONDS = ("seconds", "images_per_s")


def timeless(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: timeless(value) for key, value in tree.items() if key not in SECONDS}
    return [timeless(value) for value in tree] if isinstance(tree, list) else tree


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The study's folder, and its results."""
    folder = tmp_path_factory.mktemp("study")
    return folder, run(config(folder), quiet)


@pytest.fixture(scope="module")
def results(ran: tuple[Path, dict[str, Any]]) -> dict[str, Any]:
    return ran[1]


# ---- the flow


def test_every_head_gets_its_trials_and_its_fresh_seeds(ran: tuple[Path, dict[str, Any]]) -> None:
    folder, results = ran
    assert json.loads(json.dumps(results, allow_nan=False)) == results
    rows = results["cells"]
    assert [(row["network"], row["head"], row["seed"]) for row in rows] == list(
        itertools.product(("linear", "mlp"), ("softmax", "euclidean"), (1, 2))
    )
    assert all(not isinstance(value, dict | list) for row in rows for value in row.values())
    kept = [json.loads(file.read_text())["cell"] for file in (folder / "cells").glob("*.json")]
    assert len(kept) == 2 * 2 * (2 + 2)
    assert all((one["seed"] == 100) == (one["noise"] == one["fgsm"] == []) for one in kept)
    for choice in results["choices"]:
        best = max(choice["trials"], key=lambda trial: (trial["accuracy"], -trial["loss"]))
        assert choice["lr"] == best["lr"] and len(choice["trials"]) == 2 and choice["edges"] == ["lr"]
        mine = [row for row in rows if (row["network"], row["head"]) == (choice["network"], choice["head"])]
        assert {row["lr"] for row in mine} == {choice["lr"]}
    for one in results["summary"]:
        mine = [row for row in rows if (row["network"], row["head"]) == (one["network"], one["head"])]
        assert one["accuracy"]["mean"] == pytest.approx(np.mean([row["accuracy"] for row in mine]))
        assert one["j_per_image"]["mean"] is None
    assert len(results["comparison"]) == 2 and [p["head"] for p in results["pictures"]] == ["softmax", "euclidean"]
    assert results["data"]["digits"]["sizes"] == examples({"kind": "digits"}).sizes()


def test_a_study_goes_on_where_it_was_and_gives_what_a_whole_one_gives(
    ran: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = grid.train_cell
    trained: list[Cell] = []

    def stops(folder: Path, cell: Cell) -> dict[str, Any]:
        if len(trained) == 5:
            raise KeyboardInterrupt
        trained.append(cell)
        return train(folder, cell)

    monkeypatch.setattr(grid, "train_cell", stops)
    with pytest.raises(KeyboardInterrupt):
        run(config(tmp_path), quiet)
    monkeypatch.setattr(grid, "train_cell", train)
    told: list[str] = []
    again = run(config(tmp_path), told.append)
    assert "choosing: 5 of 8 cells are finished already" in told
    whole = copy.deepcopy(ran[1])
    for one in (whole, again):
        one["config"]["out"] = ""
    assert timeless(again) == timeless(whole)

    def never(folder: Path, cell: Cell) -> dict[str, Any]:
        raise AssertionError("nothing is left to train")

    monkeypatch.setattr(grid, "train_cell", never)
    assert timeless(run(config(tmp_path, seeds=[2, 1]), quiet))["summary"][0]["seeds"] == 2
    with pytest.raises(AssertionError, match="nothing is left"):  # other examples are other cells
        run(config(tmp_path, data={"digits": {**SMALL["data"]["digits"], "tuning_fraction": 0.3}}), quiet)


def test_what_is_chosen_and_told_of_tuning_does_not_depend_on_the_test_part(
    ran: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = grid.sources.load

    def shuffled(*given: Any) -> Any:
        found = load(*given)
        found.test.labels.copy_((found.test.labels + 1) % 10)
        return found

    monkeypatch.setattr(grid.sources, "load", shuffled)
    other = run(config(tmp_path), quiet)
    assert timeless(other["choices"]) == timeless(ran[1]["choices"])
    for here, there in zip(other["cells"], ran[1]["cells"], strict=True):
        assert here["tuning_loss"] == there["tuning_loss"] and here["loss"] != there["loss"]


def test_a_head_whose_trials_all_diverge_ends_the_study_with_the_remedy(tmp_path: Path) -> None:
    tuning = {"trials": 2, "seeds": [100], "space": {"lr": [1e28, 1e30]}}
    cfg = config(tmp_path, tuning=tuning, networks={"mlp": {"kind": "mlp", "hidden": [8]}})
    with pytest.raises(ConfigError, match="digits, mlp, softmax: every trial diverged; give tuning.space.lr smaller"):
        run(cfg, quiet)


def test_the_command_writes_results_rows_and_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "study.yaml"
    file.write_text(json.dumps({**SMALL, "out": str(tmp_path / "out"), "networks": {"linear": {"kind": "linear"}}}))
    assert command.main([str(file), "seeds=[1,2]", "noise=[]"]) == 0
    out = capsys.readouterr().out
    assert "digits" in out and "euclidean" in out and "study.html" in out
    rows = (tmp_path / "out" / "results.csv").read_text().splitlines()
    assert len(rows) == 5 and "accuracy_fgsm_0.1" in rows[0] and "noise" not in rows[0]
    assert json.loads((tmp_path / "out" / "results.json").read_text())["kind"] == "vision"
    assert "<title>Small</title>" in (tmp_path / "out" / "study.html").read_text()
    assert command.main([str(file), "--report"]) == 2
    assert "--report: a vision study takes no such option" in capsys.readouterr().err


# ---- statistics


def cells_of(head: str, rights: list[list[int]], losses: list[float]) -> list[dict[str, Any]]:
    return [
        {"data": "d", "network": "n", "head": head, "diverged": None, "loss": loss, "accuracy": float(np.mean(right)),
         "right": packed(torch.tensor(right, dtype=torch.bool))}
        for right, loss in zip(rights, losses, strict=True)
    ]  # fmt: skip


def test_a_difference_in_accuracy_has_the_chance_of_seeds_and_of_examples() -> None:
    draws = np.random.default_rng(0)
    own, base = ((draws.random((5, 60)) < share).astype(int).tolist() for share in (0.9, 0.6))
    found = of_accuracy(cells_of("a", own, [0.0] * 5), cells_of("b", base, [0.0] * 5), 60)
    y = np.array(own, float) - np.array(base, float)
    assert found.mean == pytest.approx(y.mean())
    seeds = 60 * y.mean(1).var(ddof=1)
    documents = 5 * y.mean(0).var(ddof=1)
    rest = ((y - y.mean(1)[:, None] - y.mean(0) + y.mean()) ** 2).sum() / (4 * 59)
    expected = max(seeds + documents - rest, seeds, documents) / y.size
    assert found.standard_error == pytest.approx(math.sqrt(expected))


def test_heads_are_compared_seed_by_seed_and_corrected_together() -> None:
    from scipy.stats import ttest_rel

    draws = np.random.default_rng(1)
    losses = {name: (draws.normal(size=4) * 0.1 + at).tolist() for name, at in (("base", 1.0), ("a", 0.5), ("b", 1.0))}
    right = [[1, 0, 1, 1]] * 4
    flat = [one for name, values in losses.items() for one in cells_of(name, right, values)]
    a, b = compare(flat, {"d": 4}, "base")
    raw = [ttest_rel(losses[name], losses["base"]).pvalue for name in "ab"]
    assert a["loss"]["mean"] == pytest.approx(np.mean(losses["a"]) - np.mean(losses["base"]))
    assert a["loss"]["p"] == pytest.approx(2 * raw[0]) and b["loss"]["p"] == pytest.approx(max(raw[1], 2 * raw[0]))
    assert verdict(a["loss"], smaller_is_better=True) == "better" and verdict(b["loss"]) == "no difference"
    assert verdict(a["loss"], smaller_is_better=True, edges=["lr"]) == "not settled"
    assert verdict(b["loss"], edges=["lr"]) == "no difference"
    assert a["accuracy"]["mean"] == 0 and a["accuracy"]["p"] == 1 and verdict(a["accuracy"]) == "no difference"
    assert a["loss"]["could_show"] > 0
    flat[9]["diverged"] = 3  # one of b's, which was compared none the less
    a, b = compare(flat, {"d": 4}, "base")
    assert b["loss"] is None and verdict(None) == "-" and a["loss"]["p"] == pytest.approx(2 * raw[0])


def test_seeds_that_diverged_are_counted_and_have_no_figures() -> None:
    rows = [
        {"data": "d", "network": "n", "head": "h", "diverged": lost, "accuracy": value}
        for lost, value in ((None, 0.5), (None, 0.7), (7, None))
    ]
    (found,) = summarise(rows, ["accuracy"])
    assert (found["seeds"], found["diverged"]) == (3, 1)
    half = 12.706204736 * np.std([0.5, 0.7], ddof=1) / math.sqrt(2)
    assert found["accuracy"] == {
        "mean": 0.6, "low": pytest.approx(0.6 - half), "high": pytest.approx(0.6 + half), "values": [0.5, 0.7]
    }  # fmt: skip
    assert interval([None]) == {"mean": None, "low": None, "high": None, "values": []}


# ---- page and table


def test_the_page_is_one_file_that_requests_nothing_and_has_every_head(results: dict[str, Any]) -> None:
    html = page(results)
    tree = Tree(html)
    images = [attributes for tag, attributes in tree.tags if tag == "img"]
    assert len(images) == 2 and all(str(one["src"]).startswith("data:image/png;base64,") for one in images)
    assert all(one["alt"] for one in images)
    assert not [tag for tag, _ in tree.tags if tag in ("link", "iframe", "object", "embed", "base")]
    assert set(re.findall(r"\w+://[^'\"<\s]*", html)) <= {"http://www.w3.org/2000/svg"}
    links = {attributes["href"] for tag, attributes in tree.tags if tag == "a"}
    assert links == {f"#{attributes['id']}" for tag, attributes in tree.tags if tag == "section"}
    assert not re.search(r"\b(None|nan|inf)\b", tree.text)
    rows = [" ".join(" ".join(row).split()) for row in tree.rows]
    for one in results["summary"]:
        told = [row for row in rows if row.startswith(f"{one['head']} ") and one["network"] in row]
        assert len(told) == 3 and f"{one['accuracy']['mean']:.1%}" in told[0] and "edge" in told[2]
    assert "share the machine's counters" not in tree.text  # one process measures


def test_what_diverged_or_was_not_measured_is_told(results: dict[str, Any], tmp_path: Path) -> None:
    found = copy.deepcopy(results)
    lost = found["summary"][1]
    lost.update(diverged=2, **{k: {"mean": None, "low": None, "high": None, "values": []}
                               for k, v in lost.items() if isinstance(v, dict)})  # fmt: skip
    found["comparison"][0] |= {"accuracy": None, "loss": None}
    tree = Tree(page(found))
    row = next(row for row in tree.rows if "2 of 2 diverged" in " ".join(row))
    assert " ".join(row).count("-") >= 12 and "not measured" in " ".join(row)
    console = Console(width=200, record=True, file=(tmp_path / "table").open("w"))
    console.print(table(found))
    told = console.export_text()
    assert "2 of 2" in told and told.count("not measured") == 4


def test_hostile_names_are_escaped(results: dict[str, Any]) -> None:
    evil = "</script><img src=x onerror=alert(1)>'\"&"
    found = json.loads(re.sub(r'"(euclidean|digits|mlp)"', lambda m: json.dumps(f"{m[1]}{evil}"), json.dumps(results)))
    found["config"]["title"] = found["machine"] = evil
    tree = Tree(page(found))
    assert not [tag for tag, attributes in tree.tags if "onerror" in attributes]
    assert sum(tag == "script" for tag, _ in tree.tags) == 1 and tree.text.count(evil) > 5


def test_prototypes_lie_side_by_side_in_a_png_that_is_one(results: dict[str, Any]) -> None:
    (one, _) = results["pictures"]
    pixels = strip(one)
    assert pixels.shape == (8, 10 * 9) and (pixels[:, 8::9] == 255).all()
    coloured = strip({"shape": [3, 2, 2], "pixels": base64.b64encode(bytes(range(24))).decode()})
    assert (
        coloured.shape == (2, 6, 3) and coloured[0, 0].tolist() == [0, 4, 8] and coloured[1, 4].tolist() == [15, 19, 23]
    )
    assert strip({"shape": [1, 4], "pixels": base64.b64encode(bytes(range(8))).decode()}).shape == (2, 4)
    image = pytest.importorskip("PIL.Image")
    for array in (pixels, coloured):
        assert np.array_equal(np.asarray(image.open(io.BytesIO(png(array)))), array)
    assert zlib.decompress(png(pixels)[41:-16])[:2] == bytes([0, pixels[0, 0]])


# ---- settings


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"data": {}}, "data"),
        ({"data": {"x": {"source": {"kind": "webcam"}, "epochs": 1}}}, "expected one of digits"),
        ({"data": {"x": {"source": {"kind": "digits"}, "epochs": 0}}}, "data.x.epochs: given 0"),
        ({"data": {"x": {"source": {"kind": "digits", "root": "here"}, "epochs": 1}}}, "root"),
        ({"data": {"x": {"source": {"kind": "digits"}, "epochs": 1, "test_fraction": 1.0}}}, "test_fraction: given 1"),
        (
            {"data": {"x": {"source": {"kind": "digits"}, "epochs": 1, "networks": ["rnn"]}}},
            "rnn is none of: linear, mlp",
        ),
        ({"data": {"x": {"source": {"kind": "folder", "path": "here"}, "epochs": 1}}}, "image_size"),
        ({"data": {"x": {"source": {"kind": "folder", "path": "a\0b", "image_size": 4}, "epochs": 1}}}, "without NUL"),
        ({"data": {"x": {"source": {"kind": "torchvision", "name": "svhn", "root": "r"}, "epochs": 1}}}, "svhn"),
        ({"data": {"x": {"source": {"kind": "mnist1d", "train": 3}, "epochs": 1}}}, "train: given 3"),
        ({"networks": {"n": {"kind": "rnn"}}}, '"rnn"; expected one of linear'),
        ({"networks": {"n": {"kind": "vit", "width": 10, "heads": 4}}}, "width=10 must be a multiple of heads=4"),
        ({"networks": {"n": {"kind": "mlp", "hidden": []}}}, "hidden"),
        ({"heads": {"far": {"distance": "eucldean"}}, "baseline": "far"}, "eucldean"),
        ({"baseline": "cosine"}, "baseline=cosine is none of the heads: softmax, euclidean"),
        ({"seeds": [1]}, "seeds"),
        ({"seeds": [1, 1]}, r"seeds=\[1, 1\] must differ"),
        ({"seeds": [1, 100]}, r"share \[100\]: what is reported must not have chosen"),
        ({"tuning": {"trials": 3, "seeds": [9], "space": {"lr": [0.1, 1.0]}}}, "trials=3: the space has only 2"),
        ({"tuning": {"trials": 1, "seeds": [9], "space": {"lr": [0.1, 0.1]}}}, "must rise"),
        ({"tuning": {"trials": 1, "seeds": [9], "space": {"lr": [0.0]}}}, "tuning.space.lr"),
        ({"tuning": {"trials": 1, "seeds": [], "space": {"lr": [0.1]}}}, "tuning.seeds"),
        ({"betas": [0.9, 1.0]}, r"betas=\[0.9, 1.0\]"),
        ({"noise": [0.5, 0.5]}, "noise="),
        ({"fgsm": [-0.1]}, "fgsm"),
        ({"device": "tpu"}, "device"),
        ({"seeds": list(range(99)), "tuning": MANY}, "158,796 cells of data, networks, heads, trials and seeds"),
        ({"sedes": [1, 2]}, "sedes: unknown key; did you mean seeds?"),
    ],
)
def test_bad_settings_are_refused(tmp_path: Path, changed: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        config(tmp_path, **changed)


def test_every_setting_takes_or_refuses_odd_values_in_words(tmp_path: Path) -> None:
    source = {"kind": "hub", "name": "here", "image_size": 4}
    tree = {
        **{name: copy.deepcopy(value) for name, value in SMALL.items()},
        "data": {"x": {"source": source, "epochs": 1}, "y": {"source": {"kind": "mnist1d"}, "epochs": 1}},
        "networks": {"v": {"kind": "vit"}, "c": {"kind": "cnn"}, "r": {"kind": "resnet"}},
        **{"out": str(tmp_path), "betas": [0.9, 0.99], "warmup": 0.1, "device": "cpu", "processes": 1},
    }

    def places(node: Any) -> Iterator[tuple[dict[str, Any], str]]:
        for key, value in node.items():
            yield node, key
            if isinstance(value, dict):
                yield from places(value)

    refused = 0
    for (node, key), value in itertools.product(list(places(tree)), ODD):
        before, node[key] = node[key], value
        try:
            validate(VisionConfig, tree)
        except ConfigError as error:
            assert str(error)
            refused += 1
        node[key] = before
    assert refused > 300


def test_trials_are_combinations_without_repeats_the_same_for_a_seed() -> None:
    space = {"lr": [0.1, 0.2, 0.3], "weight_decay": [0.0, 1.0], "init": [0.5, 1.0, 2.0]}
    tuning = config(Path("out"), tuning={"trials": 9, "seeds": [9], "space": space}).tuning
    drawn = tuning.settings()
    assert len({one.model_dump_json() for one in drawn}) == 9 and drawn == tuning.settings()
    other = config(Path("out"), tuning={"trials": 9, "seed": 1, "seeds": [9], "space": space}).tuning
    assert other.settings() != drawn
    edges = {tuple(tuning.space.edges(one)) for one in tuning.space.grid()}
    assert () in edges and ("lr", "weight_decay", "init") in edges
    assert all((one.weight_decay > 0) == ("weight_decay" in tuning.space.edges(one)) for one in tuning.space.grid())


def test_what_is_not_here_is_said_before_anything_is_trained(tmp_path: Path) -> None:
    missing = {"gone": {"source": {"kind": "folder", "path": str(tmp_path / "gone"), "image_size": 4}, "epochs": 1}}
    with pytest.raises(ConfigError, match="data.gone: path=.*gone: there is no such folder"):
        run(config(tmp_path / "out", data={**SMALL["data"], **missing}), quiet)
    assert not list((tmp_path / "out" / "cells").iterdir())
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="device=cuda: torch sees no GPU here; set device: cpu"):
            run(config(tmp_path / "out", device="cuda"), quiet)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match="cannot be written"):
        run(config(tmp_path / "file"), quiet)
    assert (tmp_path / "file").read_text() == "mine"
