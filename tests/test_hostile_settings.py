"""Hostile settings: whatever a file or a `key=value` holds, every command reads it or refuses it in words, at once.

A corpus by kinds, mutations of a valid recipe, and every setting with every odd value. What is taken must be usable.
"""

from __future__ import annotations

import copy
import itertools
import math
import os
import re
import signal
import socket
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from cli.__main__ import TABLE
from cli.completion import settings as paths_of
from common.errors import ConfigError
from common.settings import read_tree, validate
from common.yaml_tree import parse, to_yaml
from data.config import DataConfig
from pretrain.config import RunConfig, dump, from_tree, load
from pretrain.deepspeed_settings import DeepSpeedSettings
from pretrain.run_folder import RunFolder
from pretrain.study import language_config
from pretrain.study.algorithmic_config import AlgorithmicConfig
from pretrain.study.language_config import LanguageConfig
from pretrain.study.tuning import TUNABLE, Tuning
from tests.support.hostile import OVERRIDES, RECIPE, bombs, corpus
from tests.support.tiny import tiny_tree

TAKES_CONFIG = {"run", "train", "slurm", "plan", "doctor", "prepare", "inspect", "verify-data", "study"}
READY = "as far as settings go, it would begin"  # what a command is told where its work would start
SLOW_S = 10  # far beyond what any of these takes


@contextmanager
def at_once(kind: int = signal.ITIMER_VIRTUAL) -> Iterator[None]:
    """Raises AssertionError where reading goes on: after seconds of this process's work, or of a real clock."""

    def late(*_: Any) -> None:
        raise AssertionError("settings were read for too long")

    number = signal.SIGALRM if kind == signal.ITIMER_REAL else signal.SIGVTALRM
    before = signal.signal(number, late)
    signal.setitimer(kind, SLOW_S)
    try:
        yield
    finally:
        signal.setitimer(kind, 0)
        signal.signal(number, before)


# Commands -------------------------------------------------------------------------------------------------------------


def ready(*_: Any, **__: Any) -> Any:
    raise ConfigError(READY)


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> dict[str, Callable[[str, list[str]], int]]:
    """Every command that takes a CONFIG, up to where its work would begin."""
    for name in (
        *("pretrain.runtime.watch.Watch", "launch.doctor.doctor", "launch.plan.plan", "data.prepare.prepare"),
        *("pretrain.study.__main__._alone", "data.inspection.inspect", "data.shards.verify_folder"),
    ):
        monkeypatch.setattr(name, ready)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    options = {"run": ["--dry-run"], "slurm": ["--nodes", "1"]}

    def command(name: str) -> Callable[[str, list[str]], int]:
        main = import_module(TABLE[name].module).main
        return lambda config, overrides: main([config, *options.get(name, ()), *overrides])

    return {name: command(name) for name in sorted(TAKES_CONFIG)}


def test_every_command_that_takes_a_config_is_here() -> None:
    takes = {n for n, c in TABLE.items() if "config" in {a.dest for a in import_module(c.module).parser()._actions}}
    assert takes == TAKES_CONFIG


def refused(error: str, *names: str) -> None:
    """Asserts that a message is one, says what it is about, and can be shown."""
    assert error.startswith("error: ") and len(error) < 10_000 and "Traceback" not in error, error
    assert all(character.isprintable() or character == "\n" for character in error), repr(error)
    assert any(name in error for name in (READY, *names)) or re.match(r"error: [\w.]+: ", error), error


def test_the_corpus_is_refused_by_every_command(commands, tmp_path, capsys) -> None:
    files, names = corpus(), list(commands)
    assert len(files) > 600
    config = tmp_path / "hostile.yaml"
    for number, content in enumerate(files):
        config.write_bytes(content)
        name = names[number % len(names)]
        with at_once():
            code = commands[name](str(config), [])
        said = capsys.readouterr()
        assert code == 2 and not said.out, (name, content[:200])
        refused(said.err, "hostile.yaml", "nowhere/data")


@pytest.mark.parametrize("name", sorted(TAKES_CONFIG))
def test_what_is_no_file_is_not_waited_for(name, commands, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    for link, to in (("loop", "loop"), ("dangling", "nowhere"), ("to-pipe", "pipe")):
        Path(link).symlink_to(to)
    Path("folder").mkdir()
    with open("huge", "wb") as file:
        file.truncate(2**40)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("socket")
        odd = [
            "pipe",
            "to-pipe",
            "loop",
            "dangling",
            "folder",
            "huge",
            "huge/x",
            "socket",
            "/dev/zero",
            "/dev/null",
            ".",
        ]
        for config in [*odd, "nowhere", "", "n" * 300, "d/" * 3000, "a\nb", "\x1b[2J", "caf\udce9"]:
            with at_once(signal.ITIMER_REAL):
                assert commands[name](config, []) == 2
            refused(capsys.readouterr().err, config.rstrip("/"), repr(config), ascii(config))


@pytest.mark.parametrize("name", ["run", "train", "slurm", "plan", "doctor"])
def test_hostile_overrides_are_refused_by_name(name, commands, tmp_path, capsys) -> None:
    config = tmp_path / "fine.yaml"
    config.write_text(RECIPE)
    for override in OVERRIDES:
        assert commands[name](str(config), [override]) == 2, override[:100]
        said = capsys.readouterr()
        assert READY not in said.err and "nowhere/data" not in said.err, override[:100]
        refused(said.err, override.partition("=")[0].split(".")[-1][:50], "override", repr(override)[1:40])


def test_nothing_to_resume_is_found_before_anything_starts(commands, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr("launch.invocation.check_data", lambda cfg: None)
    config, run = tmp_path / "fine.yaml", tmp_path / "run"
    config.write_text(RECIPE)
    ask = [f"run={run}", "resume="]
    for name in ("run", "slurm"):
        for resume, told in (("nowhere", "neither a checkpoint nor a run folder"), ("never", "holds 1 checkpoints")):
            (run / "checkpoints" / "step-00000001").mkdir(parents=True, exist_ok=True)
            assert commands[name](str(config), [ask[0], ask[1] + resume]) == 2
            assert told in capsys.readouterr().err
    with pytest.raises(ConfigError, match="neither a checkpoint nor"):
        RunFolder(run).check_resume("nowhere")
    RunFolder(run).check_resume(str(run))
    RunFolder(run).check_resume("auto")


# Every setting, every odd value ---------------------------------------------------------------------------------------

VALUES: list[Any] = [
    *(math.inf, -math.inf, math.nan, -1, 0, 1, 2**63 - 1, 2**63, 10**30, 1e300, 1e-300, 1e30, 0.5, True, None),
    *("", "a\0b", "\x1b[2J", "x" * 300, "x/" * 3000, "*[?", "{{ x }}", "\ud800"),
    *({}, [], [[1]], {"a": {"b": "c"}}, [1, 2, 3], [math.inf], [1e300, 1e300], {"": 1}, {"a\nb": 1}),
]


def usable(cfg: RunConfig) -> None:
    """Asserts what a run does with numbers first."""
    for section in (cfg.optim, cfg.timeouts, cfg.checkpoint, cfg.energy, cfg.evaluation):
        for value in section.model_dump().values():
            assert not isinstance(value, float) or math.isfinite(value)
    for wait in cfg.timeouts.model_dump().values():
        assert timedelta(seconds=0.5) < timedelta(seconds=3 * wait) < timedelta(days=365)
    assert 0 <= cfg.lr_at(0) <= 1e30 and 0 <= cfg.train.seed < 2**63
    assert cfg.train.steps * cfg.train.tokens_per_step < 2**63
    assert 28 * cfg.model.parameters() < 2**63 and cfg.model.flops_per_token() * cfg.train.tokens_per_step < 2**200
    assert "\0" not in str(cfg.run) and str(cfg.run) != "."


def with_value(tree: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A copy of a tree with a value at a dotted path."""
    tree = copy.deepcopy(tree)
    node, (*above, last) = tree, path.split(".")
    for key in above:
        if not isinstance(node.get(key), dict):
            node[key] = {}
        node = node[key]
    node[last] = value
    return tree


def test_every_setting_with_every_odd_value() -> None:
    taken = 0
    for path, value in itertools.product(sorted(paths_of(RunConfig)), VALUES):
        try:
            cfg = from_tree(with_value(tiny_tree(), path, value))
        except ConfigError as error:
            assert path.split(".")[-1] in str(error) or path.split(".")[0] in str(error), (path, value)
            continue
        taken += 1
        usable(cfg)
        assert from_tree(parse(dump(cfg), "dump")) == cfg, (path, value)
    assert taken > 100


def test_every_setting_of_a_study_with_every_odd_value() -> None:
    more = ["base.train", "base.model", "base.run", "heads.softmax", "heads.x", "tasks.circle", "tasks.circle.epochs"]
    more += ["heads.softmax.space", "heads.softmax.space.lr", "known.softmax", "known.softmax.settings", "sizes.d64"]
    more += [f"tuning.{name}" for name in Tuning.model_fields] + [f"tuning.space.{name}" for name in TUNABLE]
    more += ["tuning.space.lr.low", "sizes.d64.model", "sizes.d64.train.steps", "base.optim", "base.optim.lr"]
    for recipe, model, read in (
        ("study-small", LanguageConfig, language_config.from_tree),
        ("study-algorithmic", AlgorithmicConfig, None),
    ):
        tree = read_tree(f"configs/{recipe}.yaml")
        for path, value in itertools.product([*model.model_fields, *more], VALUES):
            try:
                changed = with_value(tree, path, value)
                study: Any = read(changed) if read else validate(model, changed)
                if isinstance(study, LanguageConfig):
                    study.config(study.trial(study.baseline, 0, 0, study.settings(study.baseline)[0]))
            except ConfigError as error:
                assert str(error)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("kind=[1]", "expected one of language, algorithmic"),
        ("tuning.space.lr={low: 0.1, high: 0.01}", "low=0.1 must be below high=0.01"),
        ("tuning.space.lr={lo: 0.1}", "did you mean tuning.space.lr.low"),
        ("seeds=[-1, 2]", "seeds.0: given -1"),
        ("seeds=[1, 2]", "1 is tuning.seed, which chose"),
        ("lrs=[0.1]", "lrs: unknown key"),
        ("base.train=[1]", "base.train must be a mapping"),
        (f"seeds={list(range(2, 999))}", "a study has at most"),
        ("tuning.space.lr=[1, 1e300]", "given 1e+300"),
        ("base.optim.lr=1", "base.optim.lr is set by the study"),
        ("title=", "title: given empty"),
    ],
)
def test_studies_are_refused_by_name(change, told, commands, capsys) -> None:
    assert commands["study"]("configs/study-small.yaml", [change]) == 2
    assert told in capsys.readouterr().err


# Random ones ----------------------------------------------------------------------------------------------------------

TEXT = st.text(st.characters(codec=None), max_size=20)
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | TEXT
TREES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4), max_leaves=12
)
QUICK = hypothesis_settings(
    deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@QUICK
@given(st.data())
def test_random_trees_at_any_place_are_read_or_refused(data) -> None:
    tree = tiny_tree()
    node, path = tree, data.draw(st.sampled_from(sorted(paths_of(RunConfig))))
    *above, last = path.split(".")
    for key in above:
        node = node.setdefault(key, {})
        if not isinstance(node, dict):
            return
    node[last] = data.draw(TREES)
    for model, given_tree, where in ((RunConfig, tree, ""), (DataConfig, tree["data"], "data")):
        try:
            validate(model, given_tree, where)
        except ConfigError as error:
            assert str(error)


@QUICK
@given(data=st.data())
def test_a_recipe_with_random_bytes_is_read_or_refused(data, tmp_path_factory) -> None:
    content = bytearray(Path("configs/llama3-8b.yaml").read_bytes())
    for _ in range(data.draw(st.integers(1, 8))):
        at = data.draw(st.integers(0, len(content) - 1))
        piece = data.draw(
            st.binary(max_size=3)
            | st.sampled_from([b"{", b"[", b"&a ", b"*a", b": ", b"\n", b"- ", b"!!x ", b"'", b"<<: "])
        )
        content[at : at + data.draw(st.integers(0, 3))] = piece
    config = tmp_path_factory.getbasetemp() / "mutated.yaml"
    config.write_bytes(content)
    for reader in (load, lambda path: language_config.from_tree(read_tree(path))):
        try:
            reader(config)
        except ConfigError as error:
            assert str(error)


@QUICK
@given(
    TEXT
    | st.sampled_from(
        [
            "1e3",
            "12e4567",
            "010",
            "null",
            "",
            "yes",
            "<<",
            "=",
            "2024-01-01",
            "1:30",
            "~",
            ".inf",
            "1_0",
            "- a",
            "{{ x }}",
        ]
    )
)
def test_text_that_is_written_is_read_back(text) -> None:
    if any("\ud800" <= character <= "\udfff" for character in text):
        return
    assert parse(to_yaml({"a": text, "b": [text]}), "it") == {"a": text, "b": [text]}


def test_what_aliases_stand_for_takes_no_memory() -> None:
    for bomb in itertools.islice(bombs(), 3):
        tracemalloc.start()
        with pytest.raises(ConfigError, match="more than 10,000 values, with those that aliases repeat"):
            parse(bomb, "bomb")
        assert tracemalloc.get_traced_memory()[1] < 20 * 2**20
        tracemalloc.stop()


def test_an_alias_is_a_copy_and_a_merge_gives_way(tmp_path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("a: &a {x: 1, y: 2}\nb: *a\nc: {<<: *a, x: 3}\nd: {<<: [{x: 4}, *a]}\non: 1")
    assert read_tree(config, ["b.x=9"]) == {
        "a": {"x": 1, "y": 2},
        "b": {"x": 9, "y": 2},
        "c": {"x": 3, "y": 2},
        "d": {"x": 4, "y": 2},
        "on": 1,
    }


@pytest.mark.parametrize(
    ("text", "value"),
    [("010", "010"), ("1:30", "1:30"), ("0b1", "0b1"), ("2026-13-45", "2026-13-45"), ("0x10", "0x10"), ("1_000", 1000)]
    + [("yes", True), ("~", None), ("-3", -3), ("1.", 1.0), (".5", 0.5), ("18446744073709551615", 2**64 - 1)],
)
def test_words_are_read_as_they_look(text, value) -> None:
    assert parse(text, "it") == value and type(parse(text, "it")) is type(value)


CHECKED_BY_A_FUNCTION = {"exponent", "params", "grid", "betas", "fractions"}
ENDS = ({"minimum", "exclusiveMinimum"}, {"maximum", "exclusiveMaximum"})


def open_ended(node: Any, path: tuple[str, ...] = ()) -> Iterator[str]:
    """The dotted paths of a schema's numbers that have no least or no greatest value."""
    if isinstance(node, list):
        for value in node:
            yield from open_ended(value, path)
    if not isinstance(node, dict) or CHECKED_BY_A_FUNCTION & set(path):
        return
    number = node.get("type") in ("integer", "number") and not {"enum", "const"} & set(node)
    if number and not all(end & set(node) for end in ENDS):
        yield ".".join(path)
    for key, value in node.items():
        yield from open_ended(value, (*path, key))


@pytest.mark.parametrize("model", [RunConfig, LanguageConfig, AlgorithmicConfig, DeepSpeedSettings])
def test_every_number_has_a_range(model) -> None:
    assert set(open_ended(model.model_json_schema())) == set()
