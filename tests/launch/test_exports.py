"""What ranks on other hosts get of the environment: through deepspeed's own reader, pdsh's % signs and a shell."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from deepspeed.launcher.multinode_runner import MultiNodeRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.checkout import ROOT
from common.errors import ConfigError
from launch import exports
from launch.exports import env_file, exported, left_here


class Runner(MultiNodeRunner):
    """deepspeed's way from the file to a shell's `export`."""

    def __init__(self) -> None:
        self.exports: dict[str, str] = {}

    def backend_exists(self) -> bool:
        return True

    def get_cmd(self, environment, active_resources):  # type: ignore[no-untyped-def]
        raise NotImplementedError

    def shell(self, text: str) -> str:
        for line in text.splitlines(keepends=True):
            self.add_export(*line.split("=", maxsplit=1))
        words = "".join(f"export {name}={value}; " for name, value in self.exports.items())
        return re.sub("%(.)", lambda found: {"%": "%"}.get(found[1], "REPLACED"), words)  # pdsh


def arrived(text: str, name: str) -> str:
    """The value of a variable in another host's shell."""
    script = f'{Runner().shell(text)} printf %s "${name}"'
    return subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True, env={}).stdout


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in exported(exports.os.environ):
        monkeypatch.delenv(name)
    monkeypatch.delenv("DS_ENV_FILE", raising=False)
    monkeypatch.setattr(exports, "USERS_FILES", (tmp_path / ".deepspeed_env",))


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(st.characters(exclude_categories=["C", "Z"]) | st.sampled_from(" $`\"'\\%hnu"), max_size=20))
def test_a_value_arrives_as_it_was(value: str) -> None:
    if value != value.strip():
        with pytest.raises(ConfigError, match="HF_HOME"):
            env_file({"HF_HOME": value})
    else:
        assert arrived(env_file({"HF_HOME": value}), "HF_HOME") == value


def test_what_goes_and_what_stays() -> None:
    goes = ["HF_HOME", "TORCH_LOGS", "NCCL_DEBUG", "OMP_NUM_THREADS", "CUDA_LAUNCH_BLOCKING", "FI_PROVIDER"]
    goes += ["FI_EFA_USE_DEVICE_RDMA", "LD_LIBRARY_PATH", "SHARP_COLL_LOG_LEVEL", "WANDB_MODE", "PYTORCH_ALLOC_CONF"]
    secret = ["HTTPS_PROXY", "HF_TOKEN", "HF_HUB_PROXY", "WANDB_API_KEY", "CUDA_VISIBLE_DEVICES", "DS_ENV_FILE"]
    own = ["HOME", "PATH", "http_proxy", "PYTHONPATH", "LANG", "LC_ALL", "SSH_CONNECTION", "XDG_RUNTIME_DIR"]
    environment = dict.fromkeys([*goes, *secret, *own, "MY_SETTING"], "x")
    assert sorted(exported(environment)) == sorted(goes)
    assert left_here(environment) == sorted([*secret, "MY_SETTING"]), "told, secrets by name alone"


def test_the_documented_table_is_the_one_that_is_used() -> None:
    text = (ROOT / "docs" / "launching.md").read_text()
    table = text[text.index("| names | why |") : text.index("Proxies never go")]
    named = set(re.findall(r"^\| ([^|]+) \|", table, re.MULTILINE)) - {"names", "---"}
    listed = {name.strip("`").removesuffix("*") for cell in named for name in cell.split(", ")}
    assert listed == set(exports.EXPORTED)


def test_a_line_break_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_LOGS", "a\nb")
    with pytest.raises(ConfigError, match="TORCH_LOGS='a.nb' cannot be exported .* `unset TORCH_LOGS`"):
        env_file({})


def test_the_users_own_file_goes_on_and_wins(tmp_path: Path) -> None:
    (tmp_path / ".deepspeed_env").write_text("# mine\n\nHF_HOME=/mine\nodd\nMY=a b\n")
    text = env_file({"HF_HOME": "/ours"})
    assert arrived(text, "HF_HOME") == "/mine" and arrived(text, "MY") == "a b"
