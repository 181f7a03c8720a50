"""A dataset of the Hub, over HTTP: a server on this machine that answers as the Hub does for one dataset of parquet
files. `python -m data prepare` reads it with the Hub's own client, and makes what it makes of a local copy.
"""

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import datasets  # type: ignore[import-untyped]
import pyarrow  # type: ignore[import-untyped]
import pytest
import yaml
from pyarrow import parquet  # type: ignore[import-untyped]

from common.errors import ConfigError
from data.config import HubSource
from data.prepare import prepare
from data.sources.hub import hub_parts
from tests.support.corpus import ROOT, TEXTS, assert_same, config, quiet, settings

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """Serves the dataset own/texts from a folder; files in `broken` can be read once, for their schema."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.folder = folder
        self.broken: set[str] = set()
        self.read: set[str] = set()
        self.refusal: tuple[int, str] | None = None  # status and the Hub's code for why


class Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        place, folder = self.path.split("?")[0], self.server.folder
        if self.server.refusal:
            code, reason = self.server.refusal
            return self._send(code, b"{}", {"X-Error-Code": reason})
        if found := re.fullmatch(r"/api/datasets/own/texts/tree/\w+/?(.*)", place):
            below = folder / found[1]
            if below.is_dir():
                return self._send_json([_listed(path, folder) for path in sorted(below.iterdir())])
        elif re.fullmatch(r"/api/datasets/own/texts(/revision/\w+)?", place):
            return self._send_json({"id": "own/texts", "_id": "1", "sha": COMMIT, "siblings": [], "tags": []})
        elif found := re.fullmatch(rf"/datasets/own/texts/resolve/{COMMIT}/(.*\.parquet)", place):
            return self._send_file(folder / found[1])
        return self._send(404, b"{}", {"X-Error-Code": "EntryNotFound"})

    def _send_file(self, path: Path) -> None:
        content = path.read_bytes()
        first, last = map(int, re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"]).groups())
        if path.name in self.server.broken & self.server.read:
            return self._send(403, b"{}", {})
        self.server.read.add(path.name)
        last = min(last, len(content) - 1)
        return self._send(206, content[first : last + 1], {"Content-Range": f"bytes {first}-{last}/{len(content)}"})

    def _send_json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, code: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(code)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


def _listed(path: Path, folder: Path) -> dict[str, Any]:
    kind = "directory" if path.is_dir() else "file"
    return {"type": kind, "path": str(path.relative_to(folder)), "size": path.stat().st_size, "oid": "0" * 40}


@pytest.fixture
def hub(tmp_path) -> Iterator[Hub]:
    folder = tmp_path / "dataset" / "plain_text"
    folder.mkdir(parents=True)
    for part in range(4):
        rows = pyarrow.table({"text": TEXTS[100 * part : 100 * part + 100]})
        parquet.write_table(rows, folder / f"train-0000{part}-of-00004.parquet", row_group_size=30)
    with Hub(tmp_path / "dataset") as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def run(hub: Hub, tmp_path: Path, **source: Any) -> subprocess.CompletedProcess[str]:
    """The command, with the Hub's client pointed at the server."""
    given = settings(tmp_path, source={"kind": "hub", "name": "own/texts", **source}, tokenizer={"vocab_size": 350})
    given["tokenizer"]["model"] = str(tmp_path / "local" / "tokenizer.model")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"data": given}))
    address = f"http://127.0.0.1:{hub.server_address[1]}"
    environment = {**os.environ, "HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "home"), "NO_PROXY": "127.0.0.1"}
    environment.pop("HF_HUB_OFFLINE", None)
    command = [sys.executable, "-m", "data", "prepare", str(tmp_path / "config.yaml")]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_a_dataset_of_the_hub_gives_what_its_local_copy_gives(tmp_path, hub, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    local = {"kind": "hub", "name": str(hub.folder)}
    prepare(config(tmp_path, source=local, path=str(tmp_path / "local")), quiet)

    hub.broken = {"train-00002-of-00004.parquet"}
    found = run(hub, tmp_path)
    assert found.returncode == 2
    assert re.search(r"train-00002-of-00004\.parquet: unreadable after row 0 .*check the network", found.stderr)
    assert (tmp_path / "prepared.draft").is_dir()

    hub.broken = set()
    found = run(hub, tmp_path)
    assert found.returncode == 0, found.stderr
    assert "200 documents were done" in found.stdout
    assert_same(tmp_path / "prepared", tmp_path / "local")

    hub.broken = {path.name for path in (hub.folder / "plain_text").iterdir()}
    assert run(hub, tmp_path).returncode == 0  # what is prepared needs no Hub


@pytest.mark.parametrize(
    ("refusal", "remedy"),
    [
        ((401, "GatedRepo"), r"accept the terms on https://huggingface.co/datasets/own/texts, then set HF_TOKEN"),
        ((403, "GatedRepo"), r"accept the terms on https://huggingface.co/datasets/own/texts, then set HF_TOKEN"),
        (
            (401, "RepoNotFound"),
            r"check data.source.name; if .*own/texts is private, set HF_TOKEN or run `hf auth login`",
        ),
        ((404, "RepoNotFound"), r"check data.source.name; if .*own/texts is private"),
        ((404, "RevisionNotFound"), r"set data.source.revision to one of the dataset's branches"),
    ],
)
@pytest.mark.slow
def test_a_refusal_of_the_hub_names_what_helps(tmp_path, hub, refusal, remedy):
    hub.refusal = refusal
    found = run(hub, tmp_path)
    assert found.returncode == 2 and re.search(remedy, found.stderr), found.stderr


def test_a_hub_that_is_not_asked_or_not_there_is_told_apart(tmp_path, hub, monkeypatch):
    source = HubSource(kind="hub", name="own/texts")
    for offline, remedy in (
        (True, "HF_HUB_OFFLINE is set, so the Hub was not asked: unset it"),
        (False, "check the network"),
    ):
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", offline)
        monkeypatch.setattr(datasets, "load_dataset_builder", unreachable)
        with pytest.raises(ConfigError, match=remedy):
            hub_parts(source)


def unreachable(*_: Any, **__: Any) -> None:
    raise ConnectionError("Couldn't reach 'own/texts' on the Hub")


@pytest.mark.slow
def test_the_first_part_of_a_dataset_of_the_hub_is_taken_only_if_asked_for(tmp_path, hub):
    (hub.folder / "plain_text").rename(hub.folder / "partial-train")
    found = run(hub, tmp_path)
    assert found.returncode == 2 and re.search(r"partial-train/.*data\.source\.partial=true", found.stderr), (
        found.stderr
    )
    prepare(
        config(
            tmp_path, source={"kind": "hub", "name": str(hub.folder), "partial": True}, path=str(tmp_path / "local")
        ),
        quiet,
    )
    found = run(hub, tmp_path, partial=True)
    assert found.returncode == 0, found.stderr
    assert_same(tmp_path / "prepared", tmp_path / "local")
