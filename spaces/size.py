"""What a compressed model stores and computes: exact counts."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from .cluster import SharedConv2d, SharedLinear, SharedWeight, index_bits
from .quantize import Quantized

SCALE_BYTES = 4  # float32
ZERO_POINT_BYTES = 1


def stored_bytes(module: nn.Module) -> int:
    """The bytes that the module's weights and constants take in storage, rounded up for every tensor.

    A quantised layer stores its weights in its bits, a scale for every output channel, and the scale and zero point of
    its input; a shared weight stores its codebook in float32 and packed indices. A layer that is both stores whichever
    is smaller, since either gives the same integers. Everything else (biases, batch norms) is stored as it is; what
    only training needs (batch counters, clips, the momentum of ranges) is not stored, and a tensor that two modules
    hold is stored once.
    """
    total = 0
    counted: set[int] = set()
    covered: set[nn.Module] = set()
    for layer in module.modules():
        if layer in covered:
            continue
        if isinstance(layer, Quantized):
            covered.update(layer.inner.modules())
            total += _quantized_bytes(layer, counted)
        elif isinstance(layer, SharedWeight):
            total += _shared_bytes(layer)
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


def _quantized_bytes(layer: Quantized, counted: set[int]) -> int:
    inner = layer.inner
    constants = len(layer.clip) * SCALE_BYTES + SCALE_BYTES + ZERO_POINT_BYTES
    if inner.bias is not None:
        constants += _plain_bytes(inner.bias, counted)
    if isinstance(inner, SharedConv2d | SharedLinear):
        return constants + min(_shared_bytes(inner.shared), _packed(inner.shared.indices.numel(), layer.bits))
    return constants + _packed(inner.weight.numel(), layer.bits)


def _shared_bytes(shared: SharedWeight) -> int:
    entries = len(shared.codebook)
    return entries * 4 + _packed(shared.indices.numel(), index_bits(entries))


def _packed(values: int, bits: int) -> int:
    return (values * bits + 7) // 8


def _plain_bytes(tensor: Tensor, counted: set[int]) -> int:
    if id(tensor) in counted:
        return 0
    counted.add(id(tensor))
    return tensor.numel() * tensor.element_size()
