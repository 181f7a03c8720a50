"""Whether what is on the disk was made from these settings and files: a folder to reuse, a draft to go on with."""

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from common.errors import ConfigError
from common.files import sha256_of
from common.progress import Log
from data.config import DataConfig, PreparedSource
from data.draft import Draft
from data.manifest import FORMAT, check_tokenizer, read_manifest
from data.shards import open_split
from data.sources.corpus import EMBEDDED, is_remote, parts_of
from data.sources.stored import Part

OFF = {"test_fraction": 0.0}  # settings that a folder without them has at these values


def job_of(cfg: DataConfig, parts: dict[str, list[Part]]) -> dict[str, Any]:
    """What a draft must have been made from for this run to go on with it, as plain values."""
    model = cfg.tokenizer.model
    return {
        "format": FORMAT,
        "settings": _settings(cfg),
        "tokenizer": sha256_of(model) if model is not None and model.is_file() else None,
        "inputs": _inputs(parts),
    }


def _settings(cfg: DataConfig) -> dict[str, Any]:
    """What the prepared data depends on; not where it lies. What is off is left out, as older folders have it."""
    made = cfg.model_dump(mode="json", exclude={"path", *(name for name in OFF if getattr(cfg, name) == OFF[name])})
    for source in [made["source"], *(entry["source"] for entry in made["source"].get("sources", {}).values())]:
        if source["kind"] == "debian":
            del source["folder"]
    return made


def _changed(made: dict[str, Any], asked: dict[str, Any]) -> list[str]:
    """How the settings of a folder or draft differ from those asked for, in words."""
    return list(differences({**OFF, **made}, {**OFF, **asked}))


def _inputs(parts: dict[str, list[Part]]) -> dict[str, list[list[Any]]]:
    """[name, bytes] of each file of each source, and what else tells it from others."""
    return {source: [part.identity for part in files if part.name != EMBEDDED] for source, files in parts.items()}


def resume(draft: Draft, log: Log) -> bool:
    """Takes up an earlier run's progress, or empties the draft; returns which.

    Raises:
        ConfigError: documents were written from other settings or files.
    """
    earlier = draft.read()
    if earlier is None:
        draft.clear()
        return False
    try:
        return _resume(draft, earlier, log)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ConfigError(f"{draft.path}: its journal is damaged ({error!r}); delete it and start anew") from None


def _resume(draft: Draft, earlier: dict[str, Any], log: Log) -> bool:
    done = earlier["progress"]
    job, now = earlier["job"], draft.job
    changes = [f"the program's format was {job['format']}"] if job["format"] != now["format"] else []
    changes += _changed(job["settings"], now["settings"])
    if job["tokenizer"] != now["tokenizer"]:
        changes.append("the content of data.tokenizer.model")
    for source, files in now["inputs"].items():
        before = job["inputs"].get(source, [])
        # A damaged file is replaced by a whole one: what was not read to its end may have another size.
        settled = done["cursors"][source][0] if done else len(before)
        if [file[0] for file in files] != [file[0] for file in before] or files[:settled] != before[:settled]:
            changes.append(f"the files of {source}")
    if not changes:
        draft.progress = done
        log(f"going on with {draft.path}: {done.get('counts', {}).get('documents', 0):,} documents were done")
        return True
    if done:
        raise ConfigError(
            f"{draft.path} holds an unfinished preparation that was begun differently: {'; '.join(changes)}. "
            "Give what was given then to go on with it, set data.path to another folder, or delete the draft"
        )
    log(f"starting anew: {draft.path} was begun differently ({'; '.join(changes)})")
    draft.clear()
    return False


def reuse(cfg: DataConfig, log: Log) -> dict[str, Any]:
    """The manifest of the folder at `cfg.path`.

    Raises:
        ConfigError: it was made from other settings or from files of other sizes, or is not whole.
    """
    manifest = read_manifest(cfg.path)
    made = manifest.get("settings", {})
    source = made.get("source")
    kind = source.get("kind") if isinstance(source, dict) else None
    changes = list(differences(kind, cfg.source.kind, "data.source.kind"))
    if isinstance(cfg.source, PreparedSource):
        if manifest["vocab_size"] != cfg.tokenizer.vocab_size:
            changes.append(f"its vocabulary is {manifest['vocab_size']}: set data.tokenizer.vocab_size to that")
        if manifest["dtype"] != cfg.dtype:
            changes.append(f"its ids are {manifest['dtype']}: set data.dtype to that")
    else:
        changes = _changed(made, _settings(cfg))
        for source, files in _local_inputs(cfg).items():
            before = manifest.get("inputs", {}).get(source, [])
            if files != before:
                changed = [file[0] for file in files if file not in before]
                changes.append(f"the source's files ({changed[0] if changed else 'one is gone'})")
    model = cfg.tokenizer.model
    if model is not None and model.is_file() and sha256_of(model) != manifest["tokenizer_sha256"]:
        changes.append(f"the content of {model}")
    if changes:
        raise ConfigError(
            f"{cfg.path} was prepared differently: {'; '.join(changes)}. Set data.path to another folder, "
            "or delete this one to prepare it anew"
        )
    check_tokenizer(cfg.path, manifest)
    splits = {split: open_split(cfg.path, split) for split in manifest["splits"]}
    tokens = ", ".join(f"{split.tokens:,} {name}" for name, split in splits.items())
    log(f"reusing {cfg.path}: {tokens} tokens, fingerprint {manifest['fingerprint'][:12]}")
    return manifest


def _local_inputs(cfg: DataConfig) -> dict[str, list[list[Any]]]:
    """The sources' files, of those sources that are still on this machine: prepared data outlives its text."""
    parts = {}
    for name, entry in cfg.sources().items():
        with suppress(ConfigError):
            if not is_remote(entry.source):
                parts[name] = parts_of(entry.source)
    return _inputs(parts)


def differences(made: Any, asked: Any, path: str = "data") -> Iterator[str]:
    """What is not equal in two trees of settings, in words, by dotted path."""
    if isinstance(made, dict) and isinstance(asked, dict):
        for key in {**made, **asked}:
            yield from differences(made.get(key), asked.get(key), f"{path}.{key}")
    elif made != asked and not (made is None and asked is False):  # a switch that there was not yet was off
        yield f"{path} was {made!r} and is now {asked!r}"
