"""Scenarios of hosts that are not alike: what differs on the second one, how soon it is found, and in which words."""

from __future__ import annotations

import shutil
import stat
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from benchmarks.hosts.stage import Ended, Stage
from benchmarks.processes import ROOT
from common.files import sha256_of
from data.manifest import fingerprint, read_manifest, write_manifest

NVIDIA_SMI = '#!/bin/sh\nfor k in $(seq {gpus}); do echo "GPU $k: none such"; done\n'


def _refused(stage: Stage, *more: str, hostfile: Sequence[str] = ()) -> Ended:
    """A job that is to end before its first step."""
    words = stage.launch(*more)
    if hostfile:
        path = stage.folder / "hostfile"
        path.write_text("".join(f"{line}\n" for line in hostfile))
        words[words.index("--hostfile") + 1] = str(path)
    began = time.monotonic()
    return stage.ended(stage.start(words, steps=0), began)


def _edited(stage: Stage, path: Path, change: Callable[[str], str]) -> None:
    """Has the second host see a file with another text."""
    other = stage.folder / f"other-{path.name}"
    other.write_text(change(path.read_text()))
    stage.hosts[1].hide(path, other)


def other_settings(stage: Stage) -> Ended:
    """the second host's YAML has another optim.eps"""
    _edited(stage, stage.config, lambda text: text.replace("eps: 0.0001", "eps: 0.0002"))
    return _refused(stage)


def other_passes(stage: Stage) -> Ended:
    """the second host's YAML asks for smaller passes"""
    _edited(stage, stage.config, lambda text: text.replace("micro_batch: 4", "micro_batch: 2"))
    return _refused(stage)


def other_code(stage: Stage) -> Ended:
    """model/decoder.py is edited on the second host"""
    _edited(stage, ROOT / "model" / "decoder.py", lambda text: text + "# edited\n")
    return _refused(stage)


def other_code_allowed(stage: Stage) -> Ended:
    """the same with --allow-different-code, for 6 steps"""
    _edited(stage, ROOT / "model" / "decoder.py", lambda text: text + "# edited\n")
    return _refused(stage, "--allow-different-code", "train.steps=6")


def other_data(stage: Stage) -> Ended:
    """the second host's prepared data have the same sizes and one other token"""
    data, other = stage.folder.parent / "data", stage.folder / "other-data"
    shutil.copytree(data, other)
    manifest = read_manifest(other)
    shard = manifest["splits"]["train"]["shards"][0]
    file = other / shard["file"]
    tokens = np.memmap(file, dtype="<u2", mode="r+")
    tokens[100] ^= 1
    tokens.flush()
    shard["sha256"] = sha256_of(file)
    manifest["fingerprint"] = fingerprint(manifest)
    write_manifest(other, manifest)
    stage.hosts[1].hide(data, other)
    return _refused(stage)


def run_folder_apart(stage: Stage) -> Ended:
    """the second host has a run folder of its own"""
    stage.run.mkdir()
    (stage.folder / "elsewhere").mkdir()
    stage.hosts[1].hide(stage.run, stage.folder / "elsewhere")
    return _refused(stage)


def two_names(stage: Stage) -> Ended:
    """the first host is in the hostfile by name and by address"""
    return _refused(stage, hostfile=["node1 slots=1", f"{stage.hosts[0].address} slots=1"])


def too_many_slots(stage: Stage) -> Ended:
    """hosts that list 4 GPUs (nvidia-smi is a script) have slots=8"""
    tool = stage.folder / "nvidia-smi"
    tool.write_text(NVIDIA_SMI.format(gpus=4))
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    for host in stage.hosts:
        host.call("sh", "-c", f"mkdir -p /run/tools && cp {tool} /run/tools && mount --bind /run/tools /usr/local/sbin")
    return _refused(
        stage, "--dry-run", "train.tokens_per_step=1024", hostfile=[f"{name} slots=8" for name in stage.hosts.names]
    )


SCENARIOS = {
    "other settings": other_settings,
    "other passes": other_passes,
    "other code": other_code,
    "other code, allowed": other_code_allowed,
    "other data": other_data,
    "run folder apart": run_folder_apart,
    "one host, two names": two_names,
    "slots without GPUs": too_many_slots,
}
