"""The door through which every reader learns that a checkpoint is usable: what its files hold, read without trusting
them.

A manifest that agrees with its files proves that they are as they were written, not that they are a checkpoint: so the
form of each is checked (regular files of bounded size, plain JSON of the right types, safetensors headers), and that
the parts in them are every tensor of the run's model, whole, once. No tensor is read for it, and torch is not needed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, Field, model_validator

from common.errors import ConfigError
from common.files import open_regular, read_bounded, sha256_of
from common.settings import flat, validate
from common.strict_json import strict
from model.config import DecoderConfig, HeadConfig
from pretrain.checkpoints.folder import DATA, FORMAT, MANIFEST, MOMENTS, STATE, TOKENIZER, Progress

MOST = 2**24  # bytes of a JSON file or a header; a 70B model's largest header takes 1 MB
SUFFIX = ".safetensors"
METADATA, SHARDING, OFFSETS = "__metadata__", "DCP_SHARDING_INFO", "saved_offsets"  # of torch's writer
WIDTH = 4  # bytes of a float32

Check = Literal["full", "size"]
Parts = dict[str, list[tuple[int, int, str]]]  # tensor -> [start, stop) of its flat values, and the file they are in


def _this_format(number: int) -> int:
    if number != FORMAT:
        raise ValueError(f"{number}, but this version reads {FORMAT}")
    return number


Format = Annotated[int, AfterValidator(_this_format)]
Count = Annotated[int, Field(ge=0, lt=2**63)]
Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Read = TypeVar("Read", bound=BaseModel)


class _Entry(BaseModel, frozen=True):
    size: Count
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


class _Manifest(BaseModel, frozen=True):
    format: Format
    files: dict[str, _Entry]


class _Training(BaseModel, frozen=True):
    steps: int = Field(gt=0)
    micro_batch: int = Field(gt=0)


class _Parallel(BaseModel, frozen=True):
    vocab: int | str


class _Config(BaseModel, frozen=True):
    model: DecoderConfig
    head: HeadConfig
    train: _Training
    parallel: _Parallel


class _Layout(BaseModel, frozen=True):
    world: int = Field(gt=0)


class _State(BaseModel, frozen=True):
    """What readers lean on; the rest of the configuration is compared with the run's own, and only that must do."""

    format: Format
    step: Count
    updates: Count
    tokens: Count
    train_seconds: Amount
    joules: Amount | dict[Literal["gpu", "cpu", "dram"], Amount] | None = None  # a number: of an older version
    best_nats: Annotated[float, Field(allow_inf_nan=False)] | None = None
    best_step: Count | None = None
    stale: Count = 0
    identity: dict[str, Any]
    config: _Config
    layout: _Layout
    versions: dict[str, str | None] = {}

    @model_validator(mode="after")
    def _agrees(self) -> _State:
        if not self.updates <= self.step <= self.config.train.steps:
            raise ValueError(
                f"updates={self.updates}, step={self.step} and config.train.steps={self.config.train.steps} do not "
                "follow each other"
            )
        known = isinstance(self.identity.get(DATA), str) and isinstance(self.identity.get(TOKENIZER, 0), str | None)
        if not known:
            raise ValueError(f"identity: expected {DATA} and {TOKENIZER}")
        return self


def damage(
    checkpoint: Path, check: Check = "full", share: tuple[int, int] = (0, 1), *, moments: bool = True
) -> str | None:
    """Why a checkpoint cannot be used, naming the file that is wrong, or None.

    Args:
        check: "full" compares every file's hash with the manifest's too, "size" leaves that out.
        share: (k, n) looks at every n-th file from the k-th on; the first also at what all of them together hold.
        moments: False: to evaluate, which needs no moments of the optimiser.
    """
    try:
        listed = _listed(checkpoint)
        mine = sorted(listed)[share[0] :: share[1]]
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda name: _check_size(checkpoint / name, listed[name].size), mine))
            state, _ = _read_state(checkpoint)
            if share[0] == 0:
                files = [checkpoint / name for name in sorted(listed) if name != STATE]
                _check_coverage(checkpoint, _parts(files, pool), state.config, moments)
            if check == "full":
                list(pool.map(lambda name: _check_hash(checkpoint / name, listed[name].sha256), mine))
    except ConfigError as problem:
        return str(problem)
    return None


def read_state(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint tells of its run, as plain values: those of `Progress`, `identity`, `config`, `layout`,
    `versions`; what an older version did not write has its default.

    Raises:
        ConfigError: it is not there or not of this form.
    """
    checked, tree = _read_state(checkpoint)
    return {**asdict(Progress()), "versions": checked.versions, **tree}


def sizes_of(model: DecoderConfig, head: HeadConfig) -> dict[str, int]:
    """Values of each parameter of a run, by its name in a checkpoint without `.fp32` or that of a moment."""
    trunk = {f"trunk.{weight.name}": weight.size for weight in model.weights()}
    heads = head.parameters(model.vocab_size, model.dim)
    return {**trunk, **{f"head.{name}": size for name, size in heads.items()}}


def _read(path: Path, model: type[Read]) -> tuple[Read, dict[str, Any]]:
    """A JSON file, checked, and as it is. Raises ConfigError."""
    try:
        tree = strict(read_bounded(path, MOST))
        return validate(model, tree), tree
    except (OSError, ValueError) as problem:
        raise _wrong(path, problem) from None


def _wrong(path: Path, problem: OSError | ValueError) -> ConfigError:
    """What is to be said of a file."""
    if isinstance(problem, FileNotFoundError):
        return ConfigError(f"{path}: missing")
    text = problem.strerror if isinstance(problem, OSError) and problem.strerror else str(problem)
    return ConfigError(f"{path}: {text}".replace("\n", "; "))


def _listed(checkpoint: Path) -> dict[str, _Entry]:
    """The files of a checkpoint by its manifest. Raises ConfigError for others than it may have."""
    manifest, _ = _read(checkpoint / MANIFEST, _Manifest)
    for name in manifest.files:
        if not name.isprintable() or "/" in name or not (name == STATE or name.endswith(SUFFIX)):
            raise ConfigError(f"{checkpoint / MANIFEST}: it lists {name!r}, which is no file of a checkpoint")
    if STATE not in manifest.files:
        raise ConfigError(f"{checkpoint / MANIFEST}: it does not list {STATE}")
    try:
        tensors = {name for name in os.listdir(checkpoint) if name.endswith(SUFFIX)}
    except OSError as problem:
        raise _wrong(checkpoint, problem) from None
    if strange := sorted(tensors - manifest.files.keys()):  # the reader of tensors would take them too
        raise ConfigError(f"{checkpoint / strange[0]}: the manifest does not list it")
    return manifest.files


def _read_state(checkpoint: Path) -> tuple[_State, dict[str, Any]]:
    """A checkpoint's state, checked, and as it is. Raises ConfigError."""
    state, tree = _read(checkpoint / STATE, _State)
    named = re.search(r"step-(\d{8,})", checkpoint.name)  # one that the user copied may be called anything
    if named and int(named[1]) != state.step:
        raise ConfigError(f"{checkpoint / STATE}: it is of step {state.step}, its folder of step {int(named[1])}")
    settings = {**flat(tree["config"]), DATA: state.identity[DATA], TOKENIZER: state.identity[TOKENIZER]}
    for key, value in state.identity.items():  # all of it was written from its config
        if key not in settings or settings[key] != value:
            raise ConfigError(f"{checkpoint / STATE}: identity: {key!r} is not what its config says")
    return state, tree


def _check_size(path: Path, size: int) -> None:
    try:
        with open_regular(path) as stream:
            there = os.fstat(stream.fileno()).st_size
    except OSError as problem:
        raise _wrong(path, problem) from None
    if there != size:
        raise ConfigError(f"{path}: {there} bytes instead of {size}")


def _check_hash(path: Path, sha256: str) -> None:
    try:
        same = sha256_of(path) == sha256
    except OSError as problem:
        raise _wrong(path, problem) from None
    if not same:
        raise ConfigError(f"{path}: its SHA-256 is not the manifest's")


def _parts(files: Iterable[Path], pool: ThreadPoolExecutor | None = None) -> Parts:
    """What some safetensors files hold, by their headers. Raises ConfigError."""
    files = list(files)
    parts: Parts = {}
    for file, header in zip(files, (pool.map if pool else map)(_read_header, files), strict=True):
        for name, (start, stop) in header.items():
            parts.setdefault(name, []).append((start, stop, file.name))
    return parts


def _read_header(path: Path) -> dict[str, tuple[int, int]]:
    """Which values of which flat tensors a safetensors file holds. Raises ConfigError."""
    try:
        with open_regular(path) as stream:
            there = os.fstat(stream.fileno()).st_size
            length = int.from_bytes(stream.read(8), "little")
            if there < 8 or length > min(there - 8, MOST):
                raise ValueError(f"its header would take {length:,} bytes, of {max(0, there - 8):,} in the file")
            content = stream.read(length)
        if content[:1] != b"{":
            raise ValueError("its header is no JSON object")
        tensors = strict(content)
        about = tensors.pop(METADATA, None)
        told = about.get(SHARDING) if isinstance(about, dict) else None
        if not isinstance(told, str) or not all(isinstance(value, str) for value in about.values()):
            raise ValueError(f"its header's {METADATA} does not tell where the parts lie ({SHARDING})")
        return _placed(tensors, strict(told), there - 8 - length)
    except (OSError, ValueError) as problem:
        raise _wrong(path, problem) from None


def _placed(tensors: dict[str, Any], offsets: Any, size: int) -> dict[str, tuple[int, int]]:
    """Of a header's tensors, whose data take `size` bytes, and of where they lie in the whole. Raises ValueError unless
    they are flat float32 that fill the bytes, one after the other. (By hand: there are thousands in every file.)
    """
    found = []
    for name, told in tensors.items():
        try:
            (count,), (first, last), (start,) = told["shape"], told["data_offsets"], offsets[name]["saved_offsets"]
            wrong = told["dtype"] != "F32" or not all(type(number) is int for number in (count, first, last, start))
        except (KeyError, TypeError, ValueError):
            wrong = True
        if wrong or len(told) != 3 or not (count > 0 <= start < 2**63 and last == first + WIDTH * count):
            raise ValueError(f"its header does not tell of {name!r} as of a part of flat float32 values")
        found.append((first, last, name, start))
    end, parts = 0, {}
    for first, last, name, start in sorted(found):
        if first != end:
            raise ValueError(f"{name!r} lies in the bytes {first} to {last}; expected from {end} on")
        parts[name], end = (start, start + (last - first) // WIDTH), last
    if end != size:
        raise ValueError(f"its tensors take {end} bytes of {size}")
    return parts


def _check_coverage(checkpoint: Path, parts: Parts, config: _Config, moments: bool) -> None:
    """Raises ConfigError unless the parts are all tensors of a configuration's model, whole and once."""
    if config.model.layers > len(parts):  # or a number beyond all bounds would be counted to
        raise ConfigError(f"{checkpoint}: {len(parts)} tensors are not those of {config.model.layers} layers")
    sizes = sizes_of(config.model, config.head)
    whats = ("fp32", *MOMENTS)
    everything = {f"{name}.{what}": size for name, size in sizes.items() for what in whats}
    if not moments:
        parts = {name: held for name, held in parts.items() if not name.endswith(MOMENTS) or name not in everything}
        everything = {name: size for name, size in everything.items() if name.endswith("fp32")}
    if gap := _gap(parts, everything):
        raise ConfigError(f"{checkpoint}: {gap}")


def _gap(parts: Parts, sizes: Mapping[str, int]) -> str | None:
    """Where parts are not the tensors of these sizes, whole and once, in words; None: nowhere."""
    for name in sorted(parts.keys() - sizes.keys()):
        return f"{parts[name][0][2]} holds {name!r}, which is no tensor of this model"
    for name, size in sizes.items():
        end = 0
        for start, stop, file in sorted(parts.get(name, ())):
            if start < end:
                return f"{file} holds the values {start} to {min(stop, end)} of {name}, which another file holds too"
            if start > end:
                return f"the values {end} to {start} of {name} are in no file"
            end = stop
        if end != size:
            return f"the files hold {end} values of {name} instead of {size}"
    return None
