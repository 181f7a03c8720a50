"""How jobs between hosts end: some scenarios of `python -m benchmarks.hosts`, which has more of them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks.hosts.__main__ import main, play
from benchmarks.hosts.stage import Ended, prepare
from tests.support.hosts import needs_hosts

pytestmark = [needs_hosts, pytest.mark.hosts, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(tmp_path_factory.mktemp("prepared"))


@pytest.fixture
def ended(tmp_path: Path, data: Path, request: pytest.FixtureRequest) -> Ended:
    ended = play(request.param, tmp_path / "scenario", data)
    assert ended.seconds < 60 and "RANKS ARE LEFT" not in ended.note, ended
    return ended


@pytest.mark.parametrize("ended", ["ssh session ended"], indirect=True)
def test_a_connection_that_ends_costs_no_step(ended: Ended) -> None:
    """Nobody reads what the first rank prints: it saves, with the others, and the last line says why."""
    assert ended.code == 75 and "the connection to node1 ended" in ended.last, ended
    saved = re.search(r"saved step-0*(\d+), exit.json 75, trained (\d+) steps", ended.note)
    assert saved and saved[1] == saved[2], ended


@pytest.mark.parametrize("ended", ["inner launcher killed"], indirect=True)
def test_a_killed_inner_launcher_is_a_failure_and_costs_no_step(ended: Ended) -> None:
    assert ended.code == 1 and "deepspeed's launcher on node2 was killed" in ended.last, ended
    saved = re.search(r"saved step-0*(\d+), exit.json 1, trained (\d+) steps", ended.note)
    assert saved and saved[1] == saved[2], ended


@pytest.mark.parametrize("ended", ["plain deepspeed, first rank frozen"], indirect=True)
def test_plain_deepspeed_ends_with_a_frozen_rank(ended: Ended) -> None:
    """Nobody but its guardian can end it, and deepspeed's launcher on its host would wait for it for ever."""
    assert ended.code == 256 - 9, ended


def test_the_command_refuses_what_it_does_not_know(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--only", "nonsense"])
    assert "rank frozen" in capsys.readouterr().err
