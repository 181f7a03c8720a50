"""Manifests, indexes and tokenizers that are not what they should be, though nobody's hash says so."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.errors import ConfigError
from data.draft import Draft
from data.manifest import MANIFEST, check_tokenizer, fingerprint, read_manifest
from data.reuse import resume
from data.shards import INDEX, open_split, verify_folder
from data.tokenizer import Tokenizer
from launch.probe import data_problem
from tests.support.shards import make_folder, some_documents


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_folder(tmp_path / "data", train=some_documents([5, 9, 3]), val=some_documents([4]))
    return tmp_path / "data"


def change(folder: Path, harm: Callable[[dict[str, Any]], object]) -> None:
    """With a fingerprint that agrees, where one can be made."""
    manifest = json.loads((folder / MANIFEST).read_text())
    harm(manifest)
    if "fingerprint" in manifest:
        manifest["fingerprint"] = fingerprint(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))


def shard_of(manifest: dict[str, Any]) -> dict[str, Any]:
    return manifest["splits"]["train"]["shards"][0]


HARMS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "leaves the folder": (lambda m: shard_of(m).update(file="../../x.bin"), 'file: given "../../x.bin"'),
    "an absolute path": (lambda m: shard_of(m).update(file="/etc/hostname.bin"), "file: given"),
    "a NUL in a name": (lambda m: shard_of(m).update(file="a\0.bin"), "file: given"),
    "half a character": (lambda m: shard_of(m).update(file="\ud800.bin"), ""),
    "a tokenizer elsewhere": (lambda m: m.update(tokenizer_file="../tokenizer.model"), "tokenizer_file: given"),
    "tokens of text": (lambda m: shard_of(m).update(tokens="20"), 'tokens: given "20"'),
    "tokens of true": (lambda m: shard_of(m).update(tokens=True), "tokens: given true"),
    "tokens below 0": (lambda m: shard_of(m).update(tokens=-1), "tokens: given -1"),
    "more tokens": (lambda m: shard_of(m).update(tokens=10**6), "tokens are not those of its shards"),
    "no shards": (lambda m: m["splits"]["train"].update(shards=None), "shards: given"),
    "shards of nothing": (lambda m: m["splits"].update(train=[]), "splits.train"),
    "another dtype": (lambda m: m.update(dtype="int8"), 'dtype: given "int8"'),
    "an eos beyond the vocabulary": (lambda m: m.update(eos_id=10**6), "eos_id=1000000"),
    "no hash": (lambda m: m.update(tokenizer_sha256=7), "tokenizer_sha256: given 7"),
    "other sources": (lambda m: m.update(sources=["a", "b"]), "is not of the sources a, b"),
    "splits in a list": (lambda m: m.update(splits=[]), "splits: given"),
}


@pytest.mark.parametrize("harm", HARMS)
def test_a_consistent_manifest_of_another_form_is_refused(harm: str, folder: Path) -> None:
    damage, told = HARMS[harm]
    change(folder, damage)
    with pytest.raises(ConfigError, match=f"{MANIFEST}: not a manifest of prepared data: .*{told}.*delete the folder"):
        read_manifest(folder)
    assert isinstance(data_problem(folder), str | None)


@pytest.mark.parametrize("content", ["[" * 200_000, "1" * 10_000, '{"format": 2, "splits": "\0"}', "\ufeff{}", ""])
def test_what_is_no_json_of_ours_is_refused(content: str, folder: Path) -> None:
    (folder / MANIFEST).write_text(content)
    with pytest.raises(ConfigError, match=MANIFEST):
        open_split(folder, "train")
    assert data_problem(folder)


@pytest.mark.parametrize("name", [MANIFEST, "tokenizer.model", "train-00000.bin", "train-00000.idx"])
@pytest.mark.parametrize("what", ["pipe", "folder", "link"])
def test_what_is_no_file_is_refused_and_not_waited_for(name: str, what: str, folder: Path) -> None:
    (folder / name).unlink()
    if what == "pipe":
        os.mkfifo(folder / name)
    elif what == "folder":
        (folder / name).mkdir()
    else:
        (folder / name).symlink_to("nowhere")
    with pytest.raises(ConfigError, match=name):
        verify_folder(folder)
    with pytest.raises(ConfigError, match=name):
        check_tokenizer(folder, read_manifest(folder))
        open_split(folder, "train")
    if name == "tokenizer.model":
        with pytest.raises(ConfigError, match="the tokenizer cannot be read"):
            Tokenizer(folder / name)
    else:
        assert data_problem(folder)


@pytest.mark.parametrize("column, value", [("start", 3), ("start", -5), ("start", 10**9), ("source", 9)])
def test_an_index_that_is_none_is_refused(column: str, value: int, folder: Path) -> None:
    index = np.fromfile(folder / "train-00000.idx", dtype=INDEX)
    index[column][1 if value == 10**9 else 0] = value
    index.tofile(folder / "train-00000.idx")
    with pytest.raises(ConfigError, match=r"train-00000\.idx: it is no index"):
        open_split(folder, "train").document_starts()


@pytest.mark.parametrize("journal", ["null", "[]", "7", '{"job": 3}', '{"job": {}, "progress": {}}', "[" * 99_999])
def test_a_journal_that_is_none_is_refused(journal: str, tmp_path: Path) -> None:
    draft = Draft(tmp_path, {"format": 2, "settings": {}, "tokenizer": None, "inputs": {"a": []}})
    (tmp_path / "journal.json").write_text(journal)
    with pytest.raises(ConfigError, match="damaged"):
        resume(draft, lambda line: None)


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(data=st.data())
def test_any_value_anywhere_is_read_or_refused(data: st.DataObject, folder: Path) -> None:
    whole = (folder / MANIFEST).read_text()
    manifest: Any = json.loads(whole)
    node: Any = manifest
    while True:
        key = data.draw(st.sampled_from(sorted(node) if isinstance(node, dict) else range(len(node))))
        if not node[key] or not isinstance(node[key], dict | list) or data.draw(st.integers(0, 3)) == 0:
            node[key] = data.draw(PLAIN)
            break
        node = node[key]
    with suppress(KeyError, ValueError):
        manifest["fingerprint"] = fingerprint(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))
    try:
        for name in ("train", "val"):
            open_split(folder, name).document_sources()
    except ConfigError as error:
        assert str(folder) in str(error)
    finally:
        assert isinstance(data_problem(folder), str | None)
        (folder / MANIFEST).write_text(whole)
