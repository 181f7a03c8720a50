"""What the ranks on other hosts get of this process's environment: deepspeed's launcher drops most of it.

It takes what its `.deepspeed_env` lists, so `overtone run` writes one into the run folder and names it in DS_ENV_FILE;
what the user's own `.deepspeed_env` lists goes on and wins.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from common.errors import ConfigError

# Beginnings of names, and why they are needed there.
EXPORTED = {
    "CUDA_": "which CUDA, how kernels are launched; but for CUDA_VISIBLE_DEVICES, which deepspeed sets by slot",
    "CUBLAS_": "CUBLAS_WORKSPACE_CONFIG: repeatable products",
    "CUDNN_": "logs and paths of cuDNN",
    "DS_": "DS_ACCELERATOR, how DeepSpeed builds its C++",
    "FI_": "libfabric: without FI_PROVIDER and its like, EFA falls back to sockets",
    "GLOO_": "the interface of collectives on the CPU",
    "HF_": "where data sets are cached, whether the Hub may be asked",
    "HIP_": "AMD's GPUs, as CUDA_; but for HIP_VISIBLE_DEVICES",
    "HSA_": "AMD's runtime",
    "IBV_": "InfiniBand's verbs",
    "KMP_": "Intel's OpenMP",
    "LD_LIBRARY_PATH": "where NCCL's network plugins and libfabric are found",
    "LD_PRELOAD": "another allocator, or a library in the place of one",
    "MALLOC_": "how the C library keeps memory",
    "MKL_": "threads of matrix products on the CPU",
    "MLX5_": "Mellanox adapters",
    "NCCL_": "interfaces, transports and logs of collectives on GPUs",
    "NVIDIA_TF32_OVERRIDE": "whether products are rounded to TF32",
    "OFI_": "NCCL's plugin for libfabric",
    "OMP_": "threads of a rank",
    "OVERTONE_": "Overtone's own",
    "PYTORCH_": "PYTORCH_ALLOC_CONF: how torch keeps GPU memory",
    "RCCL_": "collectives on AMD's GPUs",
    "RDMAV_": "RDMAV_FORK_SAFE: RDMA beside processes that fork",
    "SHARP_": "reductions in the switches",
    "TORCH": "TORCH_*, TORCHINDUCTOR_*: logs, caches, extensions, NCCL's error handling",
    "TRITON_": "the cache of kernels",
    "UCX_": "transports of UCX",
    "WANDB_": "where and as what a run is told of; but for WANDB_API_KEY",
    "XDG_CACHE_HOME": "caches",
    "ZEUS_": "how energy is measured",
}
# Never, whatever their beginning: proxies are this machine's; a secret would be in every host's list of processes.
NEVER = re.compile(r"(?i)proxy|token|secret|password|credential|(^|_)key($|_)|_VISIBLE_DEVICES$|^DS_ENV_FILE$")
BY_DEEPSPEED = ("MLFLOW", "PYTHON", "MV2")  # goes by itself
# What a session has for itself, of which nobody expects that it is carried.
SESSIONS_OWN = re.compile(
    r"_|[a-z_].*|BASH.*|COLORTERM|COLUMNS|CONDA.*|DBUS_.*|DEBIAN_FRONTEND|DISPLAY|EDITOR|HIST.*|HOME|HOSTNAME|HOSTTYPE"
    r"|IFS|INVOCATION_ID|JOURNAL_STREAM|KRB5.*|LANG|LANGUAGE|LC_.*|LESS.*|LINES|LOADEDMODULES|LOGNAME|LS_COLORS|MACHTYPE"
    r"|MAIL|MANPATH|MAN.*|MODULE.*|MOTD_SHOWN|OLDPWD|OSTYPE|PAGER|PATH|PDSH_.*|PS1|PWD|PYTEST.*|SHELL|SHLVL|SLURM.*|SSH_.*"
    r"|STY|SUDO_.*|TERM.*|TMUX.*|TZ|USER|USERNAME|VIRTUAL_ENV.*|VISUAL|VSCODE_.*|WINDOWID|XAUTHORITY|XDG_(?!CACHE_HOME).*"
)
USERS_FILES = (Path.home() / ".deepspeed_env", Path(".deepspeed_env"))


def exported(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables of an environment that go to other hosts."""
    return {
        name: value
        for name, value in sorted(environment.items())
        if name.startswith(tuple(EXPORTED)) and not NEVER.search(name)
    }


def left_here(environment: Mapping[str, str]) -> list[str]:
    """The names of what is set and does not go to other hosts, but for a session's own."""
    stays = environment.keys() - exported(environment).keys()
    return sorted(name for name in stays if not SESSIONS_OWN.fullmatch(name) and not name.startswith(BY_DEEPSPEED))


def env_file(added: Mapping[str, str]) -> str:
    """A `.deepspeed_env` for pdsh that exports `added` and what is exported of this process's environment.

    Raises:
        ConfigError: a value that the file's format cannot carry, or a file of the user's that cannot be read.
    """
    lines = [f"{name}={_value(name, value)}" for name, value in {**exported(os.environ), **added}.items()]
    given = os.environ.get("DS_ENV_FILE")
    if given and not Path(given).is_file():
        raise ConfigError(
            f"DS_ENV_FILE={given}: there is no such file; name one with a line NAME=VALUE each, or unset it"
        )
    for path in (Path(given),) if given else USERS_FILES:
        if path.is_file():
            try:
                written = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
            except (OSError, UnicodeDecodeError) as error:
                raise ConfigError(f"{path}: cannot be read as UTF-8 text ({error}), and deepspeed reads it") from None
            lines += [line for line in written if "=" in line and not line.startswith("#")]  # deepspeed fails on others
    return "".join(line + "\n" for line in lines)


def _value(name: str, value: str) -> str:
    """deepspeed strips a value and puts it in double quotes if it holds more than letters, digits and @%+=:,./-; pdsh
    then replaces %h, %n and %u; the other host's shell reads the rest.
    """
    if value != value.strip() or "\n" in value or "\r" in value:
        raise ConfigError(
            f"the variable {name}={value!r} cannot be exported to other hosts: deepspeed cannot pass line breaks or "
            f"spaces at the ends on. Change it, or `unset {name}`"
        )
    for special in '\\$`"':
        value = value.replace(special, "\\" + special)
    return value.replace("%", "%%")
