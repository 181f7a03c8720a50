"""Zeus against nvidia-smi: the joules of a window of known load, from the device's counter and from power readings.

The counter is read as `pretrain/energy/meter.py` reads it. Power readings are integrated by the times that nvidia-smi
gives them, so that it does not matter when its output arrives.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import time
from collections.abc import Sequence
from datetime import datetime
from itertools import pairwise

import torch

from benchmarks.gpu.findings import Findings
from benchmarks.machine import first_gpu

WARM_S = 3.0  # nvidia-smi tells the mean of the last second
WINDOW_S = 5.0
EVERY_MS = 100
MOST_APART = 0.15  # between the two, of nvidia-smi's
SIZE = 8192


def readings(text: str) -> list[tuple[float, float]]:
    """(seconds since the epoch, watts) of each whole line of `timestamp, power.draw`."""
    found = []
    for line in text.splitlines():
        moment, _, watts = line.partition(",")
        try:
            found.append((datetime.strptime(moment.strip(), "%Y/%m/%d %H:%M:%S.%f").timestamp(), float(watts)))
        except ValueError:  # a line cut off, or a reading that is not to be had
            continue
    return found


def integral_j(power: Sequence[tuple[float, float]], began: float, stopped: float) -> float | None:
    """Joules between two times by trapezoids, the first and last reading held on; None with fewer than 10 readings."""
    inside = [(t, w) for t, w in power if began <= t <= stopped]
    if len(inside) < 10:
        return None
    points = [(began, inside[0][1]), *inside, (stopped, inside[-1][1])]
    return sum((t2 - t1) * (w1 + w2) / 2 for (t1, w1), (t2, w2) in pairwise(points))


def load(seconds: float, a: torch.Tensor, b: torch.Tensor) -> None:
    """Products for so long; returns when the device is done."""
    stop = time.monotonic() + seconds
    while time.monotonic() < stop:
        for _ in range(8):
            torch.mm(a, b)
        torch.cuda.synchronize()


def measure(findings: Findings) -> None:
    """Joules of one window by both; a problem if they are further apart than MOST_APART."""
    if not torch.cuda.is_available():
        return findings.skip_all("needs a GPU")
    if importlib.util.find_spec("zeus") is None:
        return findings.skip_all("Zeus is not installed")
    if shutil.which("nvidia-smi") is None:
        return findings.skip_all("nvidia-smi is not here")
    from pretrain.energy.meter import ZeusCounter

    counter = ZeusCounter(1)
    if "gpu" in counter.missing:
        return findings.problem(f"Zeus does not read this GPU: {counter.missing['gpu']}")
    a, b = (torch.randn(SIZE, SIZE, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    words = ["nvidia-smi", "-i", first_gpu(), "--query-gpu=timestamp,power.draw", "--format=csv,noheader,nounits"]
    lines = ["stdbuf", "-oL"] if shutil.which("stdbuf") else []  # or it might hold lines back until it is killed
    sampled = findings.scratch / "power.csv"
    with sampled.open("wb") as output:
        watcher = subprocess.Popen([*lines, *words, "-lms", str(EVERY_MS)], stdout=output, stderr=subprocess.DEVNULL)
        try:
            load(WARM_S, a, b)
            before, began = counter.read()["gpu"][0], time.time()
            load(WINDOW_S, a, b)
            after, stopped = counter.read()["gpu"][0], time.time()
            time.sleep(3 * EVERY_MS / 1e3)
        finally:
            watcher.terminate()
            watcher.wait()
    power = readings(sampled.read_text(errors="replace"))
    zeus_j, smi_j = after - before, integral_j(power, began, stopped)
    findings.figure("window_s", stopped - began)
    findings.figure("zeus_j", zeus_j)
    findings.figure("nvidia_smi_j", smi_j)
    findings.figure("power_readings", sum(began <= t <= stopped for t, _ in power))
    findings.figure("zeus_mean_w", zeus_j / (stopped - began))
    if smi_j is None:
        return findings.problem(f"nvidia-smi gave {len(power)} power readings, too few in the window")
    ratio = zeus_j / smi_j
    findings.figure("zeus_over_nvidia_smi", ratio)
    findings.tell(f"Zeus {zeus_j:,.0f} J, nvidia-smi {smi_j:,.0f} J, ratio {ratio:.3f}")
    if abs(ratio - 1) > MOST_APART:
        findings.problem(f"Zeus and nvidia-smi differ by {abs(ratio - 1):.0%}, more than {MOST_APART:.0%}")
    return None
