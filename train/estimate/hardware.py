"""Accelerators by name: peak rates and memory, as their makers state them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Hardware:
    """One device.

    Attributes:
        name: as `--hardware` calls it.
        tflops_16: peak of dense matrix products in bfloat16, accumulated in float32, in 10^12 operations a second.
        tflops_32: peak in float32; PyTorch does not use TF32 unless told to.
        memory_gb: in 10^9 bytes. (A device has some per cent more, about what its context and fragmentation take.)
            `None` where it is not known.
    """

    name: str
    tflops_16: float
    tflops_32: float
    memory_gb: float | None


# NVIDIA's data sheets of A100 SXM, H100 SXM, H200 SXM, L40S (where these state rates with sparsity, half of that) and
# the white papers of the GA102 (RTX 3090) and Ada (RTX 4090) architectures.
KNOWN = {
    hardware.name: hardware
    for hardware in (
        Hardware("rtx3090", 71.0, 35.6, 24),
        Hardware("rtx4090", 165.2, 82.6, 24),
        Hardware("l40s", 362.0, 91.6, 48),
        Hardware("a100-40gb", 312.0, 19.5, 40),
        Hardware("a100-80gb", 312.0, 19.5, 80),
        Hardware("h100", 989.0, 67.0, 80),
        Hardware("h200", 989.0, 67.0, 141),
    )
}
HERE = "here"
"""In place of a name: this machine, measured."""


__all__ = ["HERE", "KNOWN", "Hardware"]
