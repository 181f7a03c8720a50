"""The `deepspeed` command for a placement, its environment, and what must be right before it is run.

placement = place(hostfile=None)
words = command("configs/quickstart.yaml", [], placement)
with launch.lease.take(Path("runs/quickstart"), placement) as claim:
    code = launch.job.run(words, environment(placement, claim=claim), claim, placement).code
"""

from __future__ import annotations

import os
import shlex
import shutil
import socket
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from common.checkout import python_path
from common.errors import ConfigError
from common.files import check_writable, replace_file, writing
from common.machine import cores
from common.variables import BIND_VARIABLE, JOB_VARIABLE, LEASE_VARIABLE
from launch.exports import env_file, exported
from launch.hosts import Placement
from launch.lease import lease_of
from launch.probe import free_port as _free_port
from launch.probe import gpus as _gpus
from launch.reach import Facts, ssh_arguments
from pretrain.config import RunConfig, check_data, check_layout
from pretrain.run_folder import RunFolder
from pretrain.runtime.claim import Claim

SITE_HOSTFILE = Path("/job/hostfile")  # deepspeed takes this one unasked, where it exists
DEFAULT_PORT = 29500  # where hosts that are started one by one meet
Launcher = Literal["pdsh", "openmpi", "slurm", "none"]
TOOLS = {"pdsh": ("pdsh", "ssh"), "openmpi": ("mpirun", "ompi_info", "ssh"), "slurm": ("srun",), "none": ()}
# How many processes were started at once. Not SLURM_NTASKS, which a batch script has too, and that is one process.
AT_ONCE = {
    "SLURM_STEP_NUM_TASKS": "srun",
    "OMPI_COMM_WORLD_SIZE": "mpirun",
    "PMI_SIZE": "mpiexec",
    "MV2_COMM_WORLD_SIZE": "mpiexec",
}
ENV_FILE, HOSTFILE = "launch.env", "launch.hosts"  # what is written for deepspeed, in the run folder


def check(cfg: RunConfig, placement: Placement) -> None:
    """Raises ConfigError unless `cfg` can run on `placement` with the data that are prepared."""
    check_writable(cfg.run)
    if cfg.parallel.vocab == "node" and len(set(placement.ranks.values())) > 1:
        hosts = ", ".join(f"{host} {ranks}" for host, ranks in placement.ranks.items())
        raise ConfigError(
            f"parallel.vocab=node: every host must run the same number of ranks, but they run {hosts}. "
            f"Set --num-gpus {min(placement.ranks.values())}, or parallel.vocab=world."
        )
    check_layout(cfg, placement.world, max(placement.ranks.values()))
    check_data(cfg)
    RunFolder(cfg.run).check_resume(cfg.resume)


def command(
    config: str,
    overrides: Sequence[str],
    placement: Placement,
    *,
    module: str = "pretrain",
    launcher: Launcher = "pdsh",
    address: str | None = None,
    port: int | None = None,
    node: int = 0,
    folder: Path | None = None,
    exports: Sequence[str] = (),
) -> list[str]:
    """The `deepspeed` command that runs `module` on every rank of `placement`.

    Args:
        config: path of the config, the same on every host; empty: the module takes none.
        overrides: `key=value` settings.
        placement: where the ranks go.
        module: what the ranks run.
        launcher: how other hosts are reached; `none`: each host runs its own command, and this one is for `node`.
        address: the first host's, where the ranks meet; None: deepspeed finds one out.
        port: where the ranks meet; None: a free one of this machine.
        node: which of the hosts the command is for, under `none`.
        folder: the run folder, for OpenMPI's hostfile where not all hosts are used.
        exports: names of further variables that OpenMPI hands on.
    """
    arguments = [word for word in (config, *overrides) if word]
    where: list[str] = []
    if placement.hostfile is not None:
        hostfile = placement.hostfile
        if launcher == "openmpi" and placement.chosen:
            hostfile = (folder or Path()) / HOSTFILE  # it takes a whole hostfile only
        where = ["--hostfile", str(hostfile)]
        if placement.chosen and launcher != "openmpi":
            where += ["--include", placement.chosen]
        if launcher == "none":
            where += ["--no_ssh", "--node_rank", str(node)]
        else:
            # force_multi: else deepspeed runs a single remote host's ranks here.
            where += ["--force_multi", "--no_ssh_check"]
        if launcher == "pdsh":
            arguments = [_for_remote_shell(argument) for argument in arguments]
        if launcher == "openmpi":
            where += ["--launcher", "openmpi", "--launcher_args", shlex.join(_open_mpi(exports))]
        if address is not None:
            where += ["--master_addr", address]
    elif placement.gpus != tuple(range(len(placement.gpus))):
        where = ["--include", "localhost:" + ",".join(map(str, placement.gpus))]
    else:
        where = ["--num_gpus", str(placement.world)]
    if placement.hostfile is None and SITE_HOSTFILE.exists():
        where += ["--hostfile", os.devnull]
    executable = Path(sys.executable).with_name("deepspeed")
    meet = ["--master_port", str(port or free_port())]
    quiet = ["--no_local_rank", "--log_level", "critical"]
    return [str(executable), *where, *meet, *quiet, "--module", module, *arguments]


def _open_mpi(added: Sequence[str]) -> list[str]:
    """mpirun's own options: it exports by name, and would bind each rank to one core."""
    names = dict.fromkeys([*exported(os.environ), "PATH", *added])
    exports = [word for name in names for word in ("-x", name)]
    return ["--bind-to", "none", "--mca", "btl_tcp_if_include", "lo", *exports]  # Overtone sends nothing by MPI


def srun(config: str, overrides: Sequence[str], placement: Placement, *, port: int | None = None) -> list[str]:
    """The `srun` command that starts a launcher of its own on every host: deepspeed's Slurm launcher tells the ranks
    neither who they are nor where they meet.
    """
    hosts = len(placement.ranks)
    each = ["--nodes", str(hosts), "--ntasks", str(hosts), "--ntasks-per-node", "1", "--kill-on-bad-exit=0"]
    each += ["--cpu-bind=none"]  # else a launcher, and all its ranks, may get the one core of a task
    inner = ["--hostfile", str(placement.hostfile), "--launcher", "none", "--master-port", str(port or free_port())]
    if placement.chosen:
        inner += ["--include", placement.chosen]
    launch = [sys.executable, "-m", "launch", "run", config, *overrides, *inner]
    return ["srun", *each, "--nodelist", ",".join(placement.ranks), *launch]


def environment(
    placement: Placement,
    facts: Mapping[str, Facts] = {},
    *,
    claim: Claim | None = None,
    node: int | None = None,
    folder: Path | None = None,
) -> dict[str, str]:
    """Variables that the `deepspeed` command gets in addition to this process's; what the user has set stays.

    Args:
        placement: where the ranks go.
        facts: what its hosts say of themselves; empty: this machine's are taken.
        claim: the job's, on its run folder; None: there is no launcher.
        node: which host's launcher that is, where each has its own.
        folder: the run folder, where the variables for other hosts are listed; None: no other hosts, or not by pdsh.
    """
    if folder is not None:
        by_pdsh = {"DS_ENV_FILE": str((folder / ENV_FILE).absolute()), "PDSH_SSH_ARGS_APPEND": ssh_arguments()}
        return by_pdsh | python_path()
    added = _own(placement, facts) | _of_job(claim, node) | python_path()
    tools = _tools()
    if tools not in os.environ.get("PATH", "").split(os.pathsep):
        path = os.environ.get("PATH", os.defpath) + os.pathsep + tools  # last: two ninjas in turn rebuild all
        added = {"PATH": path, **added}
    return added


def _own(placement: Placement, facts: Mapping[str, Facts]) -> dict[str, str]:
    """What every rank gets, but for what the user has set: on a CPU, its share of the threads, and of the cores."""
    if facts:
        on_gpus = any(facts[host]["gpus"] for host in facts)
    else:  # a host of a hostfile that starts its own ranks asks itself
        on_gpus = bool(placement.gpus) or (placement.hostfile is not None and _gpus() > 0)
    if on_gpus:
        return {}
    # else every rank starts a thread for every core
    shares = [(facts[host]["cores"] if host in facts else cores()) // n for host, n in placement.ranks.items()]
    ours = {"OMP_NUM_THREADS": str(max(1, min(shares))), "DS_ACCELERATOR": "cpu", BIND_VARIABLE: "1"}
    return {name: value for name, value in ours.items() if name not in os.environ}


def _of_job(claim: Claim | None, node: int | None = None) -> dict[str, str]:
    """By what the ranks know which job they are of, and whether its launcher lives."""
    return {} if claim is None else {JOB_VARIABLE: claim.job, LEASE_VARIABLE: str(lease_of(claim.run, node))}


def _tools() -> str:
    """The folder of this Python's programs: ninja, which compiles DeepSpeed's and our C++, is there."""
    return str(Path(sys.executable).parent)


def write_files(placement: Placement, facts: Mapping[str, Facts], folder: Path, *, claim: Claim | None = None) -> None:
    """Writes into a folder what deepspeed reads: variables for other hosts, and the hostfile for OpenMPI."""
    text = env_file(_own(placement, facts) | _of_job(claim))
    # The path goes to each host's shell as it is, which puts its own PATH before ours.
    lines = (f"{host} slots={ranks}\n" for host, ranks in placement.ranks.items())
    with writing(folder):
        replace_file(folder / ENV_FILE, text + f"PATH=$PATH:{_tools()}\n")
        replace_file(folder / HOSTFILE, "".join(lines))


def one_line(words: Sequence[str], added: Mapping[str, str]) -> str:
    """The command and its variables as one line that a shell can run."""
    variables = [
        f"PATH=$PATH:{shlex.quote(value.rpartition(os.pathsep)[2])}"
        if name == "PATH"
        else f"{name}={shlex.quote(value)}"
        for name, value in added.items()
    ]
    return " ".join([*variables, shlex.join(words)])


def free_port() -> int:
    """A free port below those that the system hands out by itself, so that it stays free while the ranks start."""
    port = _free_port()
    if port is None:
        raise ConfigError("no free port between 20000 and 32000 on this machine, for the ranks to meet on")
    return port


def _for_remote_shell(argument: str) -> str:
    """deepspeed gives arguments to the remote shell bare, or in double quotes if they hold a space; pdsh replaces %h,
    %n and %u before.
    """
    argument = argument.replace("%", "%%")
    if " " not in argument:
        return shlex.quote(argument)
    for special in "\\$`":
        argument = argument.replace(special, "\\" + special)
    return argument


def check_tools(placement: Placement, launcher: Launcher = "pdsh") -> None:
    """Raises ConfigError unless the programs that the command needs are installed."""
    if not Path(sys.executable).with_name("deepspeed").is_file():
        raise ConfigError(
            f"deepspeed is not installed beside {sys.executable}: run `make setup` and use .venv/bin/python"
        )
    if placement.hostfile is None:
        return
    missing = [tool for tool in TOOLS[launcher] if shutil.which(tool) is None]
    if missing:
        raise ConfigError(
            f"--hostfile with --launcher {launcher}: {' and '.join(TOOLS[launcher])} are needed, and "
            f"{', '.join(missing)} is not found; install it on this machine, or use --launcher none"
        )


def check_single(launcher: Launcher) -> None:
    """Raises ConfigError if this process, which starts all ranks, is one of several; `none` starts those of a host."""
    for name, starter in AT_ONCE.items():
        count = os.environ.get(name, "").strip()
        if launcher != "none" and count not in ("", "1"):
            raise ConfigError(
                f"{name}={count}: {starter} started several of this process, and each would start all ranks. Run it "
                f"once, without {starter}, which --launcher slurm or openmpi calls itself; if it is one process, "
                f"`unset {name}`"
            )


def check_launcher(placement: Placement, launcher: Launcher) -> None:
    """Raises ConfigError for a placement that a launcher cannot make."""
    if placement.hostfile is None and launcher != "pdsh":
        raise ConfigError(f"--launcher {launcher}: it needs a --hostfile; on this machine alone no launcher is used")
    if launcher != "openmpi":
        return
    first_slots = all(
        part.partition(":")[2] == ",".join(map(str, range(placement.ranks[part.partition(":")[0]])))
        for part in placement.chosen.split("@")
        if part
    )
    if not first_slots:
        raise ConfigError(f"--include {placement.chosen}: OpenMPI takes the first slots of a host only; use pdsh")


def meeting_point(placement: Placement, facts: Mapping[str, Facts]) -> tuple[str, int]:
    """The address and a port of the first host. Raises ConfigError if the other hosts could not reach it."""
    host = next(iter(placement.ranks))
    if host in facts:
        address, port = facts[host]["address"], facts[host]["port"]
        if port is None:
            raise ConfigError(f"{host}: no free port between 20000 and 32000, for the ranks to meet on")
    else:
        try:
            address, port = socket.gethostbyname(host.rpartition("@")[2]), DEFAULT_PORT
        except OSError as error:
            raise ConfigError(
                f"{host}: its address is not known here ({error}); put the address in the hostfile"
            ) from None
        if address.startswith("127.") and len(placement.ranks) > 1 and host.rpartition("@")[2] in _own_names():
            address = _address_towards(list(placement.ranks)[1]) or address  # many systems give their own name this one
    if address is None or (address.startswith("127.") and len(placement.ranks) > 1):
        raise ConfigError(
            f"{host}: its address here is {address}, which the other hosts cannot reach. Put an address that all hosts "
            "reach in the hostfile, instead of the name"
        )
    return address, port


def _own_names() -> set[str | None]:
    return {socket.gethostname(), socket.getfqdn(), os.environ.get("SLURMD_NODENAME")}


def _address_towards(host: str) -> str | None:
    """This machine's address as another host sees it; None if there is no way to that host."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, suppress(OSError):
        probe.connect((host.rpartition("@")[2], 9))  # sends nothing
        return str(probe.getsockname()[0])
    return None


def own_node(placement: Placement) -> int:
    """Which of the hosts this machine is. Raises ConfigError if that is not clear."""
    import psutil

    addresses_here = (entry.address for entries in psutil.net_if_addrs().values() for entry in entries)
    own = {address for address in addresses_here if not address.startswith("127.")}
    names = _own_names()
    nodes = []
    for node, host in enumerate(placement.ranks):
        name = host.rpartition("@")[2]
        try:
            addresses: set[Any] = {entry[4][0] for entry in socket.getaddrinfo(name, None)}
        except OSError:
            addresses = set()
        if name in names or addresses & own:
            nodes.append(node)
    if len(nodes) != 1:
        listed = ", ".join(placement.ranks)
        raise ConfigError(
            f"--launcher none: this machine is {len(nodes)} of the hosts {listed}; say which with --node-rank K, from 0"
        )
    return nodes[0]
