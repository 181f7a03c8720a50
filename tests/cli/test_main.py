"""`overtone`: every command is in its table, helps at once, reads words in any order and ends with the same codes."""

from __future__ import annotations

import json
import os
import re
import resource
import shlex
import signal
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from cli.__main__ import TABLE, main, table
from common import command
from common.errors import ConfigError
from pretrain.__main__ import parser as train_parser

HEAVY = {"torch", "deepspeed"}
CHILD = """
import atexit, json, sys
atexit.register(lambda: print("modules:", json.dumps(list(sys.modules)), file=sys.stderr))
from cli.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


def child(*words: str) -> tuple[subprocess.CompletedProcess[str], set[str], float]:
    """A command in a process of its own; the modules that it imported; its CPU seconds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", CHILD, *words], capture_output=True, text=True, timeout=120)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    modules = set(json.loads(done.stderr.rpartition("modules: ")[2]))
    return done, modules, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What is said of words that a command does not take."""
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 2
    return capsys.readouterr().err


def test_the_table_is_complete() -> None:
    promised = "prepare import inspect verify-data run train study evaluate report sample export verify plan doctor"
    assert set(TABLE) == {*promised.split(), "slurm", "completion"}
    lines = table().splitlines()
    for name, entry in TABLE.items():
        (line,) = [line for line in lines if line.startswith(f"  {name} ")]
        assert entry.about in line and len(line) <= 100
    modules = {entry.module for entry in TABLE.values()} | {"pretrain.export"}
    for room in ("data", "launch"):
        assert set(import_module(f"{room}.__main__").MODULES.values()) <= modules, "no second parser"


@pytest.mark.parametrize("name", TABLE)
def test_help_comes_at_once_with_examples_that_work(name: str) -> None:
    done, modules, cpu_s = child(name, "--help")
    assert done.returncode == 0 and not HEAVY & modules and cpu_s < 1.0
    assert done.stdout.startswith(f"usage: overtone {name} ") and "\nexit codes: 0 " in done.stdout
    made = import_module(TABLE[name].module).parser()
    assert made.description
    examples = re.findall(rf"^  overtone {name}\b(.*)", made.epilog, re.MULTILINE)
    assert 2 <= len(examples) <= 4
    for example in examples:
        words = shlex.split(example.partition(">")[0])
        assert all(Path(word).is_file() for word in words if word.startswith("configs/"))
        if name == "study":
            assert made.parse_known_args(words)[0].config == words[0]
        else:
            command.parse(made, words)


@pytest.mark.parametrize("name", ["run", "train", "plan"])
@pytest.mark.parametrize("setting", ["head.exponnent=3", "head.distance=euclidian"])
def test_a_mistake_in_a_config_needs_no_torch(name: str, setting: str) -> None:
    done, modules, _ = child(name, setting, "configs/quickstart.yaml")
    assert done.returncode == 2 and done.stderr.startswith("error: head") and not HEAVY & modules


def test_help_of_all_and_of_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == main(["help"]) == 0
    assert capsys.readouterr().out == f"{table()}\n" * 2
    assert main([]) == 2 and capsys.readouterr().err == f"{table()}\n"
    shown = []
    for words in (["help", "plan"], ["plan", "--help"]):
        with pytest.raises(SystemExit) as stopped:
            main(words)
        assert stopped.value.code == 0
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1]


def test_the_version_comes_without_torch() -> None:
    done, modules, _ = child("--version")
    assert re.fullmatch(r"overtone \d+\.\d+\.\d+\S*\n", done.stdout) and not HEAVY & modules


@pytest.mark.parametrize(
    "words",
    ["c.yaml a.b=1 --num-gpus 2 c={}", "a.b=1 --num-gpus 2 c.yaml c={}", "--num-gpus=2 a.b=1 c={} c.yaml"],
)
def test_words_come_in_any_order(words: str) -> None:
    asked = command.parse(import_module("launch.run").parser(), words.split())
    assert (asked.config, asked.overrides, asked.num_gpus) == ("c.yaml", ["a.b=1", "c={}"], 2)


def test_a_path_may_hold_an_equals_sign() -> None:
    asked = command.parse(import_module("pretrain.verify").parser(), ["--last", "runs/lr=1"], strict=False)
    assert asked.run == "runs/lr=1" and asked.overrides == []


def test_the_launcher_may_tell_a_local_rank() -> None:
    asked = command.parse(train_parser(), ["--local_rank=1", "c.yaml", "a.b=1"])
    assert (asked.local_rank, asked.config, asked.overrides) == (1, "c.yaml", ["a.b=1"])
    assert "local_rank" not in train_parser().format_help()


def test_a_study_hands_on_what_it_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    study = import_module(TABLE["study"].module)
    asked: list = []
    monkeypatch.setattr(study, "_study", asked.append)
    for words in ("s.yaml out=a --num-gpus 1 --elastic", "--num-gpus 1 --elastic out=a s.yaml"):
        assert main(["study", *words.split()]) == 0
        assert (asked[-1].config, asked[-1].overrides) == ("s.yaml", ["out=a"])
        assert asked[-1].launch == ["--num-gpus", "1", "--elastic"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["run", "c.yaml", "--numgpus", "2"], "--numgpus 2; did you mean --num-gpus?; expected key=value or one of"),
        (["run", "c.yaml", "word"], "unknown: word; expected key=value or one of the options"),
        (["plan", "c.yaml", "--jsn", "a=1"], "unknown: --jsn; did you mean --json?"),
        (["evaluate", "runs/a", "--strid", "3"], "--strid 3; did you mean --stride?; expected one of the options"),
        (["evaluate", "runs/a", "runs/b"], "2 RUNs given: expected one, or two with --paired"),
        (["sample"], "required: RUN"),
        (["prepare", "c.yaml", "--workers", "0"], "0 is too small; give 1 or more"),
        (["export", "runs/a", "--out", "o", "--format", "onnx"], "'onnx' (choose from"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_an_unknown_word_is_named(words: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert told in refused(words, capsys)


def test_an_unknown_command_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evalute", "runs/a"]) == 2
    assert capsys.readouterr().err == "error: evalute: unknown command; did you mean evaluate?\n"
    assert main(["help", "zzz"]) == 2
    assert "zzz: unknown command; expected one of prepare, import, " in capsys.readouterr().err


STARTED = [
    ".".join(path.with_suffix("").parts).removesuffix(".__main__")
    for folder in ("cli", "data", "launch", "pretrain")
    for path in sorted(Path(folder).rglob("*.py"))
    if "sys.exit(main())" in path.read_text() and path.parts[-2] not in ("runtime", "analysis")  # which commands start
]


@pytest.mark.parametrize("module", STARTED)
def test_ctrl_c_ends_what_has_not_listened_yet_without_a_word(module: str, tmp_path: Path) -> None:
    """All of them import argparse; here that is the moment at which Ctrl-C comes."""
    interrupting = "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n"
    (tmp_path / "argparse.py").write_text(interrupting)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-m", module], capture_output=True, text=True, env=environment, timeout=60)
    assert (done.returncode, done.stdout + done.stderr) == (-signal.SIGINT, ""), done.stderr


@pytest.mark.parametrize(
    ("ending", "code", "told"),
    [
        (None, 0, ""),
        (ConfigError("a: wrong"), 2, "error: a: wrong\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
    ids=["done", "bad input", "interrupted"],
)
def test_every_command_ends_in_the_same_way(
    ending: BaseException | None,
    code: int,
    told: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def work(_: object) -> None:
        if ending:
            raise ending

    monkeypatch.setattr("data.commands.inspect._inspect", work)
    assert main(["inspect", "c.yaml"]) == code
    assert capsys.readouterr().err == told


def test_export_has_the_format_of_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    export = import_module("pretrain.export")
    formats: list = []
    monkeypatch.setattr(export, "_export", lambda asked: formats.append(asked.format))
    main(["export", "runs/a", "--out", "o"])
    export.main(["runs/a", "--out", "o"])
    main(["export", "runs/a", "--out", "o", "--format", "weights"])
    assert formats == ["transformers", "weights", "weights"]
