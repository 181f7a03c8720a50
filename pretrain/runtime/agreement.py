"""What every rank of a job must have in common, whatever host it is on: checked where the ranks meet.

Hosts that differ would train together without a word: another learning rate in one host's YAML, an edited file of the
checkout, other prepared data of the same size, a run folder of their own. Without torch, so that a doctor can ask hosts
for the same facts.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.checkout import revision, sources_sha256, versions
from common.command import ALLOW_CODE
from common.errors import ConfigError
from common.files import flush, sha256_of
from common.settings import flat

if TYPE_CHECKING:
    from pretrain.config import RunConfig

Facts = Mapping[str, Mapping[str, Any]]  # plain values by part, then by name
REMEDIES = {
    "code": f"check out the same revision there, without changes, or give {ALLOW_CODE} where that is meant",
    "versions": f"install the same on every host (`make setup`), or give {ALLOW_CODE} where that is meant",
    "settings": "give every host the same file and settings",
    "data": "copy the prepared folder to that host, or prepare it again there",
    "text": "give every host the same files",
}
CODE = ("code", "versions")  # the parts that may differ where somebody means it
SHOWN = 8  # differences in one message
TOKEN = ".shared-"  # begins the name of a file that tells whether hosts share a folder
SEEN_S = 10.0  # for a file to show up on other hosts: network file systems remember for a while what was not there


def facts_here(cfg: RunConfig | None = None, data: Path | None = None, texts: Sequence[Path] = ()) -> Facts:
    """What this host would use, by the parts of REMEDIES.

    Args:
        cfg: the settings; None: there are none, or they cannot be read.
        data: the prepared folder; None: that of the settings.
        texts: files of text that are read as well.
    """
    told: dict[str, dict[str, Any]] = {"code": {"revision": revision(), "sources": sources_sha256()}}
    told["versions"] = dict(versions())
    if cfg is not None:
        told["settings"] = flat(cfg.model_dump(mode="json"))
    if data or cfg:
        told["data"] = _data(data or cfg.data.path)  # type: ignore[union-attr]
    told["text"] = {str(file): sha256_of(file) if file.is_file() else None for file in texts}
    return told


def _data(folder: Path) -> dict[str, Any]:
    from data.manifest import read_manifest  # numpy: not needed to read a config

    try:
        manifest = read_manifest(folder)
    except ConfigError as error:  # told by whoever needs them; here it matters whether all hosts lack them
        return {"fingerprint": str(error)}
    return {"fingerprint": manifest["fingerprint"], "tokenizer": manifest["tokenizer_sha256"]}


@dataclass(frozen=True)
class Difference:
    """One fact of a host that is not the first one's."""

    host: str
    part: str  # of REMEDIES
    name: str
    here: Any  # on the host
    first: Any

    def __str__(self) -> str:
        name = self.name if self.part in ("settings", "versions") else f"{self.part} {self.name}"
        return f"{self.host}: {name} is {_shown(self.here)}, not {_shown(self.first)}"


def _shown(value: Any) -> str:
    text = str(value)
    is_hash = len(text) in (40, 64) and text.isalnum()
    return f"{text[:12]}..." if is_hash else text if len(text) <= 160 else f"{text[:160]}..."


def differences(hosts: Sequence[str], facts: Sequence[Facts]) -> list[Difference]:
    """What differs from the first host's, once for each host, of any number of ranks.

    Args:
        hosts: by rank.
        facts: by rank, as `facts_here` tells them; a revision that is None is not known.
    """
    found = {}
    for host, told in zip(hosts, facts, strict=True):
        for part, name, here, first in _differing(told, facts[0]):
            if name == "revision" and None in (here, first):
                continue  # a copy without git; its sources are compared all the same
            found[host, part, name] = Difference(host, part, name, here, first)
    return list(found.values())


def _differing(told: Facts, first: Facts) -> Iterator[tuple[str, str, Any, Any]]:
    for part in {**first, **told}:
        a, b = told.get(part, {}), first.get(part, {})
        yield from ((part, name, a.get(name), b.get(name)) for name in {**b, **a} if a.get(name) != b.get(name))


def refusal(hosts: Sequence[str], found: Sequence[Difference]) -> str | None:
    """Why ranks that differ so must not work together, with the remedy; None if they may."""
    if not found:
        return None
    said = "; ".join(map(str, found[:SHOWN])) + (f"; and {len(found) - SHOWN} more" if len(found) > SHOWN else "")
    remedies = "; ".join(f"{part}: {text}" for part, text in REMEDIES.items() if any(it.part == part for it in found))
    return f"not every host has what the first one, {hosts[0]}, has: {said}. For the {remedies}"


def judge(told: Sequence[Sequence[Any]], allow_code: bool = False) -> dict[str, str | None]:
    """Of what all ranks told, a host and its facts each: `refused`, why they must not work together, and `allowed`,
    what differs and may; in words.

    Args:
        allow_code: code and versions may differ.
    """
    hosts, facts = [host for host, _ in told], [facts for _, facts in told]
    found = differences(hosts, facts)
    allowed = [it for it in found if allow_code and it.part in CODE]
    refused = [it for it in found if it not in allowed]
    words = f"{ALLOW_CODE}: {'; '.join(map(str, allowed))}" if allowed else None
    return {"refused": refusal(hosts, refused), "allowed": words}


@contextmanager
def token(folder: Path) -> Iterator[str]:
    """The name of a new file in a run folder, by which other hosts tell whether they share it; gone after the block.
    Only who holds the folder makes one. Raises OSError.
    """
    for left in folder.glob(f"{TOKEN}*"):  # by a job that was killed
        left.unlink(missing_ok=True)
    made = folder / f"{TOKEN}{uuid.uuid4().hex}"
    made.touch()
    try:
        flush(folder)
        yield made.name
    finally:
        with suppress(OSError):
            made.unlink()


def sees(file: Path, size: int | None = None) -> bool:
    """Whether this host sees a file that another one has made, now or within SEEN_S.

    Args:
        size: its bytes; None: any number.
    """
    deadline = time.monotonic() + SEEN_S
    while not (file.exists() and size in (None, file.stat().st_size)):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def not_shared(folder: Path, seen: Sequence[tuple[str, bool]]) -> str | None:
    """Which hosts do not see the first rank's token, in words; None if all do.

    Args:
        seen: by rank, its host and whether it sees the token.
    """
    apart = dict.fromkeys(host for host, sees in seen if not sees)
    if not apart:
        return None
    return (
        f"run={folder}: on {', '.join(apart)} it is another folder than on the first host, {seen[0][0]}, so that each "
        "would keep a part of every checkpoint. Put it on storage that all hosts share (run=FOLDER); `overtone doctor` "
        "tells which hosts do"
    )
