"""Modelled energy of one inference: what the arithmetic takes and what moving operands takes.

Rounded figures of 45 nm at 0.9 V from M. Horowitz, "Computing's energy problem (and what we can do about it)", ISSCC
2014: a multiplication of 8 bits 0.2 pJ, of 16-bit floats 1.1 pJ and of float32 3.7 pJ, an addition of 32-bit integers
0.1 pJ and of float32 0.9 pJ, 64 bits from a cache of 1 MB 100 pJ, 64 bits from DRAM 1.3 to 2.6 nJ (2 here). A later
process takes less of everything; ratios between candidates move little. Nothing here was measured on the device.
"""

from __future__ import annotations

from collections.abc import Sequence

from .workload import Workload

# Joules of a multiply-accumulate, by the widest operands that the arithmetic takes.
MAC_J = {8: 0.3e-12, 16: 2.0e-12, 32: 4.6e-12}
CACHE_BYTE_J = 100e-12 / 8
DRAM_BYTE_J = 2e-9 / 8
# Weights of a model that fit here stay in a last-level cache between two inferences.
CACHE_BYTES = 8 << 20


def energy_j(workloads: Sequence[Workload]) -> float:
    """Joules of one inference that makes these calls.

    Every operand moves once through a cache of a megabyte; the weights come from DRAM where all of them together do not
    fit `CACHE_BYTES`.
    """
    weights = sum(work.weight_bytes for work in workloads)
    weight_byte = CACHE_BYTE_J if weights <= CACHE_BYTES else DRAM_BYTE_J
    return sum(
        work.macs * MAC_J[min(bits for bits in MAC_J if work.bits <= bits)]
        + (work.moved_bytes - work.weight_bytes) * CACHE_BYTE_J
        + work.weight_bytes * weight_byte
        for work in workloads
    )
