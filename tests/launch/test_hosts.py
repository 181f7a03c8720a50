"""Where ranks go: hostfiles, GPUs, cores, and what is said when they do not fit."""

import subprocess

import pytest

from common.errors import ConfigError
from launch import hosts
from launch.hosts import Placement, place, read_hostfile, visible_gpus, without


def hostfile(tmp_path, text):
    path = tmp_path / "hosts"
    path.write_text(text)
    return path


@pytest.fixture
def machine(monkeypatch):
    """Makes this machine one with so many GPUs and cores."""

    def make(gpus: int, cores: int = 8, visible: str | None = None, answers: bool = True) -> None:
        def nvidia_smi(command, **options):
            if not answers:
                raise FileNotFoundError(command[0])
            lines = [f"GPU {k}: a GPU (UUID: GPU-{k})\n  MIG 1g.5gb Device 0: (UUID: MIG-{k})\n" for k in range(gpus)]
            return subprocess.CompletedProcess(command, 0, "".join(lines), "")

        monkeypatch.setattr(subprocess, "run", nvidia_smi)
        monkeypatch.setattr(hosts, "cores", lambda: cores)
        if visible is None:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        else:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)

    return make


def test_a_hostfile_is_read_in_order(tmp_path):
    text = "# ours\n\nnode-2 slots=8\n  node1.lan   slots=4  # the old one\nuser@10.0.0.3\tslots=016\n"
    assert list(read_hostfile(hostfile(tmp_path, text)).items()) == [
        ("node-2", 8),
        ("node1.lan", 4),
        ("user@10.0.0.3", 16),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a slots=1\nb\n", "hosts, line 2: given 'b'; expected `HOST slots=N`"),
        ("a slots=x", "line 1: given 'a slots=x'"),
        ("a slots=-1", "line 1: given 'a slots=-1'"),
        ("a slots=4x", "line 1: given 'a slots=4x'"),
        ("a slots = 4", "line 1: given 'a slots = 4'"),
        ("a:4", "line 1: given 'a:4'"),
        ("-oProxyCommand=x slots=1", "line 1: given '-oProxy"),
        ("a,b slots=1", "line 1: given 'a,b slots=1'"),
        ("# x\na slots=1\n\na slots=2", "line 4: the host a is given twice"),
        ("a slots=2\nb slots=0", "line 2: the host b has slots=0"),
        ("# nothing\n\n", "there is no host in it"),
    ],
)
def test_a_bad_hostfile_names_the_line(tmp_path, text, message):
    with pytest.raises(ConfigError) as error:
        read_hostfile(hostfile(tmp_path, text))
    assert message in str(error.value)


def test_a_hostfile_that_cannot_be_read(tmp_path):
    with pytest.raises(ConfigError, match="no such hostfile"):
        read_hostfile(tmp_path / "none")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_hostfile(tmp_path)


def test_hosts_give_their_slots_or_fewer(tmp_path):
    path = hostfile(tmp_path, "a slots=4\nb slots=2\n")
    placement = place(path)
    assert placement == Placement({"a": 4, "b": 2}, path)
    assert placement.world == 6
    assert place(path, 2).ranks == {"a": 2, "b": 2}
    assert place(path, 2).chosen == "a:0,1@b:0,1"
    with pytest.raises(ConfigError, match="the host b in .* has only slots=2"):
        place(path, 3)


def test_every_gpu_where_there_are_any(machine):
    machine(gpus=4)
    assert place() == Placement({"localhost": 4}, gpus=(0, 1, 2, 3))
    assert place(per_host=2) == Placement({"localhost": 2}, gpus=(0, 1))
    with pytest.raises(ConfigError, match="4 GPUs to use"):
        place(per_host=5)


def test_cuda_visible_devices_chooses(machine):
    machine(gpus=8, visible="6, 2")
    assert place() == Placement({"localhost": 2}, gpus=(2, 6))
    machine(gpus=8, visible="3,-1,4")
    assert visible_gpus() == (3,)
    machine(gpus=8, visible="GPU-8a5f")
    with pytest.raises(ConfigError, match="CUDA_VISIBLE_DEVICES=GPU-8a5f: .* numbers"):
        visible_gpus()


@pytest.mark.parametrize("hidden", [{"visible": ""}, {"visible": "-1"}, {"answers": False}])
def test_without_a_gpu_two_ranks_or_one_core_one(machine, hidden):
    machine(gpus=4, cores=8, **hidden)
    assert place() == Placement({"localhost": 2})
    assert place(per_host=5).world == 5
    machine(gpus=4, cores=1, **hidden)
    assert place().world == 1


@pytest.mark.parametrize("per_host", [0, -1])
def test_at_least_one_rank(machine, per_host):
    machine(gpus=1)
    with pytest.raises(ConfigError, match="1 or more ranks"):
        place(per_host=per_host)


@pytest.mark.parametrize(
    ("options", "ranks", "chosen"),
    [
        ({"include": "b@a:1,3"}, {"a": 2, "b": 2}, "a:1,3@b:0,1"),
        ({"include": "a:2@a:0"}, {"a": 2}, "a:0,2"),
        ({"exclude": "b"}, {"a": 4}, "a:0,1,2,3"),
        ({"exclude": "a:0@b:1"}, {"a": 3, "b": 1}, "a:1,2,3@b:0"),
        ({"hosts": 1, "per_host": 1}, {"a": 1}, "a:0"),
        ({"include": "a@b"}, {"a": 4, "b": 2}, ""),
    ],
)
def test_some_hosts_and_slots_are_chosen_as_deepspeed_does(tmp_path, options, ranks, chosen):
    placement = place(hostfile(tmp_path, "a slots=4\nb slots=2\n"), **options)
    assert dict(placement.ranks) == ranks and placement.chosen == chosen


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"include": "c"}, "the host 'c' is not in"),
        ({"include": "a:4"}, "slot '4' of a; expected numbers from 0 to 3"),
        ({"include": "a:x"}, "slot 'x' of a"),
        ({"exclude": "a@b"}, "no slot of .* is left"),
        ({"include": "a", "exclude": "b"}, "give one of them"),
        ({"include": "a", "hosts": 1}, "leave --num-nodes and --num-gpus out"),
        ({"hosts": 3}, "has 2 hosts; ask for 1 to 2"),
        ({"hosts": 0}, "ask for 1 to 2"),
    ],
)
def test_choices_that_cannot_be_made(tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        place(hostfile(tmp_path, "a slots=4\nb slots=2\n"), **options)


def test_a_host_with_a_user_cannot_be_chosen_from(tmp_path):
    path = hostfile(tmp_path, "me@a slots=1\nb slots=1\n")
    assert place(path).world == 2
    with pytest.raises(ConfigError, match="given as me@a; give the user name in ~/.ssh/config"):
        place(path, hosts=1)


def test_what_is_left_without_some_hosts(tmp_path):
    placement = place(hostfile(tmp_path, "a slots=4\nb slots=2\nc slots=1"), exclude="a:0")
    left = without(placement, {"b"})
    assert left is not None and left.ranks == {"a": 3, "c": 1} and left.chosen == "a:1,2,3@c:0"
    assert without(placement, {"a", "b", "c"}) is None
