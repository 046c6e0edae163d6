"""Statistics of the inputs of layers: what the closed forms (pruning, rank, blocks, ranges) are fitted to."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from .trace import TracedModel

BATCH = 64
ROWS = 16384  # positions of one batch that enter a covariance: enough for thousands of channels, and cheap


@dataclass(frozen=True, eq=False)
class Moments:
    """Mean (c,) and covariance (c, c) of a layer's input channels, and how alike neighbouring pixels are.

    `taps` (kh, kw) is the correlation of a pixel with the one that a kernel's tap reads, averaged over channels; it is
    1 in the centre, and (1, 1) for a layer without a kernel.
    """

    mean: Tensor
    covariance: Tensor
    taps: Tensor

    def select(self, channels: Tensor) -> Moments:
        """The same statistics of some of the channels, int64 (k,)."""
        return Moments(self.mean[channels], self.covariance[channels][:, channels], self.taps)

    def ridge(self) -> Tensor:
        """The covariance made safely invertible: a thousandth of the mean variance is added to every variance."""
        size = len(self.covariance)
        level = 1e-3 * self.covariance.diagonal().mean().clamp_min(1e-12)
        return self.covariance + level * torch.eye(size, dtype=self.covariance.dtype)


_cache: WeakKeyDictionary[TracedModel, tuple[str, Mapping[str, Moments]]] = WeakKeyDictionary()


def layer_moments(traced: TracedModel, names: Mapping[str, int], inputs: Tensor) -> Mapping[str, Moments]:
    """Moments of every named layer's input when the traced model runs on `inputs`, shape (n, ...).

    The last result of a traced model is kept, because a search asks for the same one at every candidate.

    Args:
        names: The layers (convolutions or linear), and for each how many input features make one channel (1, or the
            number of pixels for a linear layer that follows a flatten).
    """
    digest = hashlib.sha256(repr(sorted(names.items())).encode())
    digest.update(inputs.detach().contiguous().numpy().tobytes())
    known = _cache.get(traced)
    if known is None or known[0] != digest.hexdigest():
        known = (digest.hexdigest(), _measure(traced.module, names, inputs))
        _cache[traced] = known
    return known[1]


def restate_batch_norms(module: nn.Module, inputs: Tensor) -> None:
    """Replaces the statistics of every batch norm by those of `inputs`, shape (n, ...), in place.

    The statistics are averaged over batches with equal weights. The momentum and the mode of every module stay.
    """
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    if not norms or len(inputs) < 2:
        return
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.training = True
    try:
        run(module, inputs)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
            norm.training = False


def run(module: nn.Module, inputs: Tensor) -> None:
    """Runs the module on all inputs in batches of nearly equal size, without gradients, for what its hooks see."""
    with torch.no_grad():
        for batch in inputs.chunk(max(1, -(-len(inputs) // BATCH))):
            module(batch)


@contextmanager
def watching(module: nn.Module, names: Iterable[str], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Calls `see(name, input)` whenever a named submodule runs; the hooks are gone afterwards."""

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, inputs: see(name, inputs[0].detach())

    handles = [module.get_submodule(name).register_forward_pre_hook(hook(name)) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _measure(module: nn.Module, names: Mapping[str, int], inputs: Tensor) -> Mapping[str, Moments]:
    sums: dict[str, list[Tensor]] = {}

    def see(name: str, value: Tensor) -> None:
        layer = module.get_submodule(name)
        pixels = value if isinstance(layer, nn.Conv2d) else _as_pixels(value, names[name])
        rows = pixels.transpose(0, 1).flatten(1)  # (channels, positions)
        rows = rows[:, :: max(1, rows.shape[1] // ROWS)].double()
        shape = layer.kernel_size if isinstance(layer, nn.Conv2d) else (1, 1)
        dilation = layer.dilation if isinstance(layer, nn.Conv2d) else (1, 1)
        count = torch.tensor(float(rows.shape[1]), dtype=torch.float64)
        new = [count, rows.sum(1), rows @ rows.T, _lagged(pixels, shape, dilation)]
        known = sums.get(name)
        sums[name] = new if known is None else [a + b for a, b in zip(known, new, strict=True)]

    with watching(module, names, see):
        run(module, inputs)
    return {name: _moments(*parts) for name, parts in sums.items()}


def _moments(count: Tensor, total: Tensor, squares: Tensor, lagged: Tensor) -> Moments:
    mean = total / count
    covariance = squares / count - torch.outer(mean, mean)
    centre = lagged[lagged.shape[0] // 2, lagged.shape[1] // 2].clamp_min(1e-12)
    return Moments(mean.float(), covariance.float(), (lagged / centre).float())


def _as_pixels(value: Tensor, features: int) -> Tensor:
    """A linear layer's input (..., c * features) as (rows, c, features)."""
    return value.reshape(-1, value.shape[-1] // features, features)


def _lagged(pixels: Tensor, kernel: tuple[int, ...], dilation: tuple[int, ...]) -> Tensor:
    """Mean products (kh, kw) of every pixel with the pixel that each tap of the kernel reads, channel means removed."""
    if tuple(kernel) == (1, 1) or pixels.ndim != 4:
        return torch.ones(1, 1, dtype=torch.float64)
    centred = pixels - pixels.mean((0, 2, 3), keepdim=True)
    height, width = centred.shape[2:]
    result = torch.zeros(kernel[0], kernel[1], dtype=torch.float64)
    for row in range(kernel[0]):
        for column in range(kernel[1]):
            down, right = abs(row - kernel[0] // 2) * dilation[0], abs(column - kernel[1] // 2) * dilation[1]
            if down < height and right < width:
                first, second = centred[:, :, down:, right:], centred[:, :, : height - down, : width - right]
                result[row, column] = (first * second).double().mean()
    return result
