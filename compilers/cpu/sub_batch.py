"""How many images of a batch go through the first layers at once, so that what lies between layers stays in the caches.

All images at once read every weight once, and write and read each layer's result in memory where the caches cannot hold
the whole batch. A few at a time keep the results near and read the weights again. No TVM here.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from .machine import Machine

# Cycles of a call that is made again for the next images (measured: 0.4 us).
_CALL = 1200
# What kernels read and write takes so many times the cycles of reading lines one after the other (measured on Zen 3).
_UNORDERED = 2
# The estimate must promise so much, since nothing is measured.
_GAIN = 0.08
# Every part is a sequence of calls of its own.
_PARTS = 16


@dataclass(frozen=True)
class Layer:
    """What one step of a model moves: bytes of its inputs and its result for one image, bytes of weights; and MACs."""

    moved: int
    weights: int
    macs: int


@dataclass(frozen=True)
class SubBatch:
    """Layers 0 to `last` take `images` at a time, all others the whole batch."""

    last: int
    images: int


def sub_batch(layers: Sequence[Layer], cuts: Collection[int], batch: int, machine: Machine) -> SubBatch | None:
    """The split of a batch with the least estimated cycles; None where the whole batch at once is nearly as good.

    Args:
        layers: In order.
        cuts: The layers after which a split may end.
        batch: Images.
        machine: The CPU.
    """
    sizes = [
        s for s in range(machine.threads, batch) if batch % s == 0 and batch // s <= _PARTS and s % machine.threads == 0
    ]
    whole = [batch * layer.moved / 64 * _line(batch * layer.moved, machine) * _UNORDERED for layer in layers]
    arithmetic = batch * sum(layer.macs for layer in layers) / machine.macs_per_cycle(None) / machine.threads
    best, least = None, (1 - _GAIN) * (arithmetic + sum(whole)) - arithmetic
    for images in sizes:
        near = weights = most = 0.0
        for last, layer in enumerate(layers):
            own = images * layer.moved
            near += batch * layer.moved / 64 * _line(own, machine) * _UNORDERED
            weights, most = weights + layer.weights, max(most, own)
            if last not in cuts:
                continue
            again = batch // images - 1
            reading = again * weights / 64 * _line(weights + most, machine) * _UNORDERED
            cycles = near + reading + again * (last + 1) * _CALL + sum(whole[last + 1 :])
            if cycles < least:
                best, least = SubBatch(last, images), cycles
    return best


def _line(size: float, machine: Machine) -> float:
    """Cycles to move 64 bytes of a set of that size beyond what the second level takes: what it holds stays there."""
    if size <= machine.caches[1]:
        return 0.0
    second, third, memory = machine.line_cycles
    held = machine.caches[1] / size
    far = max(0.0, 1 - machine.caches[2] / size)
    return (1 - held - far) * (third - second) + far * (memory - second)
