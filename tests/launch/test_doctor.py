"""What the doctor makes of the hosts' answers."""

from __future__ import annotations

import subprocess
from typing import Any

import pytest

from common.files import sha256_of
from launch.doctor import compared, skewed
from launch.probe import data_state, facts, more_facts
from launch.reach import Facts
from tests.support.tiny import make_data


def host(tmp_path: Any, **changes: Any) -> Facts:
    fine = {**facts(), **more_facts(tmp_path / "run", tmp_path / "data", "token"), "shares_run": True, "changed": ""}
    data = {"sha256": "a" * 64, "problem": None}
    return {**fine, "data": data, "free_bytes": 2**40, "compiler": "g++", "ninja": "ninja", **changes}


def test_hosts_that_are_alike_have_no_problem(tmp_path: Any) -> None:
    assert compared({"a": host(tmp_path), "b": host(tmp_path)}, with_config=True) == []


def test_a_host_that_differs_from_the_most_is_named(tmp_path: Any) -> None:
    others = {name: host(tmp_path, revision="1") for name in "acd"}
    (told,) = compared({**others, "b": host(tmp_path, revision="2")}, with_config=True)
    assert told.startswith("b: the checkout is 2, but 1 on most hosts; check out the same revision")


def test_checkouts_with_other_changes_differ(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        for words in (["init", "-q"], ["add", "file"], ["-c", "user.name=a", "-c", "user.email=b", "commit", "-qmc"]):
            (tmp_path / name / "file").write_text("one\n")
            subprocess.run(["git", *words], check=True)
        assert more_facts(tmp_path / "run", tmp_path / "data", "token")["changed"] == ""
        (tmp_path / name / "file").write_text(f"{name}\n")
    hosts = {}
    for name in "ab":
        monkeypatch.chdir(tmp_path / name)
        changed = more_facts(tmp_path / "run", tmp_path / "data", "token")["changed"]
        hosts[name] = host(tmp_path, revision="1", changed=changed)
    (told,) = compared(hosts, with_config=False)
    assert "the checkout is 1, changed (" in told
    assert compared({"a": hosts["a"], "c": hosts["a"]}, with_config=False) == []


def test_a_hosts_own_problems(tmp_path: Any) -> None:
    sick = host(tmp_path, compiler=None, ninja=None, shares_run=False, free_bytes=2**30)
    told = compared({"a": sick}, with_config=True)
    assert [text.split(";")[0] for text in told] == [
        "a: there is no g++, with which DeepSpeed and Overtone build",
        told[1].split(";")[0],
        "a: its run folder is not this machine's",
        "a: 1.0 GiB are free in the run folder",
    ]
    assert compared({"a": {**sick, "compiler": "g++", "ninja": "n"}}, with_config=False) == []


def test_prepared_data_are_whole_or_name_what_is_not(tmp_path: Any) -> None:
    folder = make_data(tmp_path / "data")
    found = data_state(folder)
    assert found["sha256"] == sha256_of(folder / "manifest.json") and found["problem"] is None
    index = folder / "val-00000.idx"
    index.write_bytes(index.read_bytes()[:-1])
    assert data_state(folder)["problem"].startswith(f"{index}: ")
    (folder / "train-00000.bin").unlink()
    assert data_state(folder)["problem"] == f"{folder}/train-00000.bin: missing"


def test_a_skew_of_a_second_is_a_problem() -> None:
    assert skewed({"a": 0.2, "b": -1.5}) == ["b: its clock is -1.5 s off; start chrony or ntpd there"]
