"""Which checkpoint a run goes on from, and what may differ between the two."""

from __future__ import annotations

import functools
import io
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from common.errors import ConfigError
from common.settings import flat
from pretrain.checkpoints.contents import Check, damage, read_state
from pretrain.checkpoints.folder import DATA, STATE, TOKENIZER, to_resume
from pretrain.checkpoints.reading import agreed, looked_at
from pretrain.checkpoints.traces import check_place, check_resume
from pretrain.config import RunConfig, from_tree
from pretrain.runtime.ranks import Ranks

log = logging.getLogger(__name__)

# What may differ between a checkpoint and the run that goes on from it: the layout, and what does not touch the
# weights.
FREE_SETTINGS = (
    "run",
    "resume",
    "resume_allow",
    "resume_check",
    "data.path",
    "model.activation_checkpointing",
    "model.attention",
    "model.compile",
    "head.chunk_mib",
    "head.fused",
    "train.micro_batch",
    "train.deterministic",
    "parallel",
    "evaluation",
    "checkpoint",
    "timeouts",
    "energy",
    "logging",
    "deepspeed",
)


FORWARD = ("head.tied_sign", "head.feature_length")  # factors of a pass, which no weight holds: never to be changed


def identity(cfg: RunConfig, data_fingerprint: str, tokenizer_sha256: str | None) -> dict[str, Any]:
    """What must be the same for a run to go on from a checkpoint."""
    settings = flat(cfg.model_dump(mode="json"))
    fixed = {k: v for k, v in settings.items() if not any(k == f or k.startswith(f + ".") for f in FREE_SETTINGS)}
    fixed = {k: v for k, v in fixed.items() if not (k.startswith("data.source.") and k.endswith(".folder"))}  # where
    return {**fixed, DATA: data_fingerprint, TOKENIZER: tokenizer_sha256}


def state_of(cfg: RunConfig, ranks: Ranks, data_fingerprint: str, tokenizer_sha256: str | None) -> dict[str, Any]:
    """What every checkpoint of a run tells of it, besides its progress."""
    layout = {"world": ranks.world, "parallel": cfg.parallel.model_dump(mode="json")}
    return {
        "identity": identity(cfg, data_fingerprint, tokenizer_sha256),
        "config": cfg.model_dump(mode="json"),
        "layout": layout,
    }


def find(
    folder: Path, resume: str, ranks: Ranks | None = None, check: Check = "full", *, moments: bool = True
) -> Path | None:
    """The checkpoint to go on from: the newest whole one of the run for `auto`, that of a given path, None for a
    fresh start. With `ranks`, all of them call it and share the reading.

    Args:
        check, moments: as `pretrain.checkpoints.contents.damage` takes them.
    Raises:
        ConfigError: there are checkpoints but none is whole, or there were some; `never` in a folder that has some; a
        path that is no checkpoint.
    """
    if resume in ("auto", "never"):
        agreed(ranks, lambda: check_place(folder))
    candidates = _as_the_first_sees_them(to_resume(folder, resume), ranks)
    agreed(ranks, lambda: check_resume(folder, resume, candidates))
    if resume == "never" or not candidates:
        return None
    share = (ranks.rank, ranks.world) if ranks else (0, 1)
    wrong = None
    for path in reversed(candidates):
        found = agreed(ranks, functools.partial(_wrong_with, path, check, share, moments))
        wrong = next(filter(None, ranks.gather(found) if ranks else [found]), None)
        if wrong is None:
            if path != candidates[-1]:
                log.warning("going on from %s: what was trained after it is lost, and trained again", path.name)
            return path
        log.warning("not going on from %s: %s", path.name, wrong)
    raise ConfigError(
        f"resume={resume}: none of the {len(candidates)} checkpoints can be used; the oldest: {wrong}. Restore "
        "one, give another, or start afresh in another run folder (run=...). Nothing was changed."
    )


def _wrong_with(path: Path, check: Check, share: tuple[int, int], moments: bool) -> str | None:
    return looked_at(path, lambda: damage(path, check, share, moments=moments))


def _as_the_first_sees_them(paths: list[Path], ranks: Ranks | None) -> list[Path]:
    """The first rank's paths, for all: a network file system may show others an older listing."""
    if ranks is None or ranks.world == 1:
        return paths
    return [Path(name) for name in ranks.gather([str(path) for path in paths])[0]]


@dataclass(frozen=True)
class Difference:
    """One thing that is not as it was when a checkpoint was written."""

    key: str
    was: Any
    now: Any
    verdict: str  # harmless, allowed, or refused


def check(checkpoint: Path, now: Mapping[str, Any], allow: Sequence[str]) -> None:
    """Says what differs between a checkpoint and the run that wants to go on from it, as a table; `now` and `allow` as
    `audit` takes them. Raises ConfigError if a difference is refused, or the checkpoint's settings cannot be read.
    """
    state = read_state(checkpoint)
    try:
        differences = audit(state, now, allow)
    except ConfigError as problem:
        raise ConfigError(f"{checkpoint / STATE}: config: {problem}. Give another checkpoint (resume=...).") from None
    check_audit(checkpoint, differences)


def audit(state: Mapping[str, Any], now: Mapping[str, Any], allow: Sequence[str]) -> list[Difference]:
    """What differs between a checkpoint's state and the run that wants to go on from it, refusals first.

    `now` has the same `identity`, `config`, `layout` and `versions` as the state. Settings that do not touch the
    weights, the layout and versions are harmless; what is left of the identity is refused, unless `allow` names it (or
    a section above it).
    """
    newer = now["identity"].keys() - state["identity"].keys()
    newer |= flat(now.get("config", {})).keys() - flat(state.get("config", {})).keys()
    if newer:
        state = _as_read_today(state)
    differences = []
    for key, was, is_now in _differing(state["identity"], now["identity"]):
        allowed = key not in FORWARD and any(key == it or key.startswith(it + ".") for it in allow)
        differences.append(Difference(key, was, is_now, "allowed" if allowed else "refused"))
    known = {difference.key for difference in differences}
    for part in ("config", "layout", "versions"):
        for key, was, is_now in _differing(flat(state.get(part, {})), flat(now.get(part, {}))):
            if key not in known:
                differences.append(Difference(key if part == "config" else f"{part}: {key}", was, is_now, "harmless"))
    return sorted(differences, key=lambda difference: ["refused", "allowed", "harmless"].index(difference.verdict))


def _as_read_today(state: Mapping[str, Any]) -> dict[str, Any]:
    """A checkpoint's state with the settings that did not exist when it was written, at their defaults."""
    cfg = from_tree(state["config"], written=True)
    return {**state, "identity": {**identity(cfg, "", ""), **state["identity"]}, "config": cfg.model_dump(mode="json")}


def _differing(was: Mapping[str, Any], now: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    return [(key, was.get(key), now.get(key)) for key in {**was, **now} if was.get(key) != now.get(key)]


def check_audit(checkpoint: Path, differences: Sequence[Difference]) -> None:
    """Raises ConfigError if a difference is refused; else says them all, as a table."""
    refused = [difference for difference in differences if difference.verdict == "refused"]
    if refused:
        changes = "; ".join(f"{it.key} was {it.was!r} and is {it.now!r}" for it in refused)
        keys = ", ".join(it.key for it in refused if it.key not in FORWARD)
        allow = f", allow it (resume_allow: [{keys}])" if keys else ""
        back = "; ".join(f"{it.key}={it.was}" for it in refused if it.key in FORWARD)
        back = f" ({back}: without it the weights mean something else)" if back else ""
        raise ConfigError(
            f"{checkpoint} cannot be resumed with this configuration: {changes}. Set back what changed{back}{allow}, "
            "or start afresh in another run folder (run=...). Nothing was changed."
        )
    if differences:
        table = Table("", "was", "is", "verdict", title=f"What differs from {checkpoint.name}", title_justify="left")
        for difference in differences:
            table.add_row(difference.key, repr(difference.was), repr(difference.now), difference.verdict)
        text = io.StringIO()
        Console(file=text, width=120).print(table)
        log.info("%s", text.getvalue().rstrip())
