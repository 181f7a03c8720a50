"""The GPUs that a run is planned for, and what a plan assumes of them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from common.errors import ConfigError
from common.gpus import GPUS, Gpu

# Assumptions, printed with every plan.
USABLE = 0.92  # of a GPU's memory: the rest is CUDA's context, NCCL's buffers and fragmentation
MFU = 0.4  # of the peak, reached by the matrix products, recomputed ones included
LINK_EFFICIENCY = 0.8  # of a link's data sheet bandwidth
HOP_S = 5e-6  # from one rank to the next


@dataclass(frozen=True)
class Cluster:
    """The GPUs that a run is planned for; None takes the data sheet's figure.

    Raises:
        ConfigError: an unknown GPU, or numbers that no cluster has.
    """

    gpu: str = "h100-80gb"
    gpus: int = 8
    per_node: int = 8
    network_bytes_s: float | None = None  # between nodes, per GPU and direction
    mfu: float = MFU  # share of the peak FLOP/s that matrix products reach
    watts: float | None = None  # drawn by each GPU
    node_bytes_s: float | None = None  # inside a node, per GPU and direction
    host_bytes: float | None = None  # memory of each host

    def __post_init__(self) -> None:
        if self.gpu not in GPUS:
            raise ConfigError(f"--gpu {self.gpu}: expected one of {', '.join(GPUS)}")
        if self.gpus < 1 or self.per_node < 1:
            raise ConfigError(f"--gpus {self.gpus} --gpus-per-node {self.per_node}: expected 1 or more of both")
        if not self.could_be(self.gpus):
            below = self.gpus // self.per_node * self.per_node
            raise ConfigError(
                f"--gpus {self.gpus}: expected whole nodes of {self.per_node}, such as {below} or "
                f"{below + self.per_node}; or give another --gpus-per-node"
            )
        if not 0 < self.mfu <= 1:
            raise ConfigError(f"--mfu {self.mfu}: expected a fraction of the peak, above 0 and at most 1")
        given = {
            "--link": self.network_bytes_s, "--node-link": self.node_bytes_s, "--watts": self.watts,
            "--host-memory": self.host_bytes,
        }  # fmt: skip
        for name, value in given.items():
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(f"{name}: expected a number above 0")

    @property
    def hardware(self) -> Gpu:
        """The GPU's data sheet, with what was given instead of its figures."""
        sheet = GPUS[self.gpu]
        return replace(
            sheet,
            link_bytes_s=self.node_bytes_s or sheet.link_bytes_s,
            network_bytes_s=self.network_bytes_s or sheet.network_bytes_s,
            watts=self.watts or sheet.watts,
        )

    def could_be(self, gpus: int) -> bool:
        """Whether so many GPUs are a part of one node or whole nodes."""
        return gpus <= self.per_node or gpus % self.per_node == 0

    @property
    def ranks_per_node(self) -> int:
        """Ranks on each node: of a part of one node, all there are."""
        return min(self.per_node, self.gpus)

    @property
    def usable_bytes(self) -> int:
        """Bytes of one GPU's memory that a run may fill: USABLE of it."""
        return int(self.hardware.memory * USABLE)

    @property
    def usable_host_bytes(self) -> int:
        """Bytes of one host's memory that a run may fill: USABLE of it."""
        return int((self.host_bytes or self.per_node * self.hardware.host_bytes) * USABLE)
