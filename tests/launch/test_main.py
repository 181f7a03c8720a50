"""`overtone run`: what is checked before anything is spawned, and what is handed on."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from common.settings import validate
from common.variables import JOB_VARIABLE, LEASE_VARIABLE
from data.config import DataConfig
from data.prepare import prepare
from launch import job, reach
from launch.__main__ import main
from launch.hosts import Placement
from launch.invocation import AT_ONCE
from launch.job import End
from launch.lease import Lease, lease_of, take
from pretrain.config import TimeoutConfig


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict:
    """The `data:` section of a small corpus that is prepared."""
    folder = tmp_path_factory.mktemp("data")
    section = {
        "path": str(folder / "prepared"),
        "source": {"kind": "embedded"},
        "limit_documents": 50,
        "tokenizer": {"vocab_size": 400},
        "val_fraction": 0.2,
    }
    prepare(validate(DataConfig, section, "data"), lambda line: None)
    return section


@pytest.fixture
def config(tmp_path, data, monkeypatch) -> Path:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    tree = {
        "run": str(tmp_path / "run"),
        "data": data,
        "model": {"seq_len": 16, "layers": 1, "heads": 1, "dim": 8},
        "train": {"steps": 2, "tokens_per_step": 192, "micro_batch": 1},
        "optim": {"lr": 1e-3},
    }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(tree))
    return tmp_path / "c.yaml"


@pytest.fixture
def spawned(monkeypatch) -> list:
    """The calls that would have run a job, each of which ends with 75."""
    calls: list = []

    def run(words, added, claim, placement, **options):
        calls.append((words, added, claim, placement, options))
        return End(75, "so planned", told=False)

    monkeypatch.setattr(job, "run", run)
    return calls


@pytest.fixture
def answering(monkeypatch) -> dict:
    """What hosts say when they are asked; all of them answer."""
    told: dict = {}

    def ask(hosts, words=()):
        fine = {"address": "10.0.0.1", "port": 23456, "cores": 4, "gpus": 0, "identity": None}
        return {host: told.get(host, fine) for host in hosts}

    monkeypatch.setattr(reach, "ask", ask)
    return told


def test_a_dry_run_prints_one_line_and_runs_nothing(config, spawned, capsys):
    assert (
        main(["run", str(config), "train.steps=3", "--dry-run", "parallel.zero=2", "--num-gpus", "3", "head={}"]) == 0
    )
    (line,) = capsys.readouterr().out.splitlines()
    assert " --num_gpus 3 " in line
    assert line.endswith(f"--module pretrain {config} train.steps=3 parallel.zero=2 'head={{}}'")
    assert spawned == []
    assert not (config.parent / "run").exists()


def test_a_run_is_handed_on_with_its_record(config, spawned, capsys):
    assert main(["run", str(config), "--num-gpus", "2"]) == 75
    ((words, added, claim, placement, options),) = spawned
    assert words[-3:] == ["--module", "pretrain", str(config)]
    assert added[LEASE_VARIABLE] == str(config.parent / "run" / "lease-0")
    assert added[JOB_VARIABLE] == claim.job and claim.run == config.parent / "run"
    assert placement.world == 2 and options == {"node": None, "grace_s": 90.0}
    assert words[0] in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train.stepz=3"], "train.stepz: unknown key; did you mean train.steps?"),
        (["--num-gpus", "5"], "must be a multiple of train.micro_batch x model.seq_len x ranks = 1 x 16 x 5"),
        (["--num-gpus", "5"], "With this micro_batch, there can be 1, 2, 3, 4, 6, 12 ranks"),
        (["--num-gpus", "5", "train.micro_batch=5"], "there can be no number of ranks"),
        (["--num-gpus", "0"], "--num-gpus 0: expected 1 or more"),
        (["--num-gpus", "3", "parallel.vocab=2"], "does not divide the world of 3"),
        (["data.path=nowhere"], "nowhere"),
        (["--hostfile", "nowhere"], "nowhere: there is no such hostfile"),
        (["run=c.yaml"], "c.yaml is a file"),
        (["--launcher", "none"], "--launcher none: it needs a --hostfile"),
        (["--include", "a"], "--include a: it chooses among the hosts of a --hostfile"),
    ],
)
def test_bad_input_stops_before_anything_is_spawned(config, spawned, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(config.parent)
    (config.parent / "run").mkdir()
    (config.parent / "run" / "exit.json").write_text("kept")
    assert main(["run", str(config), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert spawned == []
    assert (config.parent / "run" / "exit.json").read_text() == "kept"


@pytest.mark.parametrize("name", AT_ONCE)
def test_one_of_several_launchers_starts_nothing(config, spawned, capsys, monkeypatch, name):
    """As under `srun -n 2` or `mpirun -n 2`: each would train alone. Started alone by them, it may."""
    monkeypatch.setenv(name, "2")
    assert main(["run", str(config)]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {name}=2: ") and f"`unset {name}`" in said and not spawned
    monkeypatch.setenv(name, "1")
    assert main(["run", str(config)]) == 75 and len(spawned) == 1


def test_node_groups_want_even_hosts(config, spawned, answering, capsys):
    hosts = config.parent / "hosts"
    hosts.write_text("a slots=2\nb slots=1\n")
    asked = ["run", str(config), "--hostfile", str(hosts), "--dry-run"]
    assert main([*asked, "parallel.vocab=node"]) == 2
    assert "they run a 2, b 1. Set --num-gpus 1" in capsys.readouterr().err
    assert main([*asked, "parallel.vocab=3"]) == 0
    assert main([*asked, "parallel.vocab=node", "--num-gpus", "1"]) == 0
    assert spawned == []


def test_hosts_need_pdsh(config, spawned, answering, capsys, monkeypatch):
    monkeypatch.setattr("launch.invocation.shutil.which", lambda name: None)
    hosts = config.parent / "hosts"
    hosts.write_text("a slots=2\n")
    assert main(["run", str(config), "--hostfile", str(hosts)]) == 2
    assert "pdsh and ssh are needed, and pdsh, ssh is not found" in capsys.readouterr().err
    monkeypatch.setattr("launch.invocation.shutil.which", lambda name: name)
    assert main(["run", str(config), "--hostfile", str(hosts)]) == 75
    assert (config.parent / "run" / "launch.env").exists()
    answering["a"] = "a: cannot be reached by ssh"
    assert main(["run", str(config), "--hostfile", str(hosts)]) == 2
    assert f"{hosts}: a: cannot be reached by ssh" in capsys.readouterr().err


def test_under_slurm_srun_starts_a_launcher_on_every_host(config, spawned, monkeypatch, tmp_path):
    hosts = config.parent / "hosts"
    hosts.write_text("a slots=1\nb slots=1\nc slots=1\n")
    (tmp_path / "srun").write_text('#!/bin/sh\nprintf "%s\\n" "$@"; exit 75\n')
    (tmp_path / "srun").chmod(0o755)
    words = ["run", str(config), "--hostfile", str(hosts), "--launcher", "slurm", "--num-nodes", "2", "head={}"]
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    ran = subprocess.run(
        [sys.executable, "-m", "launch", *words], capture_output=True, text=True, env={**os.environ, "PATH": path}
    )
    assert ran.returncode == 75, ran.stderr
    told = ran.stdout.splitlines()[1:]
    assert told[told.index("--nodelist") + 1] == "a,b" and told[told.index("--include") + 1] == "a:0@b:0"
    monkeypatch.setenv("PATH", path)
    inner = told[told.index("launch") + 1 :]
    assert main([*inner, "--node-rank", "1", "--dry-run"]) in (0, 2)  # 2: no name `a` here
    assert main([*words, "--max-restarts", "1"]) == 2


@pytest.mark.parametrize("resume", ["never", "runs/other"])
def test_restarts_go_on_from_the_jobs_own_checkpoints_alone(config, spawned, capsys, resume):
    assert main(["run", str(config), "--max-restarts", "1", f"resume={resume}"]) == 2
    assert f"--max-restarts with resume={resume}" in capsys.readouterr().err and not spawned


def test_without_a_launcher_every_host_has_its_command(config, spawned, capsys):
    hosts = config.parent / "hosts"
    hosts.write_text("127.0.0.1 slots=2\n198.51.100.1 slots=1\n198.51.100.2 slots=1\n")
    asked = ["run", str(config), "--hostfile", str(hosts), "--launcher", "none", "--exclude", "127.0.0.1"]
    assert main([*asked, "--node-rank", "1", "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["198.51.100.1", "198.51.100.2"]
    assert all("--include 198.51.100.1:0@198.51.100.2:0 " in line and "--master_port 29500" in line for line in lines)
    assert main([*asked, "--node-rank", "2"]) == 2
    assert main(asked) == 2
    assert "say which with --node-rank" in capsys.readouterr().err
    begun = Placement({"198.51.100.1": 1, "198.51.100.2": 1})
    with take(config.parent / "run", begun, 0) as claim, Lease(lease_of(claim.run), claim.job):
        assert main([*asked, "--node-rank", "1"]) == 75
    assert spawned[0][1][JOB_VARIABLE] == claim.job and spawned[0][1][LEASE_VARIABLE].endswith("/lease-1")
    assert spawned[0][4] == {"node": 1, "grace_s": 90.0}


@pytest.mark.parametrize("arguments", [["--numgpus", "2"], ["word"], ["--dry"]])
def test_unknown_words_are_refused(config, spawned, capsys, arguments):
    with pytest.raises(SystemExit) as stopped:
        main(["run", str(config), "--num-gpus", "2", *arguments])
    assert stopped.value.code == 2
    assert arguments[0] in capsys.readouterr().err
    assert spawned == []


def test_help_is_quick_to_come():
    code = "import sys, launch.__main__; print({'torch', 'deepspeed', 'numpy'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


def test_the_guide_is_right_about_options_names_and_settings(capsys):
    guide = Path("docs/launching.md").read_text()
    told = ""
    for command in ("run", "doctor"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        told += capsys.readouterr().out
    options = set(re.findall(r"--[a-z]+(?:-[a-z]+)*", guide))
    assert {"--hostfile", "--elastic", "--launcher"} <= options and options <= set(re.findall(r"--[a-z-]+", told))
    (block,) = re.findall(r"```python\n(.*?)```", guide, re.DOTALL)
    imports = [line for line in block.splitlines() if line.startswith(("from", "import"))]
    exec("\n".join(imports), {})
    defaults = TimeoutConfig().model_dump()
    assert {name: float(s) for name, s in re.findall(r"\| `timeouts\.(\w+)` \| (\d+) \|", guide)} == defaults
