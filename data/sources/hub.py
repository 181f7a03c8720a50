"""Datasets of the Hugging Face Hub, local folders in their layout, and folders that `save_to_disk` wrote."""

import json
from pathlib import Path
from typing import Any

from common.errors import ConfigError
from data.config import HubSource
from data.sources.formats import SUFFIXES
from data.sources.stored import ACCESS, Part, damage_named

CONVERTED = "refs/convert/parquet"  # the branch of a dataset's own copy in parquet files
PARTIAL = "partial-"  # begins the names of its folders that hold no more than the first 5 GB of a split
ONLY_PART = f"by its folder's name only the first part of a dataset, as the Hub's {CONVERTED} has it of large ones"


def folder_of(source: HubSource) -> Path | None:
    """The local folder that the source names, or None: it is on the Hub."""
    folder = Path(source.name).expanduser()
    return folder if folder.is_dir() else None


def is_partial(path: str) -> bool:
    """Whether a folder in the path is named as those that hold only the first part of a split."""
    return any(folder.startswith(PARTIAL) for folder in path.split("/")[:-1])


def hub_parts(source: HubSource) -> list[Part]:
    """The data files of a split, as `datasets` finds them. Since its version 4 it never runs a dataset's script.

    Raises:
        ConfigError: there is no such dataset, subset or split, it may not be read, it is only the first part of one and
            that was not asked for, or its files are of a type that cannot be read.
    """
    folder = folder_of(source)
    if folder is None and (source.name.startswith((".", "/", "~")) or source.name.count("/") > 1):
        raise ConfigError(f"data.source.name: {source.name} is not a folder; give a dataset's name or a local folder")
    splits = None if folder is None else _saved(folder)
    if splits is not None and source.subset is not None:
        raise ConfigError(
            f"data.source.subset: {source.name} is what save_to_disk wrote, without subsets; leave it out"
        )
    if splits is None:
        splits = _found(source, folder)
    if source.split not in splits:
        raise ConfigError(
            f"{source.name}: no split {source.split!r}; set data.source.split to one of {', '.join(splits)}"
        )
    names = splits[source.split]
    for name in names:
        if not name.endswith(SUFFIXES):
            hint = "" if folder else f" The Hub's own copy in parquet files is data.source.revision={CONVERTED}"
            raise ConfigError(f"{name}: cannot read this type of file; expected one of {', '.join(SUFFIXES)}.{hint}")
    above = f"{folder.resolve().parent}/" if folder else ""
    partial = next((name for name in names if is_partial(name.removeprefix(above))), None)
    if partial is not None and not source.partial:
        raise ConfigError(
            f"{partial}: {ONLY_PART}; read the dataset's own files, or set data.source.partial=true to train on it"
        )
    return [Part(name, _size(name), source.text_field) for name in names]


def _found(source: HubSource, folder: Path | None) -> dict[str, list[str]]:
    """The files of each split."""
    import datasets  # type: ignore[import-untyped]

    try:
        builder = datasets.load_dataset_builder(str(folder or source.name), source.subset, revision=source.revision)
    except Exception as error:  # the Hub's client and its own client have classes of their own
        reason = " ".join(str(error).split()) or repr(error)
        raise ConfigError(
            f"{source.name}: the dataset cannot be read: {reason}; {_remedy(error, source, folder)}"
        ) from None
    return {str(split): list(names) for split, names in (builder.config.data_files or {}).items()}


def _remedy(error: Exception, source: HubSource, folder: Path | None) -> str:
    """What would help, as far as the classes and messages of `datasets` and the Hub's client tell."""
    import datasets

    message, page = str(error), f"https://huggingface.co/datasets/{source.name}"
    if isinstance(error, ValueError) and "onfig" in message and "vailable" in message:
        return "set data.source.subset to one of them"
    if folder is not None:
        return (
            f"give a folder with files of these types in the layout of a dataset: {', '.join(SUFFIXES)}; or name the "
            "files themselves with data.source.kind=files"
        )
    if "gated" in message:
        return f"ask for access and accept the terms on {page}, then set HF_TOKEN or run `hf auth login`"
    if isinstance(error, datasets.exceptions.DatasetNotFoundError):
        if message.startswith("Revision "):
            return "set data.source.revision to one of the dataset's branches, tags or commits"
        return f"check data.source.name; if {page} is private, set HF_TOKEN or run `hf auth login` to show who you are"
    if getattr(getattr(error, "response", None), "status_code", None) in (401, 403):
        return ACCESS
    local = "give a local folder of the dataset's files as data.source.name"
    if isinstance(error, ConnectionError) or "Offline" in type(error).__name__:
        if datasets.config.HF_HUB_OFFLINE:
            return f"HF_HUB_OFFLINE is set, so the Hub was not asked: unset it, or {local}"
        return f"check the network (and HF_ENDPOINT, if it is set), or {local}"
    return f"set data.source.revision={CONVERTED} for the Hub's own copy in parquet files, or {local}"


# ---- what save_to_disk wrote


def _saved(folder: Path) -> dict[str, list[str]] | None:
    """The files of each split in a folder that `save_to_disk` wrote; None: it is no such folder."""
    whole = folder / "dataset_dict.json"
    if whole.is_file():
        return {name: _state(folder / name)[1] for name in _read(whole, "splits")}
    if (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
        split, names = _state(folder)
        return {split: names}
    return None


def _state(folder: Path) -> tuple[str, list[str]]:
    """The split and the files of one saved dataset, in their order."""
    state = folder / "state.json"
    names = [str(folder / file["filename"]) for file in _read(state, "_data_files")]
    if missing := [name for name in names if not Path(name).is_file()]:
        raise ConfigError(f"{missing[0]}: missing, but {state} names it; copy the whole folder")
    return _read(state, "_split") or "train", names


def _read(file: Path, key: str) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))[key]
    except (OSError, ValueError, RecursionError, KeyError, TypeError) as error:
        raise ConfigError(f"{file}: not as save_to_disk writes it ({error!r}); save the dataset again") from None


def _size(name: str) -> int:
    if "://" not in name:
        return Path(name).stat().st_size
    import fsspec

    system, path = fsspec.core.url_to_fs(name)
    with damage_named(name, lambda: "nothing"):
        return system.size(path)
