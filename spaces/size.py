"""What a compressed model stores and computes: exact counts."""

from __future__ import annotations

from heapq import heapify, heappop, heappush

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from .bfloat16 import Bfloat16
from .cluster import SharedConv2d, SharedLinear, SharedWeight, index_bits
from .quantize import Quantized
from .weight_only import WeightQuantized

SCALE_BYTES = 4  # float32
ZERO_POINT_BYTES = 1


def stored_bytes(module: nn.Module) -> int:
    """The bytes that the module's weights and constants take in storage, rounded up for every tensor.

    A quantised layer stores its weights in its bits, a scale for every output channel, and the scale and zero point of
    its input where that is quantised too, a layer of bfloat16 two bytes a weight; a shared weight stores its codebook
    in float32 and packed indices. A layer that is both stores whichever is smaller, since either gives the same
    numbers. Everything else (biases, batch norms) is stored as it is; what only training needs (batch counters, clips,
    the momentum of ranges) is not stored, and a tensor that two modules hold is stored once.
    """
    return _total(module, coded=False)


def entropy_coded_bytes(module: nn.Module) -> int:
    """Bytes that the module takes when whole weights and indices are coded by how often each occurs.

    Huffman's code (Huffman 1952; on top of weight sharing Han, Mao and Dally 2016), one for every tensor, canonical: a
    byte for the length of every symbol between the least and the greatest that occur, and one for each of these two. A
    tensor that it does not make smaller is stored packed, and everything else, as `stored_bytes` counts it.
    """
    return _total(module, coded=True)


def _total(module: nn.Module, coded: bool) -> int:
    total = 0
    counted: set[int] = set()
    covered: set[nn.Module] = set()
    for layer in module.modules():
        if layer in covered:
            continue
        if isinstance(layer, Quantized | WeightQuantized):
            covered.update(layer.inner.modules())
            total += _quantized_bytes(layer, counted, coded)
        elif isinstance(layer, Bfloat16):
            covered.update(layer.inner.modules())
            total += _bfloat16_bytes(layer, counted, coded)
        elif isinstance(layer, SharedWeight):
            total += _shared_bytes(layer, coded)
        else:
            for name, tensor in [*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)]:
                if name != "num_batches_tracked":
                    total += _plain_bytes(tensor, counted)
    return total


def count_macs(module: nn.Module, example: Tensor) -> int:
    """Multiply-accumulates of one forward pass over `example` (n, ...), integer operators included."""
    counter = FlopCounterMode(display=False)
    modes = [(layer, layer.training) for layer in module.modules()]
    fast = torch.backends.mha.get_fastpath_enabled()
    module.eval()
    try:
        # Fused attention kernels are not counted, the plain products that they stand for are.
        torch.backends.mha.set_fastpath_enabled(False)
        with counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            module(example)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for layer, training in modes:
            layer.training = training
    return counter.get_total_flops() // 2


def _quantized_bytes(layer: Quantized | WeightQuantized, counted: set[int], coded: bool) -> int:
    inner = layer.inner
    constants = len(layer.clip) * SCALE_BYTES
    if isinstance(layer, Quantized):
        constants += SCALE_BYTES + ZERO_POINT_BYTES
    if inner.bias is not None:
        constants += _plain_bytes(inner.bias, counted)
    shared = inner.shared if isinstance(inner, SharedConv2d | SharedLinear) else None
    own = _packed((inner.weight if shared is None else shared.indices).numel(), layer.bits)
    if coded:
        own = min(own, huffman_bytes(layer.integer().weight))
    return constants + (own if shared is None else min(_shared_bytes(shared, coded), own))


def _bfloat16_bytes(layer: Bfloat16, counted: set[int], coded: bool) -> int:
    inner = layer.inner
    bias = 0 if inner.bias is None else _plain_bytes(inner.bias, counted)
    if isinstance(inner, SharedConv2d | SharedLinear):
        return bias + min(_shared_bytes(inner.shared, coded), 2 * inner.shared.indices.numel())
    return bias + 2 * inner.weight.numel()


def _shared_bytes(shared: SharedWeight, coded: bool) -> int:
    entries = len(shared.codebook)
    own = _packed(shared.indices.numel(), index_bits(entries))
    return entries * 4 + (min(own, huffman_bytes(shared.indices)) if coded else own)


def huffman_bytes(symbols: Tensor) -> int:
    """The bytes of whole numbers in Huffman's code, its table included (see `entropy_coded_bytes`)."""
    low, high = int(symbols.min()), int(symbols.max())
    heap = [int(count) for count in torch.unique(symbols, return_counts=True)[1]]
    heapify(heap)
    bits = symbols.numel() if len(heap) == 1 else 0  # a single symbol has a code of one bit
    while len(heap) > 1:
        # Everything below a node gets a bit longer when it is made, so the sum of all nodes is the length.
        node = heappop(heap) + heappop(heap)
        bits += node
        heappush(heap, node)
    return (bits + 7) // 8 + high - low + 1 + 2


def _packed(values: int, bits: int) -> int:
    return (values * bits + 7) // 8


def _plain_bytes(tensor: Tensor, counted: set[int]) -> int:
    if id(tensor) in counted:
        return 0
    counted.add(id(tensor))
    return tensor.numel() * tensor.element_size()
