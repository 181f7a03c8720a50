"""Damage that is consistent: files of a checkpoint or a run folder that hold what no writer wrote, under a manifest
that agrees with them.

Numbers are changed to such as no run can have: one that it could have had cannot be told from the truth.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pretrain.checkpoints.contents import METADATA, SHARDING, SUFFIX
from pretrain.checkpoints.folder import LATEST, MANIFEST, MOMENTS, STATE
from tests.support.checkpoints import as_json, entry_of, read_parts, seal, write_parts

KINDS = ("a FIFO", "a folder", "a device", "a dangling link", "a link to itself", "empty", "all hole", "gone")
NO_RECORD = "no record"  # of a line that no reader may leave out
DEEP = 100_000
HUGE = 2**29  # bytes of a file that is all hole
HOSTILE: tuple[Any, ...] = (
    *(None, True, -1, 1.5, 2**63, 10**30, 10**400, float("nan"), float("-inf")),
    *("", "7", "\ud800", "a\0b", "\x1b[31m", "../../config.yaml", "/etc/hostname", "x" * 300, [], {}, [[[[[[]]]]]]),
)


def mutate_checkpoint(checkpoint: Path, rng: random.Random) -> str:
    """Damages a checkpoint, but for its tensors' values; returns what was done, in words."""
    what, work = rng.choice(CHECKPOINT)
    return f"{what}: {work(checkpoint, rng)}"


def mutate_run(run: Path, rng: random.Random) -> str:
    """Damages what else is in a run folder; returns what was done, in words."""
    name = rng.choice(("config.yaml", "metrics.jsonl", "exit.json", f"checkpoints/{LATEST}", "checkpoints"))
    file = run / name
    if name == "checkpoints" or rng.random() < 0.4:
        return f"run: {name} is {_other_kind(file, rng)}"
    if name == "metrics.jsonl" and rng.random() < 0.6:
        return f"run: {name}: {_line(file, rng)}"
    return f"run: {name}: {_raw(file, rng)}"


def nodes(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Every place in plain values: the mapping or list, and the key or number in it."""
    for key in list(tree) if isinstance(tree, dict) else range(len(tree)):
        yield tree, key
        if isinstance(tree[key], dict | list):
            yield from nodes(tree[key])


def mutate_tree(tree: Any, rng: random.Random) -> str:
    """Drops, renames, retypes or adds one thing in plain values, which it changes; returns what."""
    holder, key = rng.choice(list(nodes(tree)))
    how = rng.choice(("drop", "rename", "retype", "retype", "add") if isinstance(holder, dict) else ("drop", "retype"))
    if how == "drop":
        del holder[key]
    elif how == "rename":
        holder[rng.choice((f"{key}x", "\ud800", "a\0b", "../x"))] = holder.pop(key)
    else:
        value = rng.choice(HOSTILE)
        holder[f"{key} too" if how == "add" else key] = value
        how = f"{how} to {str(value)[:20]!r}"
    return f"{str(key)[-40:]!r}, {how}"


def _state(checkpoint: Path, rng: random.Random) -> str:
    tree = json.loads((checkpoint / STATE).read_bytes())
    told = mutate_tree(tree, rng)
    (checkpoint / STATE).write_bytes(as_json(tree))
    seal(checkpoint)
    return told


def _state_text(checkpoint: Path, rng: random.Random) -> str:
    told = _hostile_json(checkpoint / STATE, rng)
    seal(checkpoint)
    return told


def _manifest(checkpoint: Path, rng: random.Random) -> str:
    tree = json.loads((checkpoint / MANIFEST).read_bytes())
    told = mutate_tree(tree, rng)
    (checkpoint / MANIFEST).write_bytes(as_json(tree))
    return told


def _manifest_name(checkpoint: Path, rng: random.Random) -> str:
    """One more file, or one by another name."""
    tree = json.loads((checkpoint / MANIFEST).read_bytes())
    name = rng.choice(("../../config.yaml", "/etc/hostname", "..", ".", "", "a\0b", "\ud800", "x" * 300, "notes.txt"))
    name += rng.choice(("", SUFFIX))
    old = rng.choice(sorted(tree["files"]))
    tree["files"][name] = tree["files"].pop(old) if rng.random() < 0.5 else entry_of(b"")
    (checkpoint / MANIFEST).write_bytes(as_json(tree))
    return f"{name[:20]!r}"


def _manifest_text(checkpoint: Path, rng: random.Random) -> str:
    return _hostile_json(checkpoint / MANIFEST, rng)


def _header(checkpoint: Path, rng: random.Random) -> str:
    """A tensor's entry, or where its part lies in the whole."""
    file = _tensors(checkpoint, rng)
    header, data = read_parts(file)
    offsets = json.loads(header[METADATA][SHARDING])
    if inner := rng.random() < 0.4:
        told = mutate_tree(offsets, rng)
        header[METADATA][SHARDING] = as_json(offsets).decode()
    else:
        told = mutate_tree(header, rng)
    write_parts(file, as_json(header), data)
    seal(checkpoint)
    return f"{SHARDING if inner else 'entry'} {told}"


def _header_number(checkpoint: Path, rng: random.Random) -> str:
    """One of the numbers of a header, a little or far off."""
    file = _tensors(checkpoint, rng)
    header, data = read_parts(file)
    offsets = json.loads(header[METADATA][SHARDING])
    tree = rng.choice((offsets, header))
    places = [(holder, key) for holder, key in nodes(tree) if type(holder[key]) is int]
    holder, key = rng.choice(places)
    off = rng.choice((-4, -1, 1, 4, 2**20, 2**62))
    holder[key] += off
    header[METADATA][SHARDING] = as_json(offsets).decode()
    write_parts(file, as_json(header), data)
    seal(checkpoint)
    return f"off by {off}"


def _header_bytes(checkpoint: Path, rng: random.Random) -> str:
    """The header's length, or what its bytes are."""
    file = _tensors(checkpoint, rng)
    header, data = read_parts(file)
    content, length = as_json(header), None
    how = rng.choice(("length", "cut", "blank", "text", "more data", "less data", "no file"))
    if how == "length":
        length = rng.choice((0, 1, len(content) - 1, len(content) + 1, len(content) + len(data), 2**32, 2**64 - 1))
    elif how == "cut":
        content = content[: rng.randrange(len(content))]
    elif how == "blank":
        content = b" " + content
    elif how == "text":
        content = _hostile_text(content, rng)
    elif how == "more data":
        data += bytes(rng.choice((1, 4, 4096)))
    elif how == "less data":
        data = data[: -rng.choice((1, 4, len(data)))]
    write_parts(file, content, data, length)
    if how == "no file":
        file.write_bytes(b"")
    seal(checkpoint)
    return f"{how}{'' if length is None else f' {length}'}"


def _coverage(checkpoint: Path, rng: random.Random) -> str:
    """A tensor, a part or a whole file that is missing or there twice, in files that are well formed."""
    file = _tensors(checkpoint, rng)
    how = rng.choice(("file missing", "file twice", "tensor missing", "tensor too many", "no moments"))
    if how == "file missing":
        file.unlink()
    elif how == "file twice":
        (checkpoint / f"again{SUFFIX}").write_bytes(file.read_bytes())
    else:
        header, data = read_parts(file)
        names = sorted(header.keys() - {METADATA})
        gone = {rng.choice(names)} if how == "tensor missing" else set()
        if how == "no moments":
            gone = {name for name in names if name.endswith(MOMENTS)}
        kept: dict[str, Any] = {METADATA: header[METADATA]}
        pieces: list[bytes] = []
        for name in [*(name for name in names if name not in gone), *(["extra"] if how == "tensor too many" else [])]:
            first, last = header[names[0] if name == "extra" else name]["data_offsets"]
            end = sum(map(len, pieces))
            kept[name] = {"dtype": "F32", "shape": [(last - first) // 4], "data_offsets": [end, end + last - first]}
            pieces.append(data[first:last])
        offsets = {**json.loads(header[METADATA][SHARDING]), "extra": {"saved_offsets": [0]}}
        header[METADATA][SHARDING] = as_json(offsets).decode()
        write_parts(file, as_json(kept), b"".join(pieces))
    seal(checkpoint)
    return how


def _kind(checkpoint: Path, rng: random.Random) -> str:
    """A file that is none, as the manifest has it."""
    file = rng.choice((checkpoint / MANIFEST, checkpoint / STATE, _tensors(checkpoint, rng)))
    return f"{file.name} is {_other_kind(file, rng)}"


def _linked(checkpoint: Path, rng: random.Random) -> str:
    """A file that lies elsewhere, which is no damage."""
    file = _tensors(checkpoint, rng)
    away = checkpoint.parent.parent / f"elsewhere-{file.name}"
    os.replace(file, away)
    file.symlink_to(away)
    return "a link to the whole file"


def _harm(checkpoint: Path, rng: random.Random) -> str:
    """A flipped bit, which the manifest does not know."""
    file = rng.choice((checkpoint / STATE, _tensors(checkpoint, rng)))
    content = bytearray(file.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    file.write_bytes(content)
    return f"of {file.name}"


CHECKPOINT: tuple[tuple[str, Callable[[Path, random.Random], str]], ...] = (
    *(("state", work) for work in (_state, _state, _state_text)),
    *(("manifest", work) for work in (_manifest, _manifest_name, _manifest_text)),
    *(("header", work) for work in (_header, _header, _header_number, _header_bytes)),
    *(("coverage", work) for work in (_coverage, _coverage)),
    *(("kind of file", work) for work in (_kind, _kind, _linked)),
    ("bit", _harm),
)


def _tensors(checkpoint: Path, rng: random.Random) -> Path:
    return rng.choice(sorted(checkpoint.glob(f"*{SUFFIX}")))


def _other_kind(file: Path, rng: random.Random) -> str:
    """Makes something else of a file or a folder."""
    how = rng.choice(KINDS)
    if file.is_dir():
        os.replace(file, file.with_name(f"was-{file.name}"))
    else:
        file.unlink(missing_ok=True)
    if how == "a FIFO":
        os.mkfifo(file)
    elif how == "a folder":
        file.mkdir()
    elif how == "a device":
        file.symlink_to("/dev/zero")
    elif how.endswith("link"):
        file.symlink_to("nowhere")
    elif how == "a link to itself":
        file.symlink_to(file.name)
    elif how != "gone":
        file.touch()
        os.truncate(file, HUGE if how == "all hole" else 0)
    return how


def _hostile_json(file: Path, rng: random.Random) -> str:
    content = _hostile_text(file.read_bytes(), rng)
    file.write_bytes(content)
    return f"{len(content)} bytes, {content[:24]!r}..."


def _hostile_text(content: bytes, rng: random.Random) -> bytes:
    """Bytes that a reader of JSON chokes on."""
    cut = rng.randrange(len(content))
    return rng.choice((
        b"", b"null", b"[]", b"7", b'"text"', b"{}", b"NaN", b"[" * DEEP, b'{"a":' * DEEP, b"9" * 5000, b"\xff\xfe",
        content[:cut], content + b"x", b"\xef\xbb\xbf" + content, content.decode().encode("utf-16"), content + b"\0",
        content[:1] + b'"format": 1, "format": 1, ' + content[1:], content[:cut] + b"\xff" + content[cut:],
    ))  # fmt: skip


def _line(file: Path, rng: random.Random) -> str:
    """One record of metrics.jsonl that is none."""
    lines = file.read_bytes().splitlines()
    at = rng.randrange(len(lines))
    if rng.random() < 0.5:
        record = json.loads(lines[at])
        told = mutate_tree(record, rng)
        lines[at] = as_json(record)
    else:
        lines[at] = _hostile_text(lines[at], rng)
        told = f"{NO_RECORD if at < len(lines) - 1 else 'cut off'}, {lines[at][:24]!r}..."
    file.write_bytes(b"\n".join(lines) + b"\n")
    return f"line {at + 1}: {told}"


def _raw(file: Path, rng: random.Random) -> str:
    """A text that is not what it was, or none."""
    content = file.read_bytes() if file.exists() else b"{}"
    if content and rng.random() < 0.5:
        at = rng.randrange(len(content))
        changed = content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :]
    else:
        changed = _hostile_text(content or b"x", rng)
    file.write_bytes(changed)
    return f"{len(changed)} bytes, {changed[:24]!r}..."
