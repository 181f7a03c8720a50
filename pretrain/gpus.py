"""What GPUs can do at most, for who measures and who plans. Plain numbers: neither torch nor a GPU is needed."""

from __future__ import annotations

# Dense bf16 peak of one GPU in FLOP/s, from NVIDIA's data sheets, by a part of the device's name; the first match
# counts.
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
