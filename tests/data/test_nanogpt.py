"""Import of nanoGPT's tokens: the stream stays, text bytes are known only with a vocabulary, misuse is told."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from common.errors import ConfigError
from common.settings import validate
from data import nanogpt as module
from data import token_files
from data.__main__ import main
from data.config import DataConfig
from data.gpt2 import EOS, VOCAB_SIZE, Gpt2Vocabulary, alphabet
from data.manifest import read_manifest
from data.nanogpt import import_nanogpt
from data.prepare import prepare
from data.shards import open_split, verify_folder
from data.token_files import Asked


def quiet(line: str) -> None:
    pass


def pieces() -> list[bytes]:
    """As many byte strings as GPT-2 has pieces: each byte, then pairs."""
    return [bytes([byte]) for byte in range(256)] + [bytes([n // 256, n % 256]) for n in range(EOS - 256)]


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory) -> Path:
    """A vocab.json of the size and in the alphabet of GPT-2's."""
    written = {byte: character for character, byte in alphabet().items()}
    ids = {"".join(written[byte] for byte in piece): number for number, piece in enumerate(pieces())}
    path = tmp_path_factory.mktemp("vocabulary") / "vocab.json"
    path.write_text(json.dumps({"<|endoftext|>": EOS, **ids}))
    return path


def some_streams() -> dict[str, list[int]]:
    random = np.random.default_rng(0)
    documents = [random.integers(0, EOS, size=size).tolist() for size in (5, 0, 900, 1, 40)]
    ended = [token for ids in documents for token in (*ids, EOS)]
    return {"train": ended, "val": [*ended, 7, 8]}  # the second lacks its last mark


def write(folder: Path, **streams: list[int]) -> Path:
    folder.mkdir(exist_ok=True)
    for split, stream in streams.items():
        np.array(stream, dtype="<u2").tofile(folder / f"{split}.bin")
    return folder


@pytest.fixture
def folder(tmp_path) -> Path:
    return write(tmp_path / "openwebtext", **some_streams())


@pytest.mark.parametrize("block", [1, 7, 1 << 24])
def test_the_stream_stays_as_it_is(tmp_path, folder, monkeypatch, block):
    monkeypatch.setattr(token_files, "BLOCK", block)
    monkeypatch.setattr(module, "SHARD_TOKENS", 100)
    manifest = import_nanogpt(folder, tmp_path / "out", log=quiet)
    assert verify_folder(tmp_path / "out") == manifest
    streams = some_streams()
    for name, stream in {"train": streams["train"], "val": [*streams["val"], EOS]}.items():
        split = open_split(tmp_path / "out", name)
        assert split.read(0, split.tokens).tolist() == stream
        assert split.documents == stream.count(EOS)
        assert (split.vocab_size, split.eos_id, split.sources) == (VOCAB_SIZE, EOS, ("nanogpt",))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["openwebtext", "out"]


def test_without_a_vocabulary_the_text_is_not_known(tmp_path, folder):
    told: list[str] = []
    manifest = import_nanogpt(folder, tmp_path / "out", log=told.append)
    split = open_split(tmp_path / "out", "train")
    assert split.text_bytes is None and split.tokenizer_sha256 is None and manifest["tokenizer_file"] is None
    assert split.source_counts["nanogpt"]["text_bytes"] is None
    assert (split.document_bytes() == -1).all()
    assert any("there will be no bits/byte" in line for line in told)


def test_with_a_vocabulary_text_bytes_are_exact(tmp_path, folder, vocabulary):
    import_nanogpt(folder, tmp_path / "out", vocabulary, quiet)
    split, all_pieces = open_split(tmp_path / "out", "val"), [*pieces(), b""]
    bounds = [*split.document_starts().tolist(), split.tokens]
    sizes = [
        sum(len(all_pieces[i]) for i in split.read(start, end - start).tolist())
        for start, end in zip(bounds[:-1], bounds[1:], strict=True)
    ]
    assert split.document_bytes().tolist() == sizes and split.text_bytes == sum(sizes)
    (tmp_path / "out" / "vocab.json").write_text("{}")
    with pytest.raises(ConfigError, match="vocab.json: SHA-256"):
        verify_folder(tmp_path / "out")


def test_the_vocabulary_gives_text_back(vocabulary):
    assert {"Ġ": 32, "Ċ": 10, "A": 65, "é": 0xE9, "Ń": 0xAD}.items() <= alphabet().items()  # as GPT-2 has them
    assert sorted(alphabet().values()) == list(range(256))
    found = Gpt2Vocabulary(vocabulary)
    text = "naïve 🎉\n"
    assert found.decode([*text.encode(), EOS]) == text
    assert found.lengths[[65, 300, EOS]].tolist() == [1, 2, 0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read"),
        ("[]", "not GPT-2's vocabulary, which maps 50,257 pieces"),
        ('{"a": 0, "b": 1}', "not GPT-2's vocabulary"),
        (json.dumps({f"a{n}": n for n in range(VOCAB_SIZE)}), r"<\|endoftext\|> is None, but GPT-2's is 50256"),
        (
            json.dumps({f"水{n}": n for n in range(EOS)} | {"<|endoftext|>": EOS}),
            "'水' is not in the alphabet of GPT-2's pieces",
        ),
        (None, "cannot be read"),
    ],
)
def test_what_is_no_vocabulary_is_refused(tmp_path, folder, content, message):
    path = tmp_path / "vocab.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        import_nanogpt(folder, tmp_path / "out", path, quiet)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.draft").exists()


def test_what_are_no_tokens_is_refused(tmp_path, folder):
    out = tmp_path / "out"
    (folder / "meta.pkl").write_bytes(b"")
    with pytest.raises(ConfigError, match="characters, not GPT-2 tokens"):
        import_nanogpt(folder, out, log=quiet)
    (folder / "meta.pkl").unlink()
    write(folder, val=[1, 2, 60_000])
    with pytest.raises(ConfigError, match="val.bin, token 2: 60000 is no GPT-2 id"):
        import_nanogpt(folder, out, log=quiet)
    (folder / "val.bin").write_bytes(b"abc")
    with pytest.raises(ConfigError, match="val.bin: 3 bytes are no uint16 ids"):
        import_nanogpt(folder, out, log=quiet)
    (folder / "val.bin").unlink()
    with pytest.raises(ConfigError, match="val.bin: missing; give the folder"):
        import_nanogpt(folder, out, log=quiet)
    assert [path.name for path in tmp_path.iterdir()] == ["openwebtext"]


def test_what_is_there_is_left_alone(tmp_path, folder):
    manifest = import_nanogpt(folder, tmp_path / "out", log=quiet)
    with pytest.raises(ConfigError, match="holds prepared data already"):
        import_nanogpt(folder, tmp_path / "out", log=quiet)
    assert read_manifest(tmp_path / "out") == manifest
    (tmp_path / "other.draft").mkdir()
    (tmp_path / "other.draft" / "journal.json").write_text('{"job": {}, "progress": {}}')
    with pytest.raises(ConfigError, match="holds an unfinished preparation"):
        import_nanogpt(folder, tmp_path / "other", log=quiet)
    assert (tmp_path / "other.draft" / "journal.json").exists()


def imported(path: Path, **changes: object) -> DataConfig:
    given = {"path": str(path), "source": {"kind": "prepared"}, "tokenizer": {"vocab_size": VOCAB_SIZE}, **changes}
    return validate(DataConfig, given, "data")


def test_a_config_names_imported_data(tmp_path, folder):
    with pytest.raises(ConfigError, match="run `python -m data import-nanogpt FOLDER --out"):
        prepare(imported(tmp_path / "out"), quiet)
    manifest = import_nanogpt(folder, tmp_path / "out", log=quiet)
    assert prepare(imported(tmp_path / "out"), quiet) == manifest
    cfg = imported(tmp_path / "out")
    assert validate(DataConfig, cfg.model_dump(mode="json"), "data") == cfg  # as a run's config.yaml writes it
    with pytest.raises(ConfigError, match="set data.tokenizer.vocab_size to that"):
        prepare(imported(tmp_path / "out", tokenizer={"vocab_size": 50304}), quiet)
    with pytest.raises(ConfigError, match="data: val_fraction: imported data are taken as they are"):
        imported(tmp_path / "out", val_fraction=0.5)
    with pytest.raises(ConfigError, match="data.source.kind was 'prepared' and is now 'embedded'"):
        prepare(imported(tmp_path / "out", source={"kind": "embedded"}), quiet)


def test_the_command(tmp_path, folder, vocabulary, capsys):
    command = ["import-nanogpt", str(folder), "--out", str(tmp_path / "out")]
    assert main([*command, "--vocab", str(vocabulary)]) == 0
    told = capsys.readouterr().out
    assert "train: 5 documents" in told and "bytes/token" in told and "source: {kind: prepared}" in told
    assert main(command) == 2
    assert "holds prepared data already" in capsys.readouterr().err


# ---- ids of other widths and vocabularies, with and without a header


def stream_of(vocab_size: int, eos: int, tokens: int = 900) -> np.ndarray:
    found = np.random.default_rng(vocab_size).integers(0, vocab_size, size=tokens)
    found[found == eos] = 1
    found[40::77] = eos
    return found


def write_ids(
    path: Path, ids: np.ndarray, dtype: str, magic: int | None = None, version: int = 1, count: int | None = None
) -> None:
    path.parent.mkdir(exist_ok=True)
    header = np.zeros(256, dtype="<i4")
    header[:3] = magic or 0, version, len(ids) if count is None else count
    path.write_bytes((b"" if magic is None else header.tobytes()) + ids.astype(dtype).tobytes())


def read_back(out: Path, name: str) -> list[int]:
    split = open_split(out, name)
    return split.read(0, split.tokens).tolist()


@pytest.mark.parametrize(
    ("magic", "version", "dtype", "vocab_size", "eos"),
    [(20240520, 1, "<u2", VOCAB_SIZE, EOS), (20240801, 7, "<u4", 128256, 128000)],
)
def test_llm_c_s_files_are_read_behind_their_header(tmp_path, magic, version, dtype, vocab_size, eos, capsys):
    ids = stream_of(vocab_size, eos)
    bins, out = tmp_path / "bins", tmp_path / "out"
    write_ids(bins / "edu_fineweb_val_000000.bin", ids[:300], dtype, magic, version)
    write_ids(bins / "edu_fineweb_train_000001.bin", ids[:500], dtype, magic, version)  # ends within a document
    write_ids(bins / "edu_fineweb_train_000002.bin", ids[500:], dtype, magic, version)
    assert main(["import-nanogpt", str(bins), "--out", str(out)]) == 0
    assert read_back(out, "train") == [*ids.tolist(), eos] and read_back(out, "val") == [*ids[:300].tolist(), eos]
    manifest = verify_folder(out)
    kind = {"<u2": "uint16", "<u4": "uint32"}[dtype]
    assert (manifest["dtype"], manifest["vocab_size"], manifest["eos_id"]) == (kind, vocab_size, eos)
    line = capsys.readouterr().out.splitlines()[-1]
    cfg = validate(DataConfig, yaml.safe_load(line)["data"], "data")
    assert prepare(cfg, quiet) == manifest


def test_options_tell_what_no_header_does(tmp_path):
    bins, ids = tmp_path / "bins", stream_of(70_000, 3)
    for split in ("train", "val"):
        write_ids(bins / f"{split}.bin", ids, "<u4")
    options = ["--dtype", "uint32", "--vocab-size", "70000", "--eos-id", "3"]
    assert main(["import-nanogpt", str(bins), "--out", str(tmp_path / "out"), *options]) == 0
    assert read_back(tmp_path / "out", "val") == [*ids.tolist(), 3]
    wrong = imported(tmp_path / "out", tokenizer={"vocab_size": 70_000}, dtype="uint32")
    assert prepare(wrong, quiet)["dtype"] == "uint32"
    with pytest.raises(ConfigError, match="its ids are uint16: set data.dtype to that"):
        narrow = write(tmp_path / "narrow", **some_streams())
        import_nanogpt(narrow, tmp_path / "out16", log=quiet)
        prepare(imported(tmp_path / "out16", dtype="uint32"), quiet)


@pytest.mark.parametrize(
    ("ids", "dtype", "asked", "message"),
    [
        (stream_of(VOCAB_SIZE, EOS), "<u4", {}, "every second id is 0, .*read as uint16; add --dtype uint32"),
        (stream_of(128256, 128000), "<u4", {}, "every second id is below 16, .*add --dtype uint32"),
        (stream_of(200, 7), "<u4", {"vocab_size": 200, "eos_id": 7}, "every second id is 0, .*add --dtype uint32"),
        (stream_of(VOCAB_SIZE, EOS), "<u8", {"dtype": "uint32"}, "every second id is 0, .*write them as uint32"),
        (stream_of(VOCAB_SIZE, EOS), "<u2", {"dtype": "uint32"}, r"train.bin, token 0: \d+ is no GPT-2 id.*--dtype"),
        (stream_of(VOCAB_SIZE, EOS), ">u2", {}, "no GPT-2 id, which end at 50256; give .*--vocab-size"),
        (stream_of(32_000, 2), "<u2", {}, "end-of-text id 50256 is not among .*--eos-id, --vocab-size and --dtype"),
        (stream_of(VOCAB_SIZE, EOS), "<u2", {"vocab_size": 50_000, "eos_id": 7}, "is no id of a vocabulary of 50,000"),
        (stream_of(VOCAB_SIZE, EOS)[:899], "<u2", {"dtype": "uint32"}, "1798 bytes are no uint32 ids; .*--dtype"),
        (stream_of(256, 10)[:899], "u1", {}, "899 bytes are no uint16 ids; .*--dtype"),
        (np.frombuffer(b"plain English text, " * 50, "u1"), "u1", {}, "end-of-text id 50256 is not among"),
        (
            stream_of(VOCAB_SIZE, EOS),
            "<u2",
            {"vocab_size": 100_000},
            "has ids that uint16 cannot hold; add --dtype uint32",
        ),
        (
            stream_of(VOCAB_SIZE, EOS),
            "<u2",
            {"vocab_size": 1000},
            "50256 is not within a vocabulary of 1,000; .*--eos-id",
        ),
        (stream_of(VOCAB_SIZE, EOS), "<u2", {"eos_id": -1}, "-1 is not within a vocabulary"),
    ],
)
def test_ids_of_another_kind_are_refused_with_the_options_that_help(tmp_path, ids, dtype, asked, message):
    write_ids(tmp_path / "bins" / "train.bin", ids, dtype)
    write_ids(tmp_path / "bins" / "val.bin", ids, dtype)
    with pytest.raises(ConfigError, match=message):
        import_nanogpt(tmp_path / "bins", tmp_path / "out", log=quiet, asked=Asked(**asked))
    assert [path.name for path in tmp_path.iterdir()] == ["bins"]


def test_a_split_without_any_end_of_text_is_one_document_if_that_is_asked_for(tmp_path):
    folder = write(tmp_path / "shakespeare", train=[5, 6, EOS, 7] * 9, val=list(range(900)))
    with pytest.raises(ConfigError, match=r"val\.bin: .*not among the 900 tokens of val, .*--one-document"):
        import_nanogpt(folder, tmp_path / "out", log=quiet)
    assert [path.name for path in tmp_path.iterdir()] == ["shakespeare"]
    assert main(["import-nanogpt", str(folder), "--out", str(tmp_path / "out"), "--one-document"]) == 0
    assert open_split(tmp_path / "out", "val").documents == 1
    assert read_back(tmp_path / "out", "val") == [*range(900), EOS]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"magic": 20240520, "version": 2}, "not the 1,024 bytes of a header of version 1"),
        ({"magic": 20240520, "count": 400}, "its header says 400 tokens of 2 bytes, but 1,800 bytes follow"),
        ({"magic": 20240801, "version": 7}, "its header says 900 tokens of 4 bytes, but 1,800 bytes follow"),
        ({"magic": 20240522}, "multiple-choice examples"),
    ],
)
def test_headers_that_do_not_fit_are_refused(tmp_path, given, message):
    for split in ("train", "val"):
        write_ids(tmp_path / "bins" / f"{split}.bin", stream_of(VOCAB_SIZE, EOS), "<u2", **given)
    with pytest.raises(ConfigError, match=message):
        import_nanogpt(tmp_path / "bins", tmp_path / "out", log=quiet)


def test_files_that_do_not_go_together_are_refused(tmp_path, vocabulary):
    bins, ids = tmp_path / "bins", stream_of(VOCAB_SIZE, EOS)
    write_ids(bins / "train.bin", ids, "<u2", 20240520)
    write_ids(bins / "val.bin", stream_of(128256, 128000), "<u4", 20240801, 7)
    with pytest.raises(ConfigError, match=r"val\.bin: .*128256.*give files of one tokenizer"):
        import_nanogpt(bins, tmp_path / "out", log=quiet)
    with pytest.raises(ConfigError, match=r"train\.bin: llm\.c's header says uint16 ids; leave --dtype out"):
        import_nanogpt(bins, tmp_path / "out", log=quiet, asked=Asked(dtype="uint32"))
    write_ids(bins / "train.bin", stream_of(128256, 128000), "<u4", 20240801, 7)
    with pytest.raises(ConfigError, match="--vocab is GPT-2's vocabulary, but the ids are of another one"):
        import_nanogpt(bins, tmp_path / "out", vocabulary, quiet)
    np.save(bins / "train.npy", ids)
    (bins / "train.npy").rename(bins / "train.bin")
    with pytest.raises(ConfigError, match=r"train\.bin: a NumPy file"):
        import_nanogpt(bins, tmp_path / "out", log=quiet)
    (bins / "train.bin").unlink()
    for name in ("one", "two"):
        write_ids(bins / f"{name}_train.bin", ids, "<u2")
    with pytest.raises(ConfigError, match=r"files of several data sets \(one, two\)"):
        import_nanogpt(bins, tmp_path / "out", log=quiet)
    assert [path.name for path in tmp_path.iterdir()] == ["bins"]
