"""Why ranks did not meet: what a rank that waited in vain can find out of it, and what to do."""

from __future__ import annotations

import socket
from collections.abc import Mapping

TRY_S = 3.0  # for a connection to the meeting point, where it would take a few thousandths
REMEDY = (
    "Open all TCP ports between the hosts: --master-port (MASTER_PORT) is the first one, gloo and NCCL choose others. "
    "If another network is open, name its interface in GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME, and its addresses in "
    "the hostfile"
)


def why_apart(environment: Mapping[str, str], host: str, waited_s: float) -> tuple[str, str]:
    """The kind of a `Failure`, and why: `error` where this host cannot reach the meeting point, else `stuck`."""
    address, port = environment.get("MASTER_ADDR", ""), environment.get("MASTER_PORT", "")
    point = f"{address}:{port}"
    try:
        socket.create_connection((address, int(port)), TRY_S).close()
    except ConnectionRefusedError:
        return "stuck", f"nobody listens at {point}, where the ranks meet: rank 0 has ended, or has not begun"
    except (OSError, ValueError) as error:
        return "error", (
            f"{host} cannot reach {point}, where the ranks meet, in {waited_s:.0f} s (timeouts.rendezvous_s; {error}): "
            f"a firewall? {REMEDY}"
        )
    return "stuck", (
        f"the ranks did not all meet at {point} within {waited_s:.0f} s (timeouts.rendezvous_s), though {host} reaches "
        f"it: a rank that is slow to start, or a firewall between other ports. {REMEDY}"
    )
