"""What TAB tells, asked by a real bash as it asks; and what is said where argcomplete is not installed."""

from __future__ import annotations

import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from cli.__main__ import main
from cli.completion import changes, run_folders, settings
from pretrain.config import RunConfig

BASH = """
eval "$(overtone completion bash)"
COMP_LINE=$1 COMP_POINT=${#1} COMP_TYPE=9
_python_argcomplete overtone
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture
def overtone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command on PATH, as an installation puts it there."""
    script = tmp_path / "bin" / "overtone"
    script.parent.mkdir()
    start = f"import sys; sys.path.insert(0, {str(Path.cwd())!r}); from cli.__main__ import main; sys.exit(main())"
    script.write_text(f"#!{sys.executable}\n{start}\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(script.parent), prepend=":")


@pytest.mark.skipif(not find_spec("argcomplete") or not shutil.which("bash"), reason="needs argcomplete and bash")
@pytest.mark.parametrize(
    ("line", "told", "untold"),
    [
        ("", {"prepare", "run", "verify-data", "completion", "help", "--version"}, set()),
        ("help pl", {"plan"}, {"run"}),
        ("run --", {"--hostfile", "--dry-run"}, {"--local_rank"}),
        ("run --launcher ", {"pdsh", "openmpi", "slurm", "none"}, {"--dry-run"}),
        ("run --dry-run configs/quick", {"configs/quickstart.yaml"}, set()),
        ("run configs/quickstart.yaml --dry-run parallel.z", {"parallel.zero="}, {"parallel.vocab="}),
        ("train train.precision=", {"bf16", "float32"}, set()),
        ("prepare configs/quickstart.yaml data.", {"data.path=", "data.source.kind="}, {"model.dim="}),
        ("completion ", {"bash", "zsh", "fish"}, set()),
    ],
)
def test_bash_is_told(overtone: None, line: str, told: set[str], untold: set[str]) -> None:
    done = subprocess.run(["bash", "-c", BASH, "bash", f"overtone {line}"], capture_output=True, text=True, timeout=60)
    words = {word.strip() for word in done.stdout.splitlines()}
    assert told <= words and not untold & words, done.stderr


def test_without_argcomplete_it_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "argcomplete", None)
    assert main(["completion", "bash"]) == 2
    assert "pip install argcomplete" in capsys.readouterr().err


def test_settings_are_the_models() -> None:
    known = settings(RunConfig)
    assert known["train.precision"] == ["bf16", "float32"] and known["train.deterministic"] == ["true", "false"]
    assert {"run", "data.tokenizer.vocab_size", "model.positions.scaling.factor", "data.source.name"} <= set(known)
    assert "train" not in known and "files" in known["data.source.kind"]
    assert changes("parallel.backend=") == [f"parallel.backend={value}" for value in known["parallel.backend"]] != []
    assert set(changes("", "data.")) == {f"{path}=" for path in known if path.startswith("data.")}


def test_run_folders_and_the_way_to_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("runs/a", "runs/b[1]/deeper", "runs-of-others"):
        Path(folder).mkdir(parents=True)
    for run in ("runs/a", "runs/b[1]"):
        Path(run, "config.yaml").touch()
    assert set(run_folders("ru")) == {"runs/", "runs-of-others/"}
    assert set(run_folders("runs/")) == {"runs/a", "runs/b[1]"}
    assert set(run_folders("runs/b[1]/")) == {"runs/b[1]/deeper/"}
