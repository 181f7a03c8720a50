"""What GPUs can do at most, from their makers' data sheets, for who measures and who plans. Plain numbers: no torch, no
GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

# Dense bf16 peak of one GPU in FLOP/s, from its maker's data sheet, by a part of the device's name. The first match
# counts, so a longer name stands before one that it holds.
PEAK_FLOPS = {
    "GB200": 2500e12,
    "B200": 2250e12,
    "MI300X": 1307.4e12,
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
    """Figures of one GPU from its maker's data sheet, and its share of the maker's reference system.

    Links count one direction: half of the bidirectional figure that is advertised.
    """

    memory: int  # bytes
    bf16_flops: float  # FLOP/s, dense
    float32_flops: float  # FLOP/s, without tensor cores, as torch's default is
    memory_bytes_s: float
    link_bytes_s: float  # to the GPUs of its node
    network_bytes_s: float  # to other nodes, its share of the node's adapters
    watts: float  # most that the board draws
    host_link_bytes_s: float  # to its host's memory
    host_bytes: int  # its share of the host's memory
    host_memory_bytes_s: float  # and of that memory's bandwidth
    has_bf16: bool = True


# Data sheets: NVIDIA's of HGX B200, H100 and H200 (SXM5), A100 (SXM4), L40S and V100 (SXM2), AMD's of Instinct MI300X
# (OAM; dense, 7 Infinity Fabric links of 64 GB/s each way), for memory, FLOP/s, bandwidths and board power. Networks: a
# 400 Gb/s adapter per GPU in DGX B200, H100 and H200 and AMD's platform, 200 Gb/s in DGX A100, four of 100 Gb/s for the
# eight V100s of DGX-1. L40S has PCIe 4.0 x16 and no NVLink, and no reference system: 200 Gb/s per GPU is a choice.
# Hosts: PCIe x16 of the GPU's generation; memory and its channels of the DGX of that name, shared by eight (2 TB, 16
# channels of DDR5-4800; 1 TB, 16 of DDR4-3200; 512 GB, 8 of DDR4-2133), for others those of the time.
DDR5, DDR4, DGX1 = (64e9, 256 * GIB, 76e9), (32e9, 128 * GIB, 51e9), (16e9, 64 * GIB, 17e9)
GPUS = {
    "h100-80gb": Gpu(80 * GIB, PEAK_FLOPS["H100"], 67e12, 3.35e12, 450e9, 50e9, 700, *DDR5),
    "h200-141gb": Gpu(141 * GIB, PEAK_FLOPS["H200"], 67e12, 4.8e12, 450e9, 50e9, 700, *DDR5),
    "b200-180gb": Gpu(180 * 10**9, PEAK_FLOPS["B200"], 75e12, 8e12, 900e9, 50e9, 1000, *DDR5),
    "mi300x-192gb": Gpu(192 * 10**9, PEAK_FLOPS["MI300X"], 163.4e12, 5.3e12, 448e9, 50e9, 750, *DDR5),
    "a100-80gb": Gpu(80 * GIB, PEAK_FLOPS["A100"], 19.5e12, 2.039e12, 300e9, 25e9, 400, *DDR4),
    "a100-40gb": Gpu(40 * GIB, PEAK_FLOPS["A100"], 19.5e12, 1.555e12, 300e9, 25e9, 400, *DDR4),
    "l40s": Gpu(48 * GIB, PEAK_FLOPS["L40S"], 91.6e12, 0.864e12, 32e9, 25e9, 350, *DDR4),
    "v100-32gb": Gpu(32 * GIB, PEAK_FLOPS["V100"], 15.7e12, 0.9e12, 150e9, 6.25e9, 300, *DGX1, has_bf16=False),
}
