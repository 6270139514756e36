"""Accelerators by name: peak rates and memory, as their makers state them; and what hours are wanted for."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Hardware:
    """One device. Rates are of dense matrix products, in 10^12 operations a second."""

    name: str
    tflops_16: float  # in bfloat16, accumulated in float32
    tflops_32: float  # in float32; PyTorch does not use TF32 unless told to
    memory_gb: float | None  # in 10^9 bytes; a device has some per cent more, which its context and fragmentation take

    def tflops(self, dtype: torch.dtype) -> float:
        return self.tflops_16 if dtype.itemsize == 2 else self.tflops_32


# NVIDIA's data sheets of A100 SXM, H100 SXM, H200 SXM, L40S (where these state rates with sparsity, half of that) and
# the white papers of the GA102 (RTX 3090) and Ada (RTX 4090) architectures.
KNOWN = (
    Hardware("rtx3090", 71.0, 35.6, 24),
    Hardware("rtx4090", 165.2, 82.6, 24),
    Hardware("l40s", 362.0, 91.6, 48),
    Hardware("a100-40gb", 312.0, 19.5, 40),
    Hardware("a100-80gb", 312.0, 19.5, 80),
    Hardware("h100", 989.0, 67.0, 80),
    Hardware("h200", 989.0, 67.0, 141),
)
DEFAULT_MFU = 0.3
"""Large trainings have reached 21 to 46 % (arXiv:2204.02311, table 3). Small models keep a GPU less busy."""


@dataclass(frozen=True)
class Target:
    """What hours are wanted for.

    Args:
        hardware: Device to state hours for: rtx3090, rtx4090, l40s, a100-40gb, a100-80gb, h100, h200; all of these if
            none is given.
        peak_tflops: Peak rate of another device at trainer.precision, in 10^12 operations a second.
        memory_gb: Its memory, in 10^9 bytes.
        mfu: Share of the peak rate that is reached. Recomputation counts as work.

    Raises:
        ValueError: an unknown name, a number out of range, or two statements of the hardware.
    """

    hardware: str | None = None
    peak_tflops: float | None = None
    memory_gb: float | None = None
    mfu: float = DEFAULT_MFU

    def __post_init__(self) -> None:
        names = [hardware.name for hardware in KNOWN]
        if self.hardware not in (None, *names):
            raise ValueError(
                f"hardware '{self.hardware}' is not known; choose from {', '.join(names)}, or give its peak_tflops"
            )
        if self.hardware is not None and self.peak_tflops is not None:
            raise ValueError("give one of hardware and peak_tflops")
        if self.memory_gb is not None and self.peak_tflops is None:
            raise ValueError("memory_gb is that of a device with peak_tflops; give both")
        for name, value in (("peak_tflops", self.peak_tflops), ("memory_gb", self.memory_gb)):
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} must be positive, got {value}")
        if not 0 < self.mfu <= 1:
            raise ValueError(f"mfu must be above 0 and at most 1, got {self.mfu}")

    def devices(self) -> list[Hardware]:
        if self.peak_tflops is not None:
            return [Hardware("as stated", self.peak_tflops, self.peak_tflops, self.memory_gb)]
        return [hardware for hardware in KNOWN if self.hardware in (None, hardware.name)]
