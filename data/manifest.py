"""The manifest of a prepared folder: what it holds, what it was made from, and the hashes of its files."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import ConfigError
from common.files import read_bounded, replace_file, sha256_of
from common.progress import Log
from common.settings import validate
from common.strict_json import from_json
from data.form import Form

MOST = 1 << 28  # bytes of a manifest
FORMAT = 2  # of folders, manifests and shards
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.model"
SPLITS = ("train", "val", "test")  # a folder need not have the last one
DTYPES: dict[str, np.dtype[Any]] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}  # of ids, by name
COUNTS = ("tokens", "documents", "text_bytes")

PREPARE = "python -m data prepare CONFIG"
REMAKE = f"delete the folder and run `{PREPARE}` again"


def split_entry(shards: list[dict[str, Any]], sources: list[str]) -> dict[str, Any]:
    """A split's entry of the manifest: totals, in all and for each source by name, and shards."""
    by_source = {
        name: _totals([s["sources"][str(number)] for s in shards if str(number) in s["sources"]])
        for number, name in enumerate(sources)
    }
    return {**_totals(shards), "sources": by_source, "shards": shards}


def _totals(entries: list[dict[str, Any]]) -> dict[str, int | None]:
    """Sums of counts; null if one of them is not known."""
    columns = {key: [entry[key] for entry in entries] for key in COUNTS}
    return {key: None if None in values else sum(values) for key, values in columns.items()}


def fingerprint(manifest: dict[str, Any]) -> str:
    """SHA-256 over what determines the batches: format, tokenizer, counts and hashes of shards; no settings."""
    keys = ("format", "dtype", "vocab_size", "tokenizer_sha256", "eos_id", "sources", "splits")
    canonical = json.dumps({key: manifest[key] for key in keys}, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Writes the manifest, at once and durably: the last step of making a folder. Its fingerprint is in it by now."""
    replace_file(folder / MANIFEST, json.dumps(manifest, indent=1, allow_nan=False))


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The manifest of a prepared folder.

    Raises:
        ConfigError: no folder, no manifest, or one that is damaged, edited or of another format.
    """
    path = Path(folder) / MANIFEST
    try:
        manifest = from_json(read_bounded(path, MOST).decode())
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(f"{folder}: no prepared data here ({MANIFEST} is missing); run `{PREPARE}`") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}); {REMAKE}") from None
    form = manifest.get("format") if isinstance(manifest, dict) else None
    if form != FORMAT:
        raise ConfigError(f"{path}: format {form}, but this program reads format {FORMAT}; {REMAKE}")
    try:
        whole = manifest["fingerprint"] == fingerprint(manifest)
        validate(Form, manifest)
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        told = str(error).replace("\n", "; ") if isinstance(error, ConfigError) else repr(error)
        raise ConfigError(f"{path}: not a manifest of prepared data: {told}; {REMAKE}") from None
    if not whole:
        raise ConfigError(f"{path}: its content does not match its fingerprint, so it was damaged or edited; {REMAKE}")
    return manifest


def check_tokenizer(folder: Path, manifest: dict[str, Any]) -> None:
    """Raises ConfigError unless the tokenizer is the one that the manifest names (imported data may have none)."""
    if manifest["tokenizer_file"] is None:
        return
    path = folder / manifest["tokenizer_file"]
    if not path.is_file():
        raise ConfigError(f"{path}: missing; {REMAKE}")
    check_hash(path, manifest["tokenizer_sha256"])


def check_hash(path: Path, expected: str) -> None:
    """Raises ConfigError unless a file has the SHA-256 that the manifest says."""
    try:
        actual = sha256_of(path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error}); {REMAKE}") from None
    if actual != expected:
        raise ConfigError(f"{path}: SHA-256 {actual[:12]}..., but the manifest says {expected[:12]}...; {REMAKE}")


def log_splits(manifest: dict[str, Any], log: Log) -> None:
    """What a manifest's splits hold and what was dropped, a line each."""
    for split, entry in manifest["splits"].items():
        by_source = entry["sources"] if len(entry["sources"]) > 1 else {}
        for name, totals in {split: entry, **{f"  of {name}": totals for name, totals in by_source.items()}}.items():
            known = totals["text_bytes"] and totals["tokens"]  # an empty source has no ratio
            size = f", {totals['text_bytes'] / 1e6:.2f} MB of text" if known else ""
            ratio = f", {totals['text_bytes'] / totals['tokens']:.3f} bytes/token" if known else ""
            log(f"{name}: {totals['documents']:,} documents{size}, {totals['tokens']:,} tokens{ratio}")
    if manifest.get("dropped"):
        log("dropped: " + ", ".join(f"{count:,} {reason}" for reason, count in manifest["dropped"].items()))
