"""The ways in which a convolution's work can be cut, and an estimate of what each costs. No TVM here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import ceil

from .convspec import ConvSpec
from .machine import Dot, Machine


@dataclass(frozen=True)
class Tile:
    """The direct form: the outputs that are summed in registers at once, rows x columns x blocks of lanes.

    Attributes:
        depth: Blocks of input channels that are summed before the next tile; 0 is all of them.
        strip: Rows of output, or pixels of a flat convolution, whose input is kept near; 0 is the whole image.
        split_blocks: Threads share the output channels of a strip, not the strips.
    """

    oh: int
    ow: int
    blocks: int
    depth: int = 0
    strip: int = 0
    split_blocks: bool = False

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

# Below so many multiply-accumulates a kernel stays on one thread, whatever the estimate says.
PARALLEL_MACS = 1_000_000
_LINE_BYTES = 64
# Cycles to give work to the pool's threads and to wait for them, and to read a line that another core has written
# (measured on AVX2, two cores: 1 us for threads that wait for it, and Winograd's stages took 3 to 8 us longer each
# shared so than whole chunks; that waiting is not always so short, and data move between the cores, is added).
_LAUNCH, _OTHER_CORE = 8000.0, 70.0
# Of lines of Winograd's weights (measured on AVX2: of 24 layers the tiles so chosen took 0.9 % longer than the best of
# each, in the geometric mean, and 3.6 % where only what the second level cannot hold was charged).
_READ_AGAIN = 1.5
# Of a matrix product (measured: on two threads the dense layers of ViT-Tiny, batch 8, took 4 % longer so).
_TORN_LINES = 1.02


def chosen(spec: ConvSpec, machine: Machine, model_weights: int = 0, largest_sum: int = 0) -> tuple[ConvSpec, Choice]:
    """The convolution on one of the machine's threads or on all, and how it is computed there: the fewest cycles.

    Args are those of `choices`.
    """
    best: tuple[float, ConvSpec, Choice] | None = None
    for threads in sorted({1, machine.threads if spec.macs >= PARALLEL_MACS else 1}):
        own = replace(spec, threads=threads)
        ranked = _by_cycles(own, machine, model_weights, largest_sum)
        tile, cycles = ranked[0]
        if best is None or cycles < best[0]:
            # What was measured is taken where it is a way to compute this.
            measured = machine.tiles.get(repr(own))
            best = cycles, own, next((other for other, _ in ranked if repr(other) == measured), tile)
    assert best is not None
    return best[1:]


def choices(spec: ConvSpec, machine: Machine, model_weights: int = 0, largest_sum: int = 0) -> list[Choice]:
    """Every way to compute a convolution that may be the fastest, by estimated cycles, the fewest first.

    Args:
        spec: The convolution.
        machine: The CPU.
        model_weights: The number of the whole model's weights. Between two uses of one layer's weights all others are
            read, so that they come from the level of cache that holds them all.
        largest_sum: The largest sum that an int8 convolution's weights permit, as `largest_sum` of its weights gives
            it; 0 where it is not known.
    """
    return [tile for tile, _ in _by_cycles(spec, machine, model_weights, largest_sum)]


def _by_cycles(spec: ConvSpec, machine: Machine, model_weights: int, largest_sum: int) -> list[tuple[Choice, float]]:
    found: dict[Choice, float] = {}
    for tile in _direct(spec, machine):
        cycles = direct_cycles(spec, tile, machine, model_weights)
        # A padded or quantised copy is shared too, before.
        launches = 1 + (spec.dot is not None or any(spec.padding))
        found[tile] = cycles if spec.threads == 1 else cycles / spec.threads + launches * _LAUNCH
    for m in winograd_sizes(spec, largest_sum):
        for form in _winograd(spec, machine, m):
            cycles = winograd_cycles(spec, form, machine, model_weights)
            found[form] = cycles if spec.threads == 1 else _winograd_shared(spec, form, cycles)
    return sorted(found.items(), key=lambda item: item[1])


def _winograd_shared(spec: ConvSpec, tile: WinogradTile, cycles: float) -> float:
    """The cycles on several threads: whole chunks each, or the stages of every chunk where there are few."""
    threads, launches = spec.threads, int(spec.int8)
    chunks = ceil(spec.n * ceil(spec.oh / tile.m) * ceil(spec.ow / tile.m) / tile.chunk)
    if whole_chunks(chunks, threads):
        return cycles * ceil(chunks / threads) / chunks + (launches + 1) * _LAUNCH
    # Between two stages most of what a thread reads was written by another.
    between = (
        (tile.m + 2) ** 2 * tile.chunk * spec.lanes * (spec.in_blocks * (2 if spec.int8 else 4) + spec.out_blocks * 4)
    )
    other = chunks * between / 64 * (1 - 1 / threads) * _OTHER_CORE / threads
    return cycles / threads + (launches + 3 * chunks) * _LAUNCH + other


def whole_chunks(chunks: int, threads: int) -> bool:
    """Whether threads take whole chunks of Winograd's tiles, and do not share the stages of each."""
    return chunks >= 2 * threads


def row_tile(rows: int, blocks: int, machine: Machine, dot: Dot | None = None) -> tuple[int, int]:
    """(rows, blocks) of the register tile of a matrix product with the least estimated cycles."""

    def cycles(tile: tuple[int, int]) -> float:
        tiles = ceil(ceil(rows / tile[0]) * ceil(blocks / tile[1]) / machine.threads)
        # Where the outputs of a row are no whole lines of the cache, a line is written by two tiles, far apart in time.
        torn = tile[1] * machine.lanes * 4 % _LINE_BYTES > 0 and tile[1] < blocks
        return tiles * machine.step(*tile, dot) * (_TORN_LINES if torn else 1.0)

    tiles = [
        (r, b)
        for b in range(1, min(blocks, 8) + 1)
        for r in range(1, min(rows, machine.registers) + 1)
        if fits(r, b, machine, dot) or (r, b) == (1, 1)
    ]
    return min(tiles, key=cycles)


def fits(inputs: int, blocks: int, machine: Machine, dot: Dot | None) -> bool:
    """Whether the sums stay in registers beside a weight vector for each block and one broadcast input.

    Where the multiplication is an instruction of its own its result needs a register too, and with 16 registers LLVM
    spills where none is to spare (measured: of float32 4 x 3 sums ran at 60 % of the peak and 6 x 2 at 93 %; of bytes
    6 x 2 took 1.6 times as long as 5 x 2, and 10 x 1 twice).
    """
    if machine.registers < 32 and inputs > 8:
        return False
    spare = 1 + (machine.registers < 32) + (dot is not None and dot.apart)
    return inputs * blocks + blocks + spare <= machine.registers


def winograd_sizes(spec: ConvSpec, largest_sum: int = 0) -> tuple[int, ...]:
    """The sizes m of Winograd's F(m x m, 3x3) that may compute it: 3x3, stride 1, no dilation, on whole blocks.

    In integers both are exact (see `winograd`): F(2x2) as long as 4 times a sum, F(4x4) as long as 64 times a sum,
    fits in 32 bits.
    """
    if (spec.kernel, spec.stride, spec.dilation) != ((3, 3), (1, 1), (1, 1)) or spec.depthwise:
        return ()
    if spec.in_lanes != spec.lanes:
        return ()
    if spec.dot is None:
        return (2, 4)
    if spec.dot.floats:  # its transformed inputs would be float32, which is multiplied at half the rate
        return ()
    return tuple(m for m, factor in ((2, 4), (4, 64)) if 0 < largest_sum < 2**31 // factor)


def direct_cycles(spec: ConvSpec, tile: Tile, machine: Machine, model_weights: int = 0) -> float:
    """Estimated cycles of the direct form, by counting what one step of the reduction issues.

    A step multiplies `oh * ow` broadcast inputs with `blocks` weight vectors.
    """
    dot = spec.dot
    oh, ow = (1, spec.oh * spec.ow) if spec.flat else (spec.oh, spec.ow)
    depth = 1 if spec.depthwise else spec.group_blocks * spec.reduce_lanes // (dot.depth if dot else 1)
    taps = spec.taps[0] * spec.taps[1]
    # The last tile of a row, column or group computes some outputs once more.
    tiles = ceil(oh / tile.oh) * ceil(ow / tile.ow) * ceil(spec.out_blocks // spec.groups / tile.blocks)
    step = machine.step(tile.oh * tile.ow, tile.blocks, dot)
    # About a dozen instructions begin and end a sum.
    total = spec.n * spec.groups * tiles * (depth * taps * step + 12)
    if dot and dot.depth == 4 and tile.accumulators > 20:
        total *= 1.1  # the compiler spills the byte broadcasts beyond this (measured: 28x1 is slower than 14x1)
    vector = 4 * spec.lanes
    outputs = spec.n * spec.out_blocks * oh * ow
    size = spec.weight_bytes
    panel = tile.blocks * spec.lanes * depth * (dot.depth if dot else 1) * taps * size
    chunks = ceil(spec.group_blocks / tile.depth) if tile.depth else 1
    if chunks > 1:  # sums are stored and read again
        total += 2 * outputs * (chunks - 1)
    elif panel > machine.caches[0] * 3 // 4:  # every tile reads the panel from the second level again
        total += 0.25 * outputs / tile.accumulators * panel / 64 * machine.line(panel)
    inputs = spec.n * spec.in_blocks * spec.h * spec.w * (vector // 2 if dot else vector)
    if any(spec.padding) or dot or spec.in_lanes != spec.lanes:
        total += 2 * inputs / 32
    weights = spec.out_blocks * spec.lanes * depth * (dot.depth if dot else 1) * taps * size
    strips = ceil((ow if spec.flat else oh) / tile.strip) if tile.strip else 1
    near = inputs / spec.n / strips
    total += 0.3 * ceil(spec.out_blocks / tile.blocks) * inputs / 64 * machine.line(near)
    total += 0.3 * (strips * spec.n - 1) * weights / 64 * machine.line(weights)
    return _with_weights(total, weights, model_weights * size, machine)


def winograd_cycles(spec: ConvSpec, tile: WinogradTile, machine: Machine, model_weights: int = 0) -> float:
    """Estimated cycles of Winograd's form: the products, the two transforms, and what the caches cannot hold."""
    products = (tile.m + 2) ** 2
    count = spec.n * ceil(spec.oh / tile.m) * ceil(spec.ow / tile.m)
    chunks = ceil(count / tile.chunk)
    pairs = machine.pairs if spec.int8 else None
    depth = pairs.depth if pairs else 1
    size = 2 if pairs else 4
    vector = 4 * spec.lanes
    steps = chunks * ceil(tile.chunk / tile.tiles) * products * ceil(spec.out_blocks / tile.blocks)
    total = steps * (spec.group_blocks * spec.lanes / depth * machine.step(tile.tiles, tile.blocks, pairs) + 8)
    # Vector instructions of B'dB and A'[...]A, with their loads and stores, as counted in the assembly.
    forward, backward = (300.0, 220.0) if tile.m == 4 else (90.0, 70.0)
    if pairs:
        forward, backward = (0.7 * forward, 1.3 * backward)
    # Whole numbers are added twice a cycle where vectors of float32 are multiplied once (measured on AVX-512, Zen 4).
    rate = max(machine.fmas, 2) if pairs else machine.fmas
    total += chunks * tile.chunk * (spec.in_blocks * forward + spec.out_blocks * backward) / rate
    between = products * tile.chunk * (spec.in_blocks * vector * size // 4 + spec.out_blocks * vector)
    weights = products * spec.out_blocks * spec.group_blocks * spec.lanes * spec.lanes * size
    # What lies between the stages is written and read once a chunk.
    total += chunks * 2 * between / 64 * machine.line(between)
    if weights + between > machine.caches[0]:  # every further chunk reads them again
        total += _READ_AGAIN * (chunks - 1) * weights / 64 * machine.line(weights + between)
    # The other layers' weights grow too where they take this form.
    return _with_weights(total, weights, model_weights * products / 9 * size, machine)


def _with_weights(cycles: float, weights: float, model_bytes: float, machine: Machine) -> float:
    """The cycles with the first reading of the weights, most of which passes while the products are computed."""
    reading = weights / 64 * machine.line(max(weights, model_bytes))
    return max(cycles, reading) + 0.3 * min(cycles, reading)


def _direct(spec: ConvSpec, machine: Machine) -> Iterator[Tile]:
    group_out = 1 if spec.depthwise else spec.out_blocks // spec.groups
    oh_all, ow_all = (1, spec.oh * spec.ow) if spec.flat else (spec.oh, spec.ow)
    size = spec.weight_bytes
    row = spec.taps[0] * spec.taps[1] * spec.reduce_lanes * spec.lanes * size
    strip = 0 if spec.depthwise else _strip(spec, machine)
    split = _split_blocks(spec, machine)
    for blocks in range(1, min(group_out, 4) + 1):
        # A panel that the second level does not hold is read from the third for every tile; one that it holds costs
        # little, as measured, and cutting the sum costs as much.
        room = machine.caches[1] // 2
        depth = 0 if spec.depthwise or row * blocks * spec.group_blocks <= room else max(1, room // 4 // (row * blocks))
        for ow in range(1, min(ow_all, 28) + 1):
            for oh in (1, 2, 3, 4, 7, 8):
                whole = oh <= oh_all and (oh == 1 or ow == ow_all)
                if whole and (fits(oh * ow, blocks, machine, spec.dot) or oh * ow * blocks == 1):
                    yield Tile(oh, ow, blocks, depth, strip, split)


def _strip(spec: ConvSpec, machine: Machine) -> int:
    """Rows or pixels whose input fills half of the second level of cache; 0 where all do not fill it."""
    pixel = spec.in_blocks * spec.in_lanes * (spec.dot.data_bytes if spec.dot else 4)
    room = machine.caches[1] // 2
    if spec.flat:
        count = room // pixel
        return 0 if count >= spec.oh * spec.ow else max(count, 16)
    rows = room // (pixel * (spec.w + spec.padding[1] + spec.padding[3])) - spec.dilation[0] * (spec.kernel[0] - 1)
    count = rows // spec.stride[0]
    return 0 if count >= spec.oh else max(count, 4)


def _split_blocks(spec: ConvSpec, machine: Machine) -> bool:
    """Whether threads share the output channels: where weights are more than data, or rows too few to share well."""
    if spec.threads == 1 or spec.n >= spec.threads:
        return False
    weights = spec.o * spec.c // spec.groups * spec.kernel[0] * spec.kernel[1]
    return weights > 2 * spec.c * spec.h * spec.w and spec.out_blocks // spec.groups >= 4 * spec.threads


def _winograd(spec: ConvSpec, machine: Machine, m: int) -> Iterator[WinogradTile]:
    dot = machine.pairs if spec.int8 else None
    count = spec.n * ceil(spec.oh / m) * ceil(spec.ow / m)
    for blocks in (1, 2, 3, 4):
        if (spec.out_blocks // spec.groups) % blocks:
            continue
        for tiles in range(1, machine.registers):
            if not fits(tiles, blocks, machine, dot):
                break
            if tiles > count or (tiles * blocks < 8 and tiles < count):
                continue
            for times in (1, 2, 3, 4, 5, 7, 8, 14):
                if (times - 1) * tiles < count:
                    yield WinogradTile(m, times * tiles, tiles, blocks)


def plain_form(
    c: int, kernel: tuple[int, int], dilation: tuple[int, int], machine: Machine, channels: int, columns: int
) -> tuple[Dot, int]:
    """How bytes of few channels are multiplied: the instruction, and `in_lanes` of a `ConvSpec`.

    Args:
        c: Channels.
        kernel: Rows and columns.
        dilation: Likewise.
        machine: The CPU.
        channels: The largest sum of magnitudes of two weights, as `largest_pair` gives it, of neighbouring channels.
        columns: Likewise of neighbouring columns.
    """
    dot = machine.dot_for(channels)
    if dilation[1] != 1:
        return dot, dot.depth
    other = machine.dot_for(columns)
    in_rows = _rate(other, kernel[1], machine) > _rate(dot, c, machine)
    return (other, 1) if in_rows else (dot, dot.depth)


def plain_lanes(c: int, kernel: tuple[int, int], dilation: tuple[int, int], dot: Dot, machine: Machine) -> int:
    """`in_lanes` of a convolution of few channels that `dot` multiplies, as in `plain_form`."""
    in_rows = dilation[1] == 1 and _rate(dot, kernel[1], machine) > _rate(dot, c, machine)
    return 1 if in_rows else dot.depth


def _rate(dot: Dot, extent: int, machine: Machine) -> float:
    """Multiply-accumulates in a cycle that count, where so many channels or columns are filled up to whole steps."""
    return machine.macs_per_cycle(dot) * extent / (ceil(extent / dot.depth) * dot.depth)
