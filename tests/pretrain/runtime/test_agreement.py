"""What ranks on several hosts must have in common, and how they find out together that they have not."""

from __future__ import annotations

import os
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest

from common import checkout
from common.command import ALLOW_CODE
from common.errors import ConfigError
from pretrain.runtime import agreement
from pretrain.runtime.watch import Watch
from tests.support.ranks import TIMEOUT_S, Caller, context
from tests.support.tiny import make_data, tiny_config


def facts(tmp_path: Path, **changes: Any) -> dict[str, Any]:
    """This host's, as another host reads them."""
    return {part: dict(told) for part, told in agreement.facts_here(tiny_config(**changes)).items()}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("prepared") / "data")


def test_hosts_that_have_the_same_go_on(tmp_path: Path, data: Path) -> None:
    told = facts(tmp_path, data__path=str(data))
    assert set(told) == {"code", "versions", "settings", "data", "text"}
    assert told["settings"]["optim.lr"] and told["data"]["fingerprint"] and told["versions"]["torch"]
    assert agreement.judge([["a", told], ["b", told]]) == {"refused": None, "allowed": None}


@pytest.mark.parametrize(
    ("part", "name", "value", "words"),
    [
        ("settings", "optim.lr", 0.5, "b: optim.lr is 0.5, not 0.01"),
        ("settings", "train.steps", 7, "b: train.steps is 7, not "),
        ("settings", "deepspeed.zero", 1, "b: deepspeed.zero is 1, not None"),
        ("code", "sources", "f" * 64, "b: code sources is ffffffffffff..., not "),
        ("code", "revision", "e" * 40, "b: code revision is eeeeeeeeeeee..., not "),
        ("versions", "torch", "1.0", "b: torch is 1.0, not "),
        ("data", "fingerprint", "d" * 64, "b: data fingerprint is dddddddddddd..., not "),
        ("data", "tokenizer", "c" * 64, "b: data tokenizer is cccccccccccc..., not "),
        ("text", "/a.txt", "9" * 64, "b: text /a.txt is 999999999999..., not None"),
    ],
)
def test_one_that_differs_is_named_with_host_and_setting(
    part: str, name: str, value: Any, words: str, tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agreement, "revision", lambda: "a" * 40)
    here = facts(tmp_path, data__path=str(data))
    there = {**here, part: {**here[part], name: value}}
    refused = agreement.judge([["a", here], ["b", there], ["b", there]])["refused"]
    assert refused is not None and words in refused and refused.count("b: ") == 1, "once for a host"
    assert agreement.REMEDIES[part] in refused
    allowed = agreement.judge([["a", here], ["b", there]], allow_code=True)
    if part in agreement.CODE:
        assert allowed["refused"] is None and words in str(allowed["allowed"]) and ALLOW_CODE in refused
    else:
        assert words in str(allowed["refused"]), "only code may differ"


def test_a_copy_without_git_is_compared_by_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, there = agreement.facts_here(), agreement.facts_here()
    assert not agreement.differences("ab", [here, {**there, "code": {**there["code"], "revision": None}}])
    copy = tmp_path / "copy"
    for folder in checkout.CODE:
        shutil.copytree(checkout.ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    same = checkout.sources_sha256()
    monkeypatch.setattr(checkout, "ROOT", copy)
    assert checkout.sources_sha256() == same
    for name in ("model/decoder.py", "model/new.py", "pretrain/study/page/new.py"):
        edited = copy / name
        edited.write_text("# edited\n" + (edited.read_text() if edited.exists() else ""))
        assert checkout.sources_sha256() != same
        same = checkout.sources_sha256()


def _rank(caller: Any, rank: int, port: int, run: str, work: Any, results: Any) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1", OMP_NUM_THREADS="1")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    socket.gethostname = lambda: f"host{rank}"
    try:
        results.put((rank, work(Path(run), rank)))
    except ConfigError as error:
        results.put((rank, str(error)))


def on_two_hosts(work: Any, run: Path) -> list[Any]:
    """What two ranks that call themselves host0 and host1 return, or why they refuse."""
    from launch.probe import free_port

    forks = context()
    results, port = forks.Queue(), free_port()
    ranks = [
        forks.Process(target=_rank, args=(Caller(), k, port, str(run), work, results), daemon=True) for k in (0, 1)
    ]
    for process in ranks:
        process.start()
    try:
        return [value for _, value in sorted(results.get(timeout=TIMEOUT_S) for _ in ranks)]
    finally:
        for process in ranks:
            process.join(10)
            process.kill()


def meet_and_agree(run: Path, rank: int) -> str:
    from pretrain.runtime.meeting import agree, check_shared, meet

    meeting = meet(60)
    agree(meeting, tiny_config(run=str(run), optim__lr=0.01))
    check_shared(meeting, run)
    return "fine"


def differ(run: Path, rank: int) -> None:
    from pretrain.runtime.meeting import agree, meet

    agree(meet(60), tiny_config(run=str(run), optim__lr=0.01 + rank))


def keep_apart(run: Path, rank: int) -> None:
    from pretrain.runtime.meeting import check_shared, meet

    agreement.SEEN_S = 0.3
    own = run / f"host{rank}"
    own.mkdir()
    check_shared(meet(60), own)


def test_ranks_find_out_together(tmp_path: Path) -> None:
    assert on_two_hosts(meet_and_agree, tmp_path) == ["fine", "fine"]
    assert not list(tmp_path.iterdir()), "the token is gone"
    told = on_two_hosts(differ, tmp_path)
    assert told[0] == told[1] and "host1: optim.lr is 1.01, not 0.01" in told[0]
    told = on_two_hosts(keep_apart, tmp_path)
    assert told[0] == told[1] and "on host1 it is another folder than on the first host, host0" in told[0]


def test_a_launcher_with_a_run_folder_of_its_own_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the ranks leave of their end would never reach it."""
    monkeypatch.setattr(agreement, "SEEN_S", 0.2)
    cfg, lease = tiny_config(run=str(tmp_path / "run")), tmp_path / "elsewhere" / "lease-0"
    first = Watch(cfg, {"RANK": "0", "OVERTONE_LEASE": str(lease)})
    with pytest.raises(ConfigError, match="there is no lease-0, which the launcher keeps in its run folder"):
        first.hold()
    assert not (tmp_path / "run").exists(), "nothing was touched"
    lease.parent.mkdir()
    lease.write_text("job 1")
    first.hold()
    assert (tmp_path / "run" / "lock").exists()


def test_a_folder_that_cannot_be_written_is_told_to_all(tmp_path: Path) -> None:
    told = on_two_hosts(meet_and_agree, tmp_path / "gone")
    assert told[0] == told[1] and "cannot be written" in told[0]
