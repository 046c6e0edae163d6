"""What multiplies bytes on this CPU, and the weights for which that is exact."""

from __future__ import annotations

from planish.compilers.cpu.machine import DOTS, Dot, Machine, usable_dots
from planish.hwmodels.device import host

# With the lanes of int32 that it takes.
ANY = [(dot, lanes) for lanes in (4, 8, 16) for dot in usable_dots(host().features, lanes)]
# VPMADDUBSW too, for pairs of weights whose products are added once, twice, four and eight times in 16 bits.
PAIRS = (128, 64, 32, 14)
SMALL = [(Machine(lanes, 16, dot).dot_for(pair), lanes) for dot, lanes in ANY if dot.name == "madd" for pair in PAIRS]
# AVX-512's VPDPBUSD of 256 bits is the one of CPUs without AVX-512.
NARROW = [(DOTS["vnni"], 8)] if "avx512_vnni" in host().features and "avx_vnni" not in host().features else []
HERE = [*ANY, *NARROW, *SMALL]


def largest_weight(dot: Dot) -> int:
    """The largest magnitude of weights with which 255 may be multiplied."""
    return 2**15 // 255 // dot.together // 2 if dot.name == "bytes" else 128
