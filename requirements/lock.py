"""`make lock`: resolves pyproject.toml anew and writes the lock, one file for each way to set up.

    run-cpu.txt  dev-cpu.txt     what `make setup` and `make test` install on a machine without a GPU
    run-gpu.txt  dev-gpu.txt     and with one
    build.txt                    first of all: what packages without a wheel are built with
    torch-cpu.txt triton-3.6.txt kept by hand: torch's CPU build; the older Triton that kernels are compiled with too

Each is whole, in pip's own form with hashes, for Python 3.11 and 3.12 on Linux, and holds no address: pip and uv read
it (`pip install -r requirements/run-cpu.txt`). Those for CPUs are those for GPUs without what only GPUs need, and
with torch as torch-cpu.txt has it. uv resolves; nothing but its standard output is trusted.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

HERE = Path(__file__).parent
TORCH = HERE / "torch-cpu.txt"
BUILD = ("setuptools", "packaging")  # packages without a wheel are built with these, not with the newest
HEADER = "# Written by `make lock` from pyproject.toml: see requirements/lock.py.\n"

Lock = dict[str, str]  # by name: the lines of a package, one block for each version, with its hashes


def resolve(extras: list[str], within: Path) -> Lock:
    """What pyproject.toml asks for with these extras, at the versions that `within` allows."""
    words = ["pip", "compile", "--universal", "--python-version", "3.11", "--generate-hashes", "--no-annotate"]
    words += ["--no-header", "--quiet", "--no-strip-extras"]
    words += ["--constraint", str(within), *(f"--extra={name}" for name in extras)]
    command = [sys.executable, "-m", "uv", *words, str(HERE.parent / "pyproject.toml"), "-"]
    done = subprocess.run(command, input="\n".join(BUILD), capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"lock: nothing was changed, since uv could not resolve pyproject.toml:\n{done.stderr}")
    return blocks(done.stdout)


def blocks(text: str) -> Lock:
    """A requirements file by package. One with extras is there without them too: for pip 23 these are two packages."""
    found: Lock = {}
    name = ""
    for line in text.splitlines(keepends=True):
        if not line.startswith((" ", "#")):
            name = line.partition("==")[0]
        if name and not line.startswith("#"):
            found[name] = found.get(name, "") + line
    plain = {name: re.sub(r"\[.*?\]", "", block) for name, block in found.items() if "[" in name}
    return found | {name.partition("[")[0]: block for name, block in plain.items()}


def for_cpus(lock: Lock, triton: bool) -> Lock:
    """Without what the build of torch for GPUs brings along; nvidia-ml-py is what Zeus asks for."""
    gpu = {name for name in lock if name.startswith(("nvidia-", "cuda-")) and name != "nvidia-ml-py"}
    gpu |= set() if triton else {"triton"}
    return {name: block for name, block in lock.items() if name not in gpu} | blocks(TORCH.read_text())


def main() -> None:
    """Writes all locks, or none if uv cannot resolve; torch's version is the one in torch-cpu.txt."""
    torch = re.search(r"^torch==([\d.]+)", TORCH.read_text(), re.MULTILINE)
    assert torch, f"{TORCH} names torch's version"
    bounds = HERE / "bounds.tmp"
    try:
        bounds.write_text(f"torch=={torch[1]}\n")
        dev = resolve(["dev"], bounds)
        bounds.write_text("\n".join(re.findall(r"^\w[^\\\n]*", "".join(dev.values()), re.MULTILINE)))
        run = resolve(["train"], bounds)
    finally:
        bounds.unlink(missing_ok=True)
    locks = {
        "build": {name: dev[name] for name in BUILD},
        "run-cpu": for_cpus(run, triton=False),
        "dev-cpu": for_cpus(dev, triton=True),
        "run-gpu": run,
        "dev-gpu": dev,
    }
    for name, lock in locks.items():
        (HERE / f"{name}.txt").write_text(HEADER + "".join(lock[package] for package in sorted(lock)))
        print(f"lock: {len(lock)} packages in requirements/{name}.txt")


def newest() -> None:
    """Prints what pyproject.toml asks for with the extra `dev`, without bounds: for `make test-latest`."""
    project = tomllib.loads((HERE.parent / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    requirements, unread = list(project["dependencies"]), ["dev"]
    while unread:
        for requirement in extras[unread.pop()]:
            of_ours = re.fullmatch(r"overtone\[(.*)\]", requirement)
            unread += of_ours[1].split(",") if of_ours else []
            requirements += [] if of_ours else [requirement]
    print(*sorted({re.split(r"[<>=!~ ]", requirement)[0] for requirement in requirements}))


if __name__ == "__main__":
    newest() if sys.argv[1:] == ["newest"] else main()
