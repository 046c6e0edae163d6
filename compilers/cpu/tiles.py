"""The ways in which a convolution's work can be cut, and an estimate of what each costs. No TVM here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil

from .convspec import ConvSpec

# Bytes that stay near a core: the first level holds a chunk's tiles, the second the weights that every chunk reads.
_L1_BYTES, _L2_BYTES = 32 << 10, 1 << 20
# Cycles to move 64 bytes to or from the second level, the third level and memory, as measured on one core.
_L2_CYCLES, _L3_CYCLES, _MEMORY_CYCLES = 0.5, 1.0, 5.0
_L3_BYTES = 16 << 20


@dataclass(frozen=True)
class Tile:
    """The outputs that are accumulated in registers at once: rows x columns x blocks of lanes."""

    oh: int
    ow: int
    blocks: int

    @property
    def accumulators(self) -> int:
        """Vector registers that the tile needs."""
        return self.oh * self.ow * self.blocks


@dataclass(frozen=True)
class WinogradTile:
    """Winograd's form: m x m outputs a tile; `chunk` tiles at once, of which `tiles` x `blocks` sums in registers."""

    m: int
    chunk: int
    tiles: int
    blocks: int

    @property
    def accumulators(self) -> int:
        """Vector registers that the sums need."""
        return self.tiles * self.blocks


Choice = Tile | WinogradTile


def choices(spec: ConvSpec, registers: int, model_bytes: int = 0) -> list[Choice]:
    """Every way to compute a convolution that may be the fastest, by estimated cycles, the fewest first.

    Args:
        spec: The convolution.
        registers: Vector registers of the CPU.
        model_bytes: The weights of the whole model. Between two uses of one layer's weights all others are read, so
            that they come from the level of cache that holds them all.
    """
    found: dict[Choice, float] = {tile: direct_cycles(spec, tile, model_bytes) for tile in _direct(spec, registers)}
    if winograd_applies(spec):
        found |= {tile: winograd_cycles(spec, tile, model_bytes) for tile in _winograd(spec, registers)}
    return sorted(found, key=lambda tile: found[tile])


def row_tile(rows: int, blocks: int, registers: int, int8: bool, threads: int = 1) -> tuple[int, int]:
    """(rows, blocks) of the register tile of a matrix product with the least estimated cycles, tails included."""

    def cycles(tile: tuple[int, int]) -> float:
        total = 0.0
        for extent_rows, count_rows in ((tile[0], rows // tile[0]), (rows % tile[0], 1)):
            for extent_blocks, count_blocks in ((tile[1], blocks // tile[1]), (blocks % tile[1], 1)):
                if extent_rows and extent_blocks:
                    total += ceil(count_rows * count_blocks / threads) * _step_cycles(extent_rows, extent_blocks, int8)
        return total

    tiles = [
        (r, b)
        for b in range(1, min(blocks, 8) + 1)
        for r in range(1, min(rows, registers) + 1)
        if r * b + b + 1 <= registers or (r, b) == (1, 1)
    ]
    return min(tiles, key=cycles)


def winograd_applies(spec: ConvSpec) -> bool:
    """Whether the convolution is one of 3x3, stride 1, no dilation, float32, on whole blocks."""
    return (
        (spec.kernel, spec.stride, spec.dilation) == ((3, 3), (1, 1), (1, 1))
        and not (spec.depthwise or spec.int8)
        and spec.in_lanes == spec.lanes
    )


def direct_cycles(spec: ConvSpec, tile: Tile, model_bytes: int = 0) -> float:
    """Estimated cycles of the direct form, by counting what one step of the reduction issues.

    A step multiplies `oh * ow` broadcast inputs with `blocks` weight vectors. Two loads or about one vector
    multiply-accumulate can start in a cycle, and a chain of fewer than about eight independent accumulators waits for
    the multiplier's latency. Outputs that a tile computes beyond the edge are lost work.
    """
    tiles = spec.n * ceil(spec.out_blocks / tile.blocks) * ceil(spec.oh / tile.oh) * ceil(spec.ow / tile.ow)
    depth = 1 if spec.depthwise else spec.group_blocks * spec.reduce_lanes / (4 if spec.int8 else 1)
    # A depthwise step loads its inputs as whole vectors; a dense one broadcasts them.
    cycles = _step_cycles(tile.oh * tile.ow, tile.blocks, spec.int8)
    if spec.int8 and tile.accumulators > 20:
        cycles *= 1.1  # the compiler spills the byte broadcasts beyond this (measured: 28x1 is slower than 14x1)
    weights = spec.out_blocks * spec.kernel[0] * spec.kernel[1] * depth * spec.lanes * 4
    return _with_weights(tiles * depth * spec.kernel[0] * spec.kernel[1] * cycles, weights, model_bytes)


def winograd_cycles(spec: ConvSpec, tile: WinogradTile, model_bytes: int = 0) -> float:
    """Estimated cycles of Winograd's form: the products, the two transforms, and what the caches cannot hold."""
    products = (tile.m + 2) ** 2
    count = spec.n * ceil(spec.oh / tile.m) * ceil(spec.ow / tile.m)
    chunks = ceil(count / tile.chunk)
    vector = 4 * spec.lanes
    steps = chunks * ceil(tile.chunk / tile.tiles) * products * ceil(spec.out_blocks / tile.blocks)
    total = steps * spec.group_blocks * spec.lanes * _step_cycles(tile.tiles, tile.blocks, False)
    # Vector instructions of B'dB and A'[...]A, with their loads and stores, as counted in the assembly.
    forward, backward = (300, 220) if tile.m == 4 else (90, 70)
    total += chunks * tile.chunk * (spec.in_blocks * forward + spec.out_blocks * backward)
    between = products * tile.chunk * (spec.in_blocks + spec.out_blocks) * vector
    weights = products * spec.out_blocks * spec.group_blocks * spec.lanes * vector
    # What lies between the stages is written and read once a chunk.
    total += chunks * 2 * between / 64 * _line_cycles(between)
    if weights + between > _L2_BYTES:  # every further chunk reads them again
        total += (chunks - 1) * weights / 64 * _line_cycles(weights + between)
    # The other layers' weights grow too where they take this form.
    return _with_weights(total, weights, model_bytes * products / 9)


def _with_weights(cycles: float, weights: float, model_bytes: float) -> float:
    """The cycles with the first reading of the weights, most of which passes while the products are computed."""
    reading = weights / 64 * _line_cycles(max(weights, model_bytes))
    return max(cycles, reading) + 0.3 * min(cycles, reading)


def _line_cycles(size: float) -> float:
    """Cycles to move 64 bytes of a working set of that size."""
    if size <= _L1_BYTES:
        return 0.25
    return _L2_CYCLES if size <= _L2_BYTES else _L3_CYCLES if size <= _L3_BYTES else _MEMORY_CYCLES


def _step_cycles(inputs: int, blocks: int, int8: bool) -> float:
    """Estimated cycles to multiply so many broadcast inputs with so many weight vectors."""
    loads = (inputs + blocks) / 2
    return max(inputs * blocks, 8.0 if int8 else 10.0, loads) + 0.1 * loads


def _direct(spec: ConvSpec, registers: int) -> Iterator[Tile]:
    group_out = spec.out_blocks if spec.depthwise else spec.out_blocks // spec.groups
    for blocks in (1,) if spec.depthwise else (1, 2, 3, 4):
        if group_out % blocks:
            continue
        for ow in range(1, min(spec.ow, 28) + 1):
            for oh in (1, 2, 4, 7, 8):
                tile = Tile(oh, ow, blocks)
                # A weight vector for each block and one broadcast input stay in registers beside the accumulators.
                fits = tile.accumulators + blocks + 1 <= registers
                if (fits and oh <= spec.oh and (oh == 1 or ow == spec.ow)) or tile.accumulators == 1:
                    yield tile


def _winograd(spec: ConvSpec, registers: int) -> Iterator[WinogradTile]:
    for m in (2, 4):
        count = spec.n * ceil(spec.oh / m) * ceil(spec.ow / m)
        for blocks in (1, 2, 3, 4):
            if (spec.out_blocks // spec.groups) % blocks:
                continue
            for tiles in range(1, (registers - 1 - blocks) // blocks + 1):
                if tiles > count or (tiles * blocks < 8 and tiles < count):
                    continue
                for times in (1, 2, 3, 4, 5, 7, 8, 14):
                    if (times - 1) * tiles < count:
                        yield WinogradTile(m, times * tiles, tiles, blocks)
