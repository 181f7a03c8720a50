"""What GPUs can do at most, from their makers' data sheets, for who measures and who plans. Plain numbers: no torch, no
GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

# Dense bf16 peak of one GPU in FLOP/s, from NVIDIA's data sheets, by a part of the device's name. The first match
# counts, so a longer name stands before one that it holds.
PEAK_FLOPS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "A10G": 70e12,
    "A10": 125e12,
    "V100": 125e12,
}
GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """Figures of one GPU from its maker's data sheet, and the network of the maker's reference system.

    `link_bytes_s` and `network_bytes_s` count one direction: half of the bidirectional figure that is advertised.
    """

    memory: int  # bytes
    bf16_flops: float  # FLOP/s, dense
    float32_flops: float  # FLOP/s, without tensor cores, as torch's default is
    memory_bytes_s: float
    link_bytes_s: float  # to the GPUs of its node
    network_bytes_s: float  # to other nodes, its share of the node's adapters
    watts: float  # most that the board draws
    has_bf16: bool = True


# NVIDIA's data sheets of H100 and H200 (SXM5), A100 (SXM4), L40S and V100 (SXM2), for memory, FLOP/s, bandwidths and
# board power. Networks: a 400 Gb/s adapter per GPU in DGX H100 and H200, 200 Gb/s in DGX A100, four of 100 Gb/s for the
# eight V100s of DGX-1. L40S has PCIe 4.0 x16 and no NVLink, and no reference system: 200 Gb/s per GPU is a choice.
GPUS = {
    "h100-80gb": Gpu(80 * GIB, PEAK_FLOPS["H100"], 67e12, 3.35e12, 450e9, 50e9, 700),
    "h200-141gb": Gpu(141 * GIB, PEAK_FLOPS["H200"], 67e12, 4.8e12, 450e9, 50e9, 700),
    "a100-80gb": Gpu(80 * GIB, PEAK_FLOPS["A100"], 19.5e12, 2.039e12, 300e9, 25e9, 400),
    "a100-40gb": Gpu(40 * GIB, PEAK_FLOPS["A100"], 19.5e12, 1.555e12, 300e9, 25e9, 400),
    "l40s": Gpu(48 * GIB, PEAK_FLOPS["L40S"], 91.6e12, 0.864e12, 32e9, 25e9, 350),
    "v100-32gb": Gpu(32 * GIB, PEAK_FLOPS["V100"], 15.7e12, 0.9e12, 150e9, 6.25e9, 300, has_bf16=False),
}
