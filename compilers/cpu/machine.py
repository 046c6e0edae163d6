"""What the kernels and their cost estimates need to know of a CPU. No TVM here, so tests and models can use it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class Dot:
    """How a CPU multiplies and sums bytes, or bfloat16: so many neighbouring inputs of each 32-bit lane in one step.

    Attributes:
        depth: Inputs that one step sums in each lane.
        data: Type of the activations that it reads: `uint8` as stored, `int8` less 128, `int16` less the zero point;
            `uint16` are the bits of bfloat16.
        sums: Vector steps that the CPU starts in a cycle (VPMADDWD: as measured, its additions take multiplier ports).
        apart: The sums are added by an instruction of their own, so that no step waits for the multiplier.
        together: Steps whose sums of pairs are added in 16 bits before they are widened.
    """

    name: str
    depth: int
    data: str
    sums: float
    apart: bool = False
    together: int = 1

    @property
    def floats(self) -> bool:
        """Whether it multiplies bfloat16."""
        return self.data == "uint16"

    @property
    def sums_type(self) -> str:
        """The type of a lane."""
        return "float32" if self.floats else "int32"

    @property
    def data_bytes(self) -> int:
        """Of an activation."""
        return 1 if self.data in ("uint8", "int8") else 2

    @property
    def weight_bytes(self) -> int:
        """Of a weight."""
        return 2 if self.floats else 1

    def remainder(self, zero_point: int) -> int:
        """What the zero point still is in the data that are multiplied."""
        return {"uint8": zero_point, "int8": zero_point - 128, "int16": 0}[self.data]


# x86's VPDPBUSD and Arm's SDOT take four bytes a lane, VPDPWSSD and VPMADDWD pairs of 16 bits; anything else multiplies
# 16 bits by 16 bits. VPMADDUBSW, for pairs of bytes, saturates at 16 bits: it is exact for small weights only
# (`Machine.dot_for`).
DOTS = {
    "vnni": Dot("vnni", 4, "uint8", 1),
    "sdot": Dot("sdot", 4, "int8", 2),
    "words": Dot("words", 2, "int16", 1),
    "madd": Dot("madd", 2, "int16", 1.3, apart=True),
    "widen": Dot("widen", 1, "int16", 1, apart=True),
    "bytes": Dot("bytes", 4, "uint8", 0.8, apart=True),
    # VDPBF16PS; and where there is none, four instructions that make float32 of two pairs, and two that multiply them.
    "bfloat16": Dot("bfloat16", 2, "uint16", 1),
    "halves": Dot("halves", 2, "uint16", 0.5, apart=True),
}
# What a sum of two products of bytes with weights may reach, and how many steps are added before they are widened.
_WORD = 2**15 - 1
_TOGETHER = (8, 4, 2, 1)
# Vector instructions that start in a cycle where every second or third multiplies (measured on Zen 3).
_STARTED = 2.4


# Which instructions need which feature of a device, for how many lanes of int32; the fastest first.
_NEEDED = (
    ("vnni", 16, "avx512_vnni"),
    ("vnni", 8, "avx_vnni"),
    ("sdot", 4, "asimddp"),
    ("madd", 16, "avx512f"),
    ("madd", 8, "avx2"),
    ("madd", 4, "avx2"),
)


def usable_dots(features: Collection[str], lanes: int) -> list[Dot]:
    """The ways to multiply bytes of a CPU with these features, of a `Device`, on vectors of so many int32."""
    found = [DOTS[name] for name, width, feature in _NEEDED if width == lanes and feature in features]
    return [*found, DOTS["widen"]]


@dataclass(frozen=True)
class Machine:
    """A CPU: float32 lanes and number of its vector registers, how it multiplies bytes, threads, and rates.

    Attributes:
        fmas: Vector multiply-accumulates of float32 that start in a cycle, each ready after `latency` cycles.
        caches: Bytes of the three levels of cache.
        line_cycles: Cycles to read 64 bytes from the second level, the third and memory, one after the other.
        bfloat16: It has an instruction that multiplies and sums pairs of bfloat16.
        tiles: How convolutions are computed that were measured, both as written by `repr`.
    """

    lanes: int
    registers: int
    dot: Dot = DOTS["widen"]
    threads: int = 1
    fmas: float = 1
    latency: int = 5
    caches: tuple[int, int, int] = (32 << 10, 1 << 20, 16 << 20)
    line_cycles: tuple[float, float, float] = (0.5, 1.0, 5.0)
    bfloat16: bool = False
    # Not part of a kernel's key: a choice is in it anyway.
    tiles: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)

    @property
    def pairs(self) -> Dot:
        """How it multiplies 16 bits: two products a lane where it can."""
        return DOTS["words"] if self.dot.name == "vnni" else DOTS["madd" if self.dot.name == "madd" else "widen"]

    @property
    def halves(self) -> Dot:
        """How it multiplies bfloat16."""
        return DOTS["bfloat16" if self.bfloat16 else "halves"]

    def dot_for(self, pair: int) -> Dot:
        """How it multiplies bytes by weights of which no two neighbours have a larger sum of magnitudes than `pair`."""
        if self.dot.name != "madd" or 255 * pair > _WORD:
            return self.dot
        steps = next(steps for steps in _TOGETHER if 255 * max(pair, 1) * steps <= _WORD)
        return replace(DOTS["bytes"], together=steps, sums=_STARTED * steps / (2 * steps + 1))

    def macs_per_cycle(self, dot: Dot | None) -> float:
        """Multiply-accumulates in a cycle when nothing is waited for: of float32, or of what `dot` takes."""
        return self.lanes * (dot.depth * dot.sums if dot else self.fmas)

    def line(self, size: float) -> float:
        """Cycles to move 64 bytes of a working set of that size."""
        if size <= self.caches[0]:
            return 0.25
        level = 0 if size <= self.caches[1] else 1 if size <= self.caches[2] else 2
        return self.line_cycles[level]

    def step(self, inputs: int, blocks: int, dot: Dot | None = None) -> float:
        """Estimated cycles to multiply so many broadcast inputs with so many weight vectors, in one step of a sum.

        Two loads can start in a cycle. A chain of too few independent sums waits for the multiplier's latency; where
        the multiplication is an instruction of its own, only the addition's single cycle is waited for.
        """
        loads, sums = (inputs + blocks) / 2, dot.sums if dot else self.fmas
        waits = 1.0 if dot and dot.apart else float(self.latency) * (0.8 if dot else 1)
        return max(inputs * blocks / sums, 2 * waits if self.fmas == 1 else waits, loads) + 0.1 * loads
