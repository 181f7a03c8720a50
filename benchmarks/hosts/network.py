"""N hosts on one machine: each a network, process, mount and host-name namespace with an address and an sshd of its
own, joined by a bridge that lives in one more namespace.

    with Hosts(2, tmp_path) as hosts:
        hosts[0].call("ssh", *hosts.ssh, "node2", "hostname")
        hosts[1].cut()

The hosts share the file system, but what one mounts the others do not see. A host's processes are those of its process
namespace, so that they end with its first one, and namespaces, interfaces and mounts with them; nothing is left in this
machine's own network or in /etc, even if the tests are killed.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

START_S = 60.0
TOOLS = ("ip", "sshd", "ssh", "ssh-keygen", "pdsh", "unshare", "nsenter", "setpriv")
SSHD = """
Port 22
ListenAddress 0.0.0.0
HostKey {folder}/key
AuthorizedKeysFile {folder}/key.pub
PidFile none
StrictModes no
UsePAM no
PasswordAuthentication no
PermitRootLogin prohibit-password
MaxStartups 100
"""
# The first process of a host: it waits for its interface, then only for the processes that lose their parent.
INIT = """
set -e
hostname {name}
mount --bind {folder}/hosts /etc/hosts
mount -t tmpfs none /run
mkdir /run/sshd
ip link set lo up
until ip link show eth0 >/dev/null 2>&1; do sleep 0.02; done
ip address add {address}/24 dev eth0
ip link set eth0 up
{sshd} -f {folder}/sshd_config
while :; do sleep 3600 & wait; done
"""


def why_not() -> str | None:
    """Why hosts cannot be made here; None if they can."""
    if os.geteuid():
        return "network namespaces need root"
    path = _path()
    missing = [tool for tool in TOOLS if shutil.which(tool, path=path) is None]
    if missing:
        return f"missing: {', '.join(missing)} (Debian: iproute2, openssh-server, pdsh, util-linux)"
    tried = subprocess.run(["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "true"], capture_output=True)
    return None if tried.returncode == 0 else f"no namespaces here: {tried.stderr.decode().strip()}"


def _path() -> str:
    return os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])


class Host:
    """One host; `call` and `start` run commands on it."""

    def __init__(self, name: str, address: str, init: subprocess.Popen[bytes], pid: int, environment: dict[str, str]):
        self.name, self.address = name, address
        self.environment = environment
        self._init, self._pid = init, pid

    def words(self, *words: str) -> list[str]:
        """The command that runs `words` on this host."""
        return ["nsenter", "--target", str(self._pid), "--net", "--uts", "--mount", "--pid", *_here(), *words]

    def popen(
        self, words: Sequence[str], environment: Mapping[str, str] | None = None, **options: Any
    ) -> subprocess.Popen:
        """`subprocess.Popen` of a command on this host, `environment` beside its own."""
        return subprocess.Popen(self.words(*words), env={**self.environment, **(environment or {})}, **options)

    def start(self, *words: str, **options: Any) -> subprocess.Popen:
        """`popen` with the words one by one."""
        return self.popen(words, **options)

    def call(
        self, *words: str, environment: Mapping[str, str] | None = None, timeout: float = 240, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        """`subprocess.run` of a command on this host, and what it said."""
        return subprocess.run(
            self.words(*words),
            env={**self.environment, **(environment or {})},
            capture_output=True,
            text=True,
            timeout=timeout,
            **options,
        )

    def cut(self) -> None:
        """Takes the host's cable out: nothing is told to anybody."""
        subprocess.run(
            ["nsenter", "--target", str(self._pid), "--net", "ip", "link", "set", "eth0", "down"], check=True
        )

    def hide(self, path: Path, content: Path) -> None:
        """Has this host see `content` where the others see `path`; both files, or both folders."""
        subprocess.run(self.words("mount", "--bind", str(content), str(path)), check=True)

    def running(self, text: str) -> list[int]:
        """Process ids, as this machine counts them, of the host's processes with `text` in their command line."""
        found = []
        space = os.readlink(f"/proc/{self._pid}/ns/pid")
        for entry in Path("/proc").iterdir():
            with suppress(OSError):
                if entry.name.isdecimal() and os.readlink(entry / "ns" / "pid") == space:
                    words = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                    if text in words:
                        found.append(int(entry.name))
        return sorted(found)

    def off(self) -> None:
        """Ends every process of the host at once, like a power cut."""
        with suppress(ProcessLookupError):
            os.kill(self._pid, signal.SIGKILL)
        self._init.wait()


def _here() -> list[str]:
    return ["env", "-C", os.getcwd()]


class Hosts:
    """The hosts node1, node2 and so on, at 10.77.0.1, 10.77.0.2 and so on; they end with the `with`."""

    def __init__(self, count: int, folder: Path) -> None:
        self.folder = folder / "network"
        self.names = [f"node{k}" for k in range(1, count + 1)]
        options = ["StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null", "LogLevel=ERROR", "IdentitiesOnly=yes"]
        self.ssh = ["-F", "none", "-i", str(self.folder / "key"), *(word for o in options for word in ("-o", o))]
        self._inits: list[subprocess.Popen[bytes]] = []
        self._hosts: list[Host] = []

    def __getitem__(self, index: int) -> Host:
        return self._hosts[index]

    def __iter__(self) -> Any:
        return iter(self._hosts)

    def hostfile(self, slots: int = 1) -> Path:
        """Of all hosts, with so many ranks on each."""
        path = self.folder / f"hostfile-{slots}"
        path.write_text("".join(f"{name} slots={slots}\n" for name in self.names))
        return path

    def __enter__(self) -> Hosts:
        try:
            self._make()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._remove()

    def _make(self) -> None:
        self.folder.mkdir(parents=True)
        keygen = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / "key")]
        subprocess.run(keygen, check=True)
        addresses = {name: f"10.77.0.{k}" for k, name in enumerate(self.names, start=1)}
        listed = "".join(f"{address} {name}\n" for name, address in addresses.items())
        (self.folder / "hosts").write_text("127.0.0.1 localhost\n" + listed)
        (self.folder / "sshd_config").write_text(SSHD.format(folder=self.folder))
        environment = {
            **os.environ,
            "PATH": _path(),
            "CUDA_VISIBLE_DEVICES": "",
            "PDSH_SSH_ARGS_APPEND": shlex.join(self.ssh),
        }
        _, hub = self._space("while :; do sleep 3600 & wait; done")
        _ip(hub, "link", "add", "bridge", "type", "bridge")
        _ip(hub, "link", "set", "bridge", "up")
        sshd = shutil.which("sshd", path=_path())
        for k, (name, address) in enumerate(addresses.items(), start=1):
            script = INIT.format(name=name, address=address, folder=self.folder, sshd=sshd)
            init, pid = self._space(script)
            _ip(hub, "link", "add", f"port{k}", "type", "veth", "peer", "name", "eth0", "netns", str(pid))
            _ip(hub, "link", "set", f"port{k}", "master", "bridge", "up")
            self._hosts.append(Host(name, address, init, pid, environment))
        for host in self._hosts:
            self._wait_for(host)

    def _space(self, script: str) -> tuple[subprocess.Popen[bytes], int]:
        """Namespaces with a first process that runs `script`: the process that made them, and the first one's id."""
        made = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", "unshare", "--net", "--uts", "--mount", "--pid", "--fork"]
            + ["--kill-child=KILL", "--mount-proc", "sh", "-c", script],
            env={**os.environ, "PATH": _path()},
            stdin=subprocess.DEVNULL,
        )
        self._inits.append(made)
        children = Path(f"/proc/{made.pid}/task/{made.pid}/children")
        deadline = time.monotonic() + START_S
        while True:
            pids = children.read_text().split() if made.poll() is None else []
            ready = pids and os.readlink(f"/proc/{pids[0]}/ns/net") != os.readlink("/proc/self/ns/net")
            if ready:
                return made, int(pids[0])
            assert made.poll() is None and time.monotonic() < deadline, "no namespace came up"
            time.sleep(0.01)

    def _wait_for(self, host: Host) -> None:
        deadline = time.monotonic() + START_S
        while True:
            tried = self._hosts[0].call("ssh", *self.ssh, "-o", "ConnectTimeout=2", host.name, "hostname")
            if tried.returncode == 0:
                assert tried.stdout.strip() == host.name
                return
            assert time.monotonic() < deadline, f"{host.name} does not answer: {tried.stderr}"
            time.sleep(0.1)

    def _remove(self) -> None:
        for host in self._hosts:
            host.off()
        for made in self._inits:
            made.kill()  # its first process with it
            made.wait()


def _ip(hub: int, *words: str) -> None:
    subprocess.run(["nsenter", "--target", str(hub), "--net", "ip", *words], check=True, env={"PATH": _path()})
