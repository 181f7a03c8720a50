"""What the machine is, and its two ceilings: how fast memory is copied, and how fast products are."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor

from benchmarks.gpu.findings import Findings
from benchmarks.machine import nvidia_smi
from benchmarks.measuring import timed
from common.machine import cores, cpu_name

PACKAGES = ("torch", "triton", "numpy", "deepspeed", "zeus", "flash-attn", "pytest-xdist", "liger-kernel")
WARM_S = 0.5  # of work, until clocks have risen
REPEATS = 15


def version_of(package: str) -> str | None:
    """None: it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def number(text: str | None) -> float | None:
    """A reading of nvidia-smi; None if there was none, or it is a word such as [N/A]."""
    try:
        return None if text is None else float(text)
    except ValueError:
        return None


def median_s(work: Callable[[], object], device: torch.device, warm_s: float, repeats: int = REPEATS) -> float:
    """Seconds of one call, after calls for `warm_s` seconds."""
    warm = timed(work, device)
    while warm < warm_s:
        warm += timed(work, device)
    return statistics.median(timed(work, device) for _ in range(repeats))


def copy_tb_s(size: int, device: torch.device, warm_s: float) -> float:
    """TB/s, read and written, of a copy of `size` bytes within the device."""
    source = torch.empty(size, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    return 2 * size / median_s(lambda: target.copy_(source), device, warm_s) / 1e12


def product_tflops(m: int, k: int, n: int, dtype: torch.dtype, device: torch.device, warm_s: float) -> float:
    """TFLOP/s of (M, K) @ (K, N)."""
    a, b = torch.randn(m, k, device=device, dtype=dtype), torch.randn(k, n, device=device, dtype=dtype)
    out = torch.empty(m, n, device=device, dtype=dtype)
    return 2 * m * k * n / median_s(lambda: torch.mm(a, b, out=out), device, warm_s) / 1e12


def head_tflops(tokens: int, dim: int, vocab: int, device: torch.device, warm_s: float) -> dict[str, float]:
    """TFLOP/s of a head's three products: x w', g w and g' x, for x (N, D), w (V, D) and g (N, V)."""
    x, w, g = (
        torch.randn(shape, device=device, dtype=torch.bfloat16)
        for shape in ((tokens, dim), (vocab, dim), (tokens, vocab))
    )
    pairs: dict[str, tuple[Tensor, Tensor]] = {"x w'": (x, w.t()), "g w": (g, w), "g' x": (g.t(), x)}
    flop = 2 * tokens * dim * vocab
    return {
        name: flop / median_s(lambda a=a, b=b: torch.mm(a, b), device, warm_s) / 1e12  # type: ignore[misc]
        for name, (a, b) in pairs.items()
    }


def measure(findings: Findings) -> None:
    """Device and versions, then bandwidth, square products and the head's, as far as time goes."""
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    findings.figure("device", torch.cuda.get_device_name() if on_gpu else cpu_name())
    findings.figure("cpu", f"{cpu_name()}, {cores()} cores of {os.cpu_count()}")
    findings.figure("python", platform.python_version())
    for package in PACKAGES:
        findings.figure(package, torch.__version__ if package == "torch" else version_of(package))
    findings.figure("cuda", torch.version.cuda)
    if on_gpu:
        properties = torch.cuda.get_device_properties(device)
        findings.figure("compute_capability", f"{properties.major}.{properties.minor}")
        findings.figure("multiprocessors", properties.multi_processor_count)
        findings.figure("memory_gib", properties.total_memory / 2**30)
        findings.figure("driver", nvidia_smi("driver_version"))
        findings.figure("power_limit_w", number(nvidia_smi("power.limit")))
        findings.figure("most_sm_clock_mhz", number(nvidia_smi("clocks.max.sm")))
    warm_s = 0.02 if findings.small else WARM_S
    size = 2**24 if findings.small else 2**32  # bytes
    copy = copy_tb_s(size, device, warm_s)
    findings.figure("copy_tb_s", copy)
    square = 256 if findings.small else 8192
    bf16 = product_tflops(square, square, square, torch.bfloat16, device, warm_s)
    findings.figure(f"bf16_square_{square}_tflop_s", bf16)
    float32 = product_tflops(square, square, square, torch.float32, device, warm_s)
    findings.figure(f"float32_square_{square}_tflop_s", float32)
    findings.tell(f"copy {copy:.3g} TB/s, bf16 {bf16:.3g} and float32 {float32:.3g} TFLOP/s")
    shapes = [(64, 64, 512)] if findings.small else [(65536, 768, 50304), (65536, 4096, 50304)]
    for tokens, dim, vocab in shapes:
        if findings.left_s < 5:
            findings.leave_out(f"the head's products at D {dim}")
            continue
        for name, rate in head_tflops(tokens, dim, vocab, device, warm_s / 2).items():
            findings.row("the head's products, bf16", tokens=tokens, dim=dim, vocab=vocab, product=name, tflop_s=rate)
    if on_gpu:
        findings.figure("sm_clock_mhz_after_products", number(nvidia_smi("clocks.sm")))
