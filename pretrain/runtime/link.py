"""`deepspeed --module pretrain.runtime.link`: how fast the ranks reduce together. Rank 0 prints one JSON object,
marked.

What is timed is what training does: all-reduces over the interface and by the library that a run would use.
"""

from __future__ import annotations

import os
import socket
import sys
import time

from common import command
from common.strict_json import to_json
from common.variables import LINK_MARK

SMALL, LARGE = 2, 2**22  # float32 values: latency, bandwidth
REPEATS = 5
MEET_S = 30.0  # for the ranks to find each other


def main() -> int:
    """Times the all-reduces on this rank; exit code 1, and the reason printed, if the ranks do not meet."""
    with command.importing():
        import torch

        from pretrain.runtime import ranks as process

    try:
        ranks = process.start_command(MEET_S)
        seconds = {}
        for count in (SMALL, LARGE):
            x = torch.ones(count, device=ranks.device)
            ranks.sum(x)
            took = []
            for _ in range(REPEATS):
                ranks.barrier()
                began = time.perf_counter()
                ranks.sum(x)
                if ranks.device.type == "cuda":
                    torch.cuda.synchronize()
                took.append(time.perf_counter() - began)
            seconds[count] = min(took)
    except RuntimeError as error:
        problem = {"host": socket.gethostname(), "error": str(error).strip().splitlines()[0]}
        print(LINK_MARK + to_json(problem), flush=True)
        os._exit(1)
    if ranks.first:
        # A ring moves 2 (N - 1) / N of the bytes over each link.
        moved = 2 * (ranks.world - 1) / ranks.world * 4 * LARGE
        name = os.environ.get("NCCL_SOCKET_IFNAME" if ranks.device.type == "cuda" else "GLOO_SOCKET_IFNAME")
        speed = {"latency_s": seconds[SMALL], "bytes_per_s": moved / seconds[LARGE], "interface": name}
        print(LINK_MARK + to_json(speed), flush=True)
    process.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
