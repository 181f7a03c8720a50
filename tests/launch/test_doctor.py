"""What the doctor makes of the hosts' answers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from launch.doctor import compared, skewed
from launch.hosts import Placement, unfit
from launch.probe import data_problem, facts, more_facts
from launch.reach import Facts
from pretrain.runtime.agreement import facts_here
from tests.support.tiny import make_data


def host(tmp_path: Any, **changes: Any) -> Facts:
    fine = {**facts(), **more_facts(tmp_path / "run", tmp_path / "data", "token"), "shares_run": True, "identity": None}
    return {**fine, "data": None, "free_bytes": 2**40, "compiler": "g++", "ninja": "ninja", **changes}


def problems(answers: Mapping[str, Facts], with_config: bool = True) -> list[str]:
    return compared(Placement(dict.fromkeys(answers, 1), Path("hosts")), answers, with_config)


def common(**changes: dict[str, Any]) -> dict[str, Any]:
    """What `agreement.facts_here` tells, with some of it changed."""
    told = {part: dict(facts) for part, facts in facts_here().items()}
    return {part: {**told.get(part, {}), **changes.get(part, {})} for part in {**told, **changes}}


def test_hosts_that_are_alike_have_no_problem(tmp_path: Any) -> None:
    assert problems({"a": host(tmp_path), "b": host(tmp_path)}) == []


def test_a_host_that_differs_from_the_most_is_named(tmp_path: Any) -> None:
    odd = common(code={"sources": "0" * 64}, versions={"torch": "1.0"}, data={"fingerprint": "other"})
    usual = {name: host(tmp_path, common=common(data={"fingerprint": "one"})) for name in "acd"}
    told = problems({"b": host(tmp_path, common=odd), **usual})
    assert [text.partition(":")[0] for text in told] == ["b", "b", "b"]
    assert "b: code sources is 000000000000..., not " in told[0] and "check out the same revision" in told[0]
    assert told[1].startswith("b: torch is 1.0, not ") and told[2].startswith("b: data fingerprint is other, not one")


def test_a_host_that_cannot_tell_says_why(tmp_path: Any) -> None:
    told = problems({"a": host(tmp_path), "b": host(tmp_path, common={"problem": "ImportError: no yaml"})})
    assert told == ["b: ImportError: no yaml"]
    asked = more_facts(tmp_path / "run", tmp_path / "data", "token", [str(tmp_path / "none.yaml")])
    assert "none.yaml: there is no such file" in asked["common"]["problem"]


def test_a_host_under_two_names_and_slots_without_gpus_are_found(tmp_path: Any) -> None:
    same = host(tmp_path, identity="x", gpus=4)
    assert problems({"a": same, "b": same}) == [
        "b: it is the same host as a; name it once, with all its slots in that line"
    ]
    hosts = {"a": host(tmp_path, gpus=8), "b": host(tmp_path, gpus=4), "c": host(tmp_path, gpus=0)}
    eight = Placement({"a": 8, "b": 8, "c": 8}, Path("hosts"))
    assert [text.partition(";")[0] for text in unfit(eight, hosts)] == [
        "b: 8 slots are to be used, but 4 GPUs are found there",
        "c: 8 slots are to be used, but 0 GPUs are found there",
    ]
    chosen = Placement({"a": 2, "b": 1}, Path("hosts"), chosen="a:0,7@b:5")
    assert [text[:1] for text in unfit(chosen, {name: hosts[name] for name in "ab"})] == ["b"], "slot 5 of four"
    on_cores = {name: host(tmp_path, gpus=0) for name in "abc"}
    assert unfit(eight, on_cores) == []


def test_a_hosts_own_problems(tmp_path: Any) -> None:
    sick = host(tmp_path, compiler=None, ninja=None, shares_run=False, free_bytes=2**30)
    told = problems({"a": sick})
    assert [text.split(";")[0] for text in told] == [
        "a: there is no g++, with which DeepSpeed and Overtone build",
        told[1].split(";")[0],
        "a: its run folder is not this machine's",
        "a: 1.0 GiB are free in the run folder",
    ]
    assert problems({"a": {**sick, "compiler": "g++", "ninja": "n"}}, with_config=False) == []


def test_prepared_data_are_whole_or_name_what_is_not(tmp_path: Any) -> None:
    folder = make_data(tmp_path / "data")
    assert data_problem(folder) is None
    index = folder / "val-00000.idx"
    index.write_bytes(index.read_bytes()[:-1])
    assert str(data_problem(folder)).startswith(f"{index}: ")
    (folder / "train-00000.bin").unlink()
    assert data_problem(folder) == f"{folder}/train-00000.bin: missing"


def test_a_skew_of_a_second_is_a_problem() -> None:
    assert skewed({"a": 0.2, "b": -1.5}) == ["b: its clock is -1.5 s off; start chrony or ntpd there"]
