"""Shards: what is written is read back, over shard ends; what is damaged is refused."""

from pathlib import Path

import numpy as np
import pytest

from common.errors import ConfigError
from data.draft import Draft
from data.manifest import FORMAT, read_manifest, write_manifest
from data.shards import open_split, verify_folder
from tests.support.shards import EOS, make_folder, some_documents

LENGTHS = [5, 0, 94, 30, 30, 30, 500, 7, 99, 100, 60, 39, 98, 0, 1]  # on, one over and one under the limit of 100


@pytest.fixture
def folder(tmp_path) -> Path:
    make_folder(tmp_path / "data", 100, train=some_documents(LENGTHS), val=some_documents([20, 30]))
    return tmp_path / "data"


@pytest.mark.parametrize(("dtype", "below"), [("uint16", 65_536), ("uint32", 1 << 31)])
def test_tokens_come_back_from_any_place(tmp_path, dtype, below):
    stream = make_folder(tmp_path / "data", 100, dtype, train=some_documents(LENGTHS, below))["train"]
    split = open_split(tmp_path / "data", "train", verify="hash")
    assert split.tokens == len(stream) == sum(LENGTHS) + len(LENGTHS)
    assert split.read(0, split.tokens).dtype == np.int64
    for start in range(split.tokens + 1):
        for count in {0, 1, 2, 99, 100, 101, 400, split.tokens - start}:
            if start + count <= split.tokens:
                np.testing.assert_array_equal(split.read(start, count), stream[start : start + count])
    for start, count in ((-1, 2), (0, split.tokens + 1), (split.tokens, 1), (3, -1)):
        with pytest.raises(IndexError):
            split.read(start, count)


def test_shards_end_with_documents_and_keep_their_size(folder):
    shards = read_manifest(folder)["splits"]["train"]["shards"]
    assert [shard["documents"] for shard in shards] == [2, 1, 3, 1, 1, 1, 1, 1, 1, 2, 1]
    assert [shard["tokens"] for shard in shards] == [7, 95, 93, 501, 8, 100, 101, 61, 40, 100, 2]
    split = open_split(folder, "train")
    for shard, end in zip(shards, np.cumsum([shard["tokens"] for shard in shards]), strict=True):
        assert split.read(int(end) - 1, 1) == EOS
        content = (folder / shard["file"]).read_bytes()
        assert content[:8] == b"OVERTONE" and len(content) == 64 + 2 * shard["tokens"] == shard["size"]


def test_the_index_finds_every_document(folder):
    split = open_split(folder, "train")
    starts = split.document_starts()
    assert split.documents == len(LENGTHS)
    np.testing.assert_array_equal(np.diff([*starts, split.tokens]), np.array(LENGTHS) + 1)
    np.testing.assert_array_equal(split.document_bytes(), 10 + np.arange(len(LENGTHS)))
    assert split.text_bytes == split.document_bytes().sum()
    for start, ids in zip(starts.tolist(), some_documents(LENGTHS), strict=True):
        np.testing.assert_array_equal(split.read(start, len(ids)), ids)


def test_attributes(folder):
    split, manifest = open_split(folder, "val"), read_manifest(folder)
    assert (split.tokens, split.documents, split.text_bytes) == (52, 2, 21)
    assert (split.dtype, split.vocab_size, split.eos_id) == ("uint16", 60_000, EOS)
    assert split.fingerprint == manifest["fingerprint"]
    assert split.tokenizer_sha256 == manifest["tokenizer_sha256"]


def test_verify_folder_passes_what_is_whole(folder):
    assert verify_folder(folder) == read_manifest(folder)


@pytest.mark.parametrize("name", ["train-00003.bin", "train-00003.idx", "val-00000.bin", "tokenizer.model"])
def test_a_flipped_bit_is_found(folder, name):
    content = bytearray((folder / name).read_bytes())
    content[-1] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(ConfigError, match=f"{name}: SHA-256"):
        verify_folder(folder)
    if name.startswith("train"):
        with pytest.raises(ConfigError, match=f"{name}: SHA-256"):
            open_split(folder, "train", verify="hash")
        open_split(folder, "train")  # sizes are right
    open_split(folder, "val" if name.startswith("train") else "train", verify="hash")


@pytest.mark.parametrize("name", ["train-00003.bin", "train-00003.idx"])
def test_truncated_or_missing(folder, name):
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[:-2])
    with pytest.raises(ConfigError, match=f"{name}: {len(content) - 2} bytes, but the manifest says {len(content)}"):
        open_split(folder, "train")
    (folder / name).unlink()
    with pytest.raises(ConfigError, match=f"{name}: missing"):
        open_split(folder, "train")


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, b"NOTTOKEN", "not a token shard"),
        (8, b"\x07", "shard format 7"),
        (12, b"\x04", "4 bytes per token, but the manifest says uint16"),
        (16, b"\x01", "the header says 1 tokens"),
    ],
)
def test_a_wrong_header_is_refused(folder, place, value, message):
    with (folder / "train-00001.bin").open("r+b") as stream:
        stream.seek(place)
        stream.write(value)
    with pytest.raises(ConfigError, match=message):
        open_split(folder, "train")


def test_a_damaged_or_foreign_manifest(folder):
    path = folder / "manifest.json"
    whole = path.read_text()
    for content, message in [
        (whole[:-10], "cannot be read"),
        (whole.replace('"eos_id": 2', '"eos_id": 3'), "does not match its fingerprint"),
        (whole.replace(f'"format": {FORMAT}', '"format": 9'), "format 9"),
        (f'{{"format": {FORMAT}}}', "not a manifest of prepared data"),
        ("[]", "format None"),
    ]:
        path.write_text(content)
        with pytest.raises(ConfigError, match=message):
            open_split(folder, "train")


def test_no_folder_no_manifest_no_split(folder, tmp_path):
    for missing in (tmp_path / "none", tmp_path, folder / "tokenizer.model"):
        with pytest.raises(ConfigError, match="run `python -m data prepare CONFIG`"):
            open_split(missing, "train")
    with pytest.raises(ConfigError, match="no split 'test'; it has train, val"):
        open_split(folder, "test")


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_what_is_no_json_is_never_written(tmp_path, number):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_manifest(tmp_path, {"settings": number})
    with pytest.raises(ValueError, match="not JSON compliant"):
        Draft(tmp_path, {}).commit({"share": number})
    assert list(tmp_path.iterdir()) == []
