"""Import of nanoGPT's tokens: the stream stays, text bytes are known only with a vocabulary, misuse is told."""

import json
from pathlib import Path

import numpy as np
import pytest

from data import nanogpt as module
from data import token_files
from data.__main__ import main
from data.config import DataConfig
from data.nanogpt import EOS, VOCAB_SIZE, Gpt2Vocabulary, import_nanogpt
from data.prepare import prepare
from data.settings import ConfigError, validate
from data.shards import open_split, read_manifest, verify_folder


def quiet(line: str) -> None:
    pass


def pieces() -> list[bytes]:
    """As many byte strings as GPT-2 has pieces: each byte, then pairs."""
    return [bytes([byte]) for byte in range(256)] + [bytes([n // 256, n % 256]) for n in range(EOS - 256)]


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory) -> Path:
    """A vocab.json of the size and in the alphabet of GPT-2's."""
    written = {byte: character for character, byte in module._alphabet().items()}
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
    assert {"Ġ": 32, "Ċ": 10, "A": 65, "é": 0xE9, "Ń": 0xAD}.items() <= module._alphabet().items()  # as GPT-2 has them
    assert sorted(module._alphabet().values()) == list(range(256))
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
