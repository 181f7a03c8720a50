"""The machine code of a kernel as an H100 would run it: compiled by the installed Triton for sm_90, and counted."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget


class Hopper:
    """A driver that answers for an H100 and loads nothing."""

    def get_current_target(self) -> GPUTarget:
        """An H100: sm_90, 32 threads a warp."""
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        """The only one."""
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        """The default one; nothing is put into it."""
        return 0

    def get_active_torch_device(self) -> torch.device:
        """Where Triton may make tensors of its own: there is no GPU."""
        return torch.device("cpu")

    def get_device_interface(self) -> Any:
        """torch's module, which is not called while nothing runs."""
        return torch.cuda

    def map_python_to_cpp_type(self, kind: str) -> str:
        """A type for the launcher, which is never built."""
        return "int"

    class utils:
        """What Triton asks of a driver's compiled part."""

        @staticmethod
        def get_device_properties(device: int) -> dict[str, int]:
            """An H100's bytes of shared memory a block, multiprocessors and warp."""
            return {"max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": 32}

        @staticmethod
        def load_binary(*parts: Any) -> tuple[int, int, int, int, int]:
            """Handles of a module and a function that do not exist, then registers, spills and most threads a block."""
            return (1, 2, 0, 0, 1024)

    class launcher_cls:
        """Takes what a launcher is made of, and launches nothing."""

        def __init__(self, *parts: Any) -> None:
            pass


@dataclass(frozen=True)
class Compiled:
    """One kernel as an H100 would run it."""

    name: str
    constants: str
    warps: int
    registers: int
    spills: int  # instructions that write registers to memory or read them back
    shared_bytes: int
    instructions: int
    per_score: float | None  # instructions of a thread per score, in the loop over scores or after the product
    special_per_score: float | None


def counted_code(name: str, constants: dict[str, Any], warps: int, made: Any) -> Compiled:
    """Counts a kernel that Triton made (`made`): registers, spills, instructions. Needs Triton's own cuobjdump."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        use = _disassembled("--dump-resource-usage", file.name)
        code = _disassembled("-sass", file.name)
    (registers,) = re.findall(r"REG:(\d+)", use)
    lines = [(int(at, 16), text) for at, text in re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", code, re.M)]
    per_score, special = _per_score(name, constants, warps, lines)
    spills = sum(bool(re.search(r"\b(LDL|STL)\b", text)) for _, text in lines)
    settings = ", ".join(f"{key} {value}" for key, value in constants.items())
    shared = made.metadata.shared
    return Compiled(name, settings, warps, int(registers), spills, shared, len(lines), per_score, special)


def _disassembled(option: str, path: str) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([tool, option, path], capture_output=True, text=True, check=True).stdout


def _per_score(
    name: str, constants: dict[str, Any], warps: int, lines: list[tuple[int, str]]
) -> tuple[float | None, float | None]:
    """Instructions per score and thread, and those of them that the special-function unit takes."""
    loops = []
    for at, text in lines:
        back = re.search(r"\bBRA(?:\.\w+)*\s+(?:\S+,\s*)?0x([0-9a-f]+)", text)
        if back and int(back[1], 16) < at:
            loops.append((int(back[1], 16), at))
    if name == "triton_fused._scores":
        last = max(at for at, text in lines if "HGMMA" in text)
        chosen = [text for at, text in lines if at > last]
    elif loops and name in ("triton_scores._statistics", "triton_scores._gradients", "triton_fused._gradients"):
        first, last = max(loops, key=lambda loop: loop[1] - loop[0])
        chosen = [text for at, text in lines if first <= at <= last]
    else:
        return None, None
    rows, columns = ("ROUNDS", "BLOCK") if name.endswith("_statistics") else ("BLOCK_M", "BLOCK_V")
    of_thread = constants[rows] * constants[columns] / (32 * warps)
    return len(chosen) / of_thread, sum("MUFU" in text for text in chosen) / of_thread
