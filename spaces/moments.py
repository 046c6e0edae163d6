"""Statistics of the inputs of layers: what the closed forms (pruning, rank, blocks, ranges) are fitted to."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from .reads import places, reads_of
from .trace import TracedModel

BATCH = 64  # inputs at once, fewer if they are large
BATCH_VALUES = 2**22  # of the inputs: 27 images of 224 x 224
ROWS = 16384  # positions that enter a covariance, over all batches: enough for a thousand channels, and cheap
_NOTHING = 1e-10  # a variance that is none
PATCH = 1024  # values that a kernel reads at a place, up to which their covariance is taken


@dataclass(frozen=True, eq=False)
class Moments:
    """Mean (c,) and covariance (c, c) of a layer's input channels, and how alike neighbouring pixels are.

    `taps` (kh, kw) is the correlation of a pixel with the one that a kernel's tap reads, averaged over channels; it is
    1 in the centre, and (1, 1) for a layer without a kernel. `patches` is all of that at once, where it is not too
    large: mean (c kh kw,) and covariance (c kh kw, c kh kw) of what a kernel reads at a place, borders included.
    """

    mean: Tensor
    covariance: Tensor
    taps: Tensor
    patches: tuple[Tensor, Tensor] | None = None

    def select(self, channels: Tensor) -> Moments:
        """The same statistics of some of the channels, int64 (k,)."""
        patches = None
        if self.patches is not None:
            mean, covariance = self.patches
            own = taps_of(channels, self.taps.numel())
            patches = mean[own], covariance[own][:, own]
        return Moments(self.mean[channels], self.covariance[channels][:, channels], self.taps, patches)

    def between_taps(self) -> Tensor:
        """How alike the pixels under a kernel's taps are, (kh kw, kh kw), positive definite.

        `taps` tells it of neighbours; what lies further apart is taken for a first-order process of rows and columns.
        """
        return torch.kron(*self.along_taps())

    def along_taps(self) -> tuple[Tensor, Tensor]:
        """The same along the kernel's rows (kh, kh) and columns (kw, kw), of which `between_taps` is the product."""
        rows, columns = (_decay(_beside(self.taps, dim), size) for dim, size in enumerate(self.taps.shape))
        return rows, columns

    def ridge(self) -> Tensor:
        """The covariance made safely invertible: a thousandth of the mean variance is added to every variance."""
        return _ridge(self.covariance)

    def of_reads(self) -> tuple[Tensor, Tensor] | None:
        """`patches`, the covariance made safely invertible in the same way, in float64."""
        return None if self.patches is None else (self.patches[0].double(), _ridge(self.patches[1].double()))


def taps_of(channels: Tensor, taps: int) -> Tensor:
    """The places of channels in what a kernel of so many taps reads, (k taps,)."""
    return (channels[:, None] * taps + torch.arange(taps)).flatten()


def _ridge(covariance: Tensor) -> Tensor:
    level = 1e-3 * covariance.diagonal().mean().clamp_min(1e-12)
    return covariance + level * torch.eye(len(covariance), dtype=covariance.dtype)


def _beside(taps: Tensor, dim: int) -> float:
    """The correlation of a pixel with its neighbours along a dimension of the taps."""
    middle = [size // 2 for size in taps.shape]
    near = [index for index in (middle[dim] - 1, middle[dim] + 1) if 0 <= index < taps.shape[dim]]
    values = [float(taps[index, middle[1]] if dim == 0 else taps[middle[0], index]) for index in near]
    return min(max(sum(values) / len(values), 0.0), 0.98) if values else 0.0


def _decay(correlation: float, size: int) -> Tensor:
    places = torch.arange(size)
    return correlation ** (places[:, None] - places).abs().to(torch.float64)


@dataclass(frozen=True, eq=False)
class Fit:
    """What the inputs of a traced model look like inside it.

    `moments` are those of the inputs of layers; `norms` the means and variances, each (calls, c), of what every batch
    norm reads in each of its calls.
    """

    moments: Mapping[str, Moments]
    norms: Mapping[str, tuple[Tensor, Tensor]]


_cache: WeakKeyDictionary[TracedModel, tuple[str, Fit]] = WeakKeyDictionary()


def fit(traced: TracedModel, names: Mapping[str, int], inputs: Tensor) -> Fit:
    """Runs the traced model on `inputs`, shape (n, ...), and looks.

    The last result of a traced model is kept, because a search asks for the same one at every candidate.

    Args:
        names: The layers (convolutions or linear) whose moments are asked for, and for each how many input features
            make one channel (1, or the number of pixels for a linear layer that follows a flatten).
    """
    digest = digest_of(repr(sorted(names.items())), inputs)
    known = _cache.get(traced)
    if known is None or known[0] != digest:
        module = copy.deepcopy(traced.module)
        known = (digest, Fit(_measure(module, names, inputs), norms_read(module, batches(inputs))))
        _cache[traced] = known
    return known[1]


def digest_of(text: str, inputs: Tensor) -> str:
    """Of a text and a tensor's values."""
    digest = hashlib.sha256(text.encode())
    digest.update(inputs.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()


@dataclass(frozen=True, eq=False)
class NormMemory:
    """A batch norm's statistics (c,) and what it reads in each call (calls, c), both in the original."""

    mean: Tensor
    variance: Tensor
    seen_means: Tensor
    seen_variances: Tensor

    def correct(
        self, norm: nn.modules.batchnorm._BatchNorm, call: int, value: Tensor, least: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """The statistics that treat `value` as the original's treated what it read in this call.

        Args:
            norm: The batch norm.
            call: Which of its calls.
            value: What it reads now.
            least: The least that its variance counts as, relative to that of then.
        """
        mean, variance = channel_statistics(value)
        ratio = ((variance + _NOTHING) / (self.seen_variances[call] + _NOTHING)).clamp_min(least)
        # What it divides by changes by the ratio: `eps` too, which is nearly all of it where a channel hardly varies.
        return self.mean + mean - self.seen_means[call], ((self.variance + norm.eps) * ratio - norm.eps).clamp_min(0)


def correct_batch_norms(
    module: nn.Module, inputs: Tensor, memory: Mapping[str, NormMemory], least: float = 0.0
) -> None:
    """Moves the statistics of every remembered batch norm by what compression changed, in place.

    The mean moves by the difference and the variance by the ratio of what the norm reads now and what it read in the
    original on the same inputs, first layers first, so that each norm sees the others corrected. The inputs are far
    fewer than those that the statistics were trained on, but their sampling error cancels: a module that computes what
    the original computes keeps its statistics.

    What is fitted by least squares varies less than what it is fitted to, by what it cannot tell. A norm makes up for
    that, and makes what is wrong larger with it: `least`, of the original's variance, is where that ends.
    """
    found: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in memory}

    def see(name: str, value: Tensor) -> None:
        norm = module.get_submodule(name)
        assert isinstance(norm, nn.modules.batchnorm._BatchNorm)
        corrected = memory[name].correct(norm, len(found[name]), value, least)
        found[name].append(corrected)
        set_statistics(norm, *corrected)

    with watching(module, memory, see):
        run(module, inputs)
    for name, parts in found.items():
        means, variances = zip(*parts, strict=True)
        set_statistics(module.get_submodule(name), torch.stack(means).mean(0), torch.stack(variances).mean(0))


def set_statistics(norm: nn.Module, mean: Tensor, variance: Tensor) -> None:
    """Gives a batch norm these statistics."""
    norm.get_buffer("running_mean").copy_(mean)
    norm.get_buffer("running_var").copy_(variance)


def norms_read(module: nn.Module, parts: Iterable[Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """The means and variances, each (calls, c), of what every batch norm reads when the module runs on the parts."""
    names = [
        name
        for name, layer in module.named_modules()
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.track_running_stats
    ]
    found: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def see(name: str, value: Tensor) -> None:
        found.setdefault(name, []).append(channel_statistics(value))

    with watching(module, names, see), torch.no_grad():
        for part in parts:
            module(part)
    return {name: (torch.stack([m for m, _ in p]), torch.stack([v for _, v in p])) for name, p in found.items()}


def channel_statistics(value: Tensor) -> tuple[Tensor, Tensor]:
    """The mean and variance (c,) over all but dimension 1, as a batch norm in training computes them.

    `var_mean` gives the same and takes several times as long, which was most of what correcting the norms took.
    """
    mean, variance = torch.batch_norm_update_stats(value, None, None, 0.0)
    return mean, variance


def run(module: nn.Module, inputs: Tensor) -> None:
    """Runs the module on all inputs in batches of nearly equal size, without gradients, for what its hooks see."""
    with torch.no_grad():
        for batch in batches(inputs):
            module(batch)


def first_input(inputs: tuple[Tensor, ...], named: Mapping[str, Tensor]) -> Tensor:
    """What a module with one input was given, by position or by name."""
    return inputs[0] if inputs else next(iter(named.values()))


def batches(inputs: Tensor) -> tuple[Tensor, ...]:
    size = max(1, min(BATCH, BATCH_VALUES // max(1, inputs[:1].numel())))
    return inputs.chunk(max(1, -(-len(inputs) // size)))


@contextmanager
def watching(module: nn.Module, names: Iterable[str], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Calls `see(name, input)` whenever a named submodule runs; the hooks are gone afterwards."""

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], dict[str, Tensor]], None]:
        return lambda _, inputs, named: see(name, first_input(inputs, named).detach())

    handles = [module.get_submodule(name).register_forward_pre_hook(hook(name), with_kwargs=True) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _measure(module: nn.Module, names: Mapping[str, int], inputs: Tensor) -> Mapping[str, Moments]:
    sums: dict[str, list[Tensor]] = {}
    reads: dict[str, list[Tensor]] = {}
    lagged: dict[str, Tensor] = {}
    share = ROWS // len(batches(inputs))

    def see(name: str, value: Tensor) -> None:
        layer = module.get_submodule(name)
        pixels = value if isinstance(layer, nn.Conv2d) else _as_pixels(value, names[name])
        rows = pixels.transpose(0, 1).flatten(1)  # (channels, positions)
        sums[name] = _added(sums.get(name), rows[:, places(rows.shape[1], share)])
        shape = layer.kernel_size if isinstance(layer, nn.Conv2d) else (1, 1)
        dilation = layer.dilation if isinstance(layer, nn.Conv2d) else (1, 1)
        seen = _lagged(pixels, shape, dilation)
        lagged[name] = lagged[name] + seen if name in lagged else seen
        if isinstance(layer, nn.Conv2d) and (patches := _patches(layer, value, share)) is not None:
            reads[name] = _added(reads.get(name), patches)

    with watching(module, names, see):
        run(module, inputs)
    found = {}
    for name, parts in sums.items():
        products = lagged[name]
        centre = products[products.shape[0] // 2, products.shape[1] // 2].clamp_min(1e-12)
        patches = _statistics(*reads[name]) if name in reads else None
        found[name] = Moments(*_statistics(*parts), (products / centre).float(), patches)
    return found


def _added(known: list[Tensor] | None, rows: Tensor) -> list[Tensor]:
    """A shift (c,), and the count, sum (c,) and products (c, c) of rows (c, n) without it, with those before."""
    shift = rows.mean(1) if known is None else known[0].float()  # float32 holds the squares of what is left
    rows = rows - shift[:, None]
    new = [part.double() for part in (torch.tensor(float(rows.shape[1])), rows.sum(1), rows @ rows.T)]
    return [shift.double(), *(new if known is None else map(torch.add, known[1:], new))]


def _statistics(shift: Tensor, count: Tensor, total: Tensor, squares: Tensor) -> tuple[Tensor, Tensor]:
    """The mean and covariance of what `_added` counted."""
    mean = total / count
    covariance = squares / count - torch.outer(mean, mean)
    return (mean + shift).float(), covariance.float()


def _patches(layer: nn.Conv2d, value: Tensor, count: int) -> Tensor | None:
    """What the kernel reads at so many places, (c kh kw, count); None where that is its input's pixels, or too much."""
    size = layer.in_channels * layer.kernel_size[0] * layer.kernel_size[1]
    if layer.kernel_size == (1, 1) or size > PATCH:
        return None
    return reads_of(layer, value, count)


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
                result[row, column] = (first * second).mean(dtype=torch.float64)
    return result
