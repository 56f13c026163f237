"""What known accelerators have. For an unknown one, and for CPUs, no MFU is shown."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class Accelerator:
    """One device as torch counts them (half of an MI250X), as its maker states it."""

    name: str
    bf16_tflops: float  # the dense peak
    memory_gb: int
    memory_tb_s: float
    source: str
    gemm_tflops: float | None = None  # what the maker itself measures in bf16 products
    gemm_source: str = ""

    @property
    def kind(self) -> str:
        """The kind of device in trainer/config/memory.py: rocm or cuda."""
        return "rocm" if self.source.startswith("AMD") else "cuda"


_MAF: Final = "AMD ROCm blog, Measuring Max-Achievable FLOPs - Part 2 (2025-02-28)"

# Dense figures (NVIDIA's tables print twice that, "with sparsity").
# The first whose name is part of the driver's name for the device is taken.
# fmt: off
ACCELERATORS: Final = (
    Accelerator("MI355X", 2500.0, 288, 8.0, "AMD Instinct MI355X data sheet"),
    Accelerator("MI350X", 2300.0, 288, 8.0, "AMD Instinct MI350X data sheet"),
    Accelerator("MI325X", 1307.4, 256, 6.0, "AMD Instinct MI325X data sheet", 843.0, _MAF),
    Accelerator("MI300X", 1307.4, 192, 5.3, "AMD Instinct MI300X data sheet", 708.0, _MAF),
    Accelerator("MI250X", 191.5, 64, 1.6, "AMD Instinct MI250X data sheet"),
    Accelerator("MI210", 181.0, 64, 1.6, "AMD Instinct MI210 data sheet"),
    Accelerator("B200", 2250.0, 180, 8.0, "NVIDIA DGX B200 data sheet"),
    Accelerator("GH200", 989.4, 96, 4.0, "NVIDIA GH200 data sheet"),
    Accelerator("H200", 989.4, 141, 4.8, "NVIDIA H200 data sheet"),
    Accelerator("H100 PCIe", 756.0, 80, 2.0, "NVIDIA H100 data sheet"),
    Accelerator("H100 NVL", 835.0, 94, 3.9, "NVIDIA H100 NVL data sheet"),
    Accelerator("H100", 989.4, 80, 3.35, "NVIDIA H100 data sheet"),
    Accelerator("A100", 312.0, 80, 2.039, "NVIDIA A100 80GB data sheet"),
    Accelerator("L40S", 362.0, 48, 0.864, "NVIDIA L40S data sheet"),
    Accelerator("L4", 121.0, 24, 0.3, "NVIDIA L4 data sheet"),
    Accelerator("RTX 4090", 165.2, 24, 1.008, "NVIDIA Ada GPU architecture white paper"),
    Accelerator("RTX 3090", 71.0, 24, 0.936, "NVIDIA Ampere GA102 architecture white paper"),
)
# fmt: on


def find_accelerator(name: str) -> Accelerator | None:
    """The entry for a driver's or a person's name of a device (`mi300x`), None if unknown."""
    for accelerator in ACCELERATORS:
        if re.search(rf"(?<![A-Z0-9]){accelerator.name}(?![0-9])", name, re.IGNORECASE):
            return accelerator
    return None
