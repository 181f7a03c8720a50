"""What is said of ranks that did not meet."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest

from common.errors import ConfigError
from launch.invocation import free_port
from pretrain.__main__ import main
from pretrain.runtime import rendezvous
from pretrain.runtime.claim import Holder, hold
from pretrain.runtime.rendezvous import why_apart
from pretrain.runtime.watch import _is_collective, leave_refusal


def point(address: str, port: int | str) -> dict[str, str]:
    return {"MASTER_ADDR": address, "MASTER_PORT": str(port)}


def test_a_port_that_is_blocked_open_or_nobodys(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        kind, why = why_apart(point("127.0.0.1", port), "node2", 20)
    assert kind == "stuck" and "did not all meet" in why and f"127.0.0.1:{port}" in why and "GLOO_SOCKET" in why
    kind, why = why_apart(point("127.0.0.1", free_port()), "node2", 20)
    assert kind == "stuck" and "nobody listens" in why

    def dropped(*_: object) -> None:
        raise TimeoutError("timed out")

    monkeypatch.setattr(rendezvous.socket, "create_connection", dropped)
    kind, why = why_apart(point("10.77.0.1", 29500), "node2", 20)
    assert kind == "error"
    for word in ("node2 cannot reach 10.77.0.1:29500", "20 s", "--master-port", "NCCL_SOCKET_IFNAME", "TCP ports"):
        assert word in why


def test_a_config_that_is_refused_is_recorded_for_the_launcher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The rank knows no run folder of its own; its launcher's lease is in one."""
    (tmp_path / "bad.yaml").write_text("nonsense: 1\n")
    place = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_SIZE": "1", **point("127.0.0.1", 29500)}
    for name, value in {**place, "OVERTONE_JOB": "j", "OVERTONE_LEASE": str(tmp_path / "run" / "lease-0")}.items():
        monkeypatch.setenv(name, value)
    with hold(tmp_path / "run", Holder("j", launcher=True)):
        assert main([str(tmp_path / "bad.yaml")]) == 2
        left = json.loads((tmp_path / "run" / "failures" / "rank-1.json").read_text())
        assert (left["kind"], left["code"], left["rank"], left["job"]) == ("error", 2, 1, "j")
        assert "nonsense" in left["error"] and "nonsense" in capsys.readouterr().err
        monkeypatch.setenv("OVERTONE_JOB", "another")
        (tmp_path / "run" / "failures" / "rank-1.json").unlink()
        leave_refusal(
            {"OVERTONE_JOB": "another", "OVERTONE_LEASE": str(tmp_path / "run" / "lease-0")}, 1, ConfigError("x")
        )
        assert not list((tmp_path / "run" / "failures").glob("rank-*")), "it is another job's folder"


def test_a_store_that_goes_is_another_ranks_end() -> None:
    import torch.distributed as dist

    assert _is_collective(dist.DistNetworkError("failed to recv, got 0 bytes"), "rendezvous")
    assert _is_collective(RuntimeError("Gloo connectFullMesh failed with ..."), "rendezvous")
    assert not _is_collective(RuntimeError("CUDA driver version is insufficient"), "rendezvous")
