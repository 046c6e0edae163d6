"""A compressed model's layers refitted one after the other: each to what it computed in the original.

Closed forms fit every layer to the original's own inputs. In the compressed model its inputs are others, by what the
layers before it lost; least squares on those gives back a good part of it (He, Zhang and Sun 2017 for channels).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .moments import BATCH_VALUES, NormMemory, digest_of, norms_read, set_statistics, watching
from .reads import places, reads_of
from .trace import TracedModel

# Places of a layer's outputs that are looked at, and how many of them at least for every value that the layer reads.
PLACES, _AT_LEAST = 8192, 4
# Of the mean variance of what a layer reads: how firmly its weights stay where they are.
RIDGE = 0.1
# Of a channel's variance in the original, what it counts as at the least in the batch norm behind: see
# `correct_batch_norms`.
LEAST_VARIANCE = 0.5
_PLAIN = (nn.Conv2d, nn.Linear)


@dataclass(frozen=True, eq=False)
class Reference:
    """What the original does on a few inputs.

    Attributes:
        inputs: So many as are held at once.
        outputs: Of layers, at some places (`places`), by name (o, count).
        norms: What batch norms read, by name means and variances, each (calls, c).
    """

    inputs: Tensor
    outputs: Mapping[str, Tensor]
    norms: Mapping[str, tuple[Tensor, Tensor]]


_cache: WeakKeyDictionary[TracedModel, tuple[str, Reference]] = WeakKeyDictionary()


def reference_of(traced: TracedModel, inputs: Tensor) -> Reference:
    """Runs the original on as many of the inputs as may be held at once; the last result of each is kept.

    Layers that are called several times are left out: their outputs have no one place to be compared at.
    """
    digest = digest_of("", inputs)
    known = _cache.get(traced)
    if known is None or known[0] != digest:
        known = _cache[traced] = digest, _reference(traced, inputs)
    return known[1]


def _reference(traced: TracedModel, inputs: Tensor) -> Reference:
    own = inputs[: max(1, BATCH_VALUES // max(1, inputs[:1].numel()))]
    # Of layers that compute as their class says: not those that scale their weights, attention, or functions.
    names = [
        layer.name
        for layer in traced.layers
        if layer.calls == 1 and ":" not in layer.name and type(traced.module.get_submodule(layer.name)) in _PLAIN
    ]
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def see(layer: nn.Module, _: tuple[Tensor, ...], output: Tensor) -> None:
            rows = _rows(layer, output)
            found[name] = rows[:, places(rows.shape[1], PLACES)].clone()

        return see

    handles = [traced.module.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    try:
        # At once, as `reconstruct` runs the candidate: what norms read goes by the batch.
        return Reference(own, found, norms_read(traced.module, (own,)))
    finally:
        for handle in handles:
            handle.remove()


def reconstruct(
    module: nn.Module, reference: Reference, left: Mapping[str, Tensor], memory: Mapping[str, NormMemory]
) -> None:
    """Refits the last layer of every site, in place, in the order in which they run; batch norms are corrected as met.

    W moves by E[(y - W x) x^T] (E[x x^T] + RIDGE)^-1, x what it reads now and y what the original returned there, both
    without their means, for which the bias makes up where there is one. A layer before which nothing changed stays.

    Args:
        module: The compressed model, in eval mode, its weights plain.
        reference: Of the original.
        left: By site the output channels that are left, int64.
        memory: Of its batch norms, on the same inputs.
    """
    targets = {}
    for site, wanted in reference.outputs.items():
        inner = [name for name, part in module.get_submodule(site).named_modules() if type(part) in _PLAIN]
        if inner:
            targets[f"{site}.{inner[-1]}".rstrip(".")] = wanted[left[site]] if site in left else wanted
    calls = dict.fromkeys(memory, 0)

    def see(name: str, value: Tensor) -> None:
        part = module.get_submodule(name)
        if isinstance(part, _BatchNorm):
            set_statistics(part, *memory[name].correct(part, calls[name], value, LEAST_VARIANCE))
            calls[name] += 1
            return
        assert isinstance(part, nn.Conv2d | nn.Linear)
        target = targets[name]
        if part.weight.shape[0] != len(target) or target.shape[1] < _AT_LEAST * part.weight[0].numel():
            return
        reads = reads_of(part, value, PLACES)
        # `places` of the original's output are those of this one only where both have as many.
        if reads is not None and reads.shape[1] == target.shape[1]:
            _refit(part, reads, target)

    with watching(module, [*targets, *memory], see), torch.no_grad():
        module(reference.inputs)


def _refit(layer: nn.Conv2d | nn.Linear, reads: Tensor, wanted: Tensor) -> None:
    """Least squares of a layer on what it reads (m, count), to what is wanted of it (o, count)."""
    weight, count = layer.weight.flatten(1), reads.shape[1]
    read, want = reads.mean(1, keepdim=True), wanted.mean(1, keepdim=True)
    centred = reads - read
    missing = wanted - want - weight @ centred
    covariance = (centred @ centred.T).double() / count
    level = RIDGE * covariance.diagonal().mean().clamp_min(1e-12)
    covariance += level * torch.eye(len(covariance), dtype=torch.float64)
    step = torch.linalg.solve(covariance, (missing @ centred.T).double() / count, left=False)
    if not bool(step.isfinite().all()):
        return
    fitted = weight + step.to(weight.dtype)
    layer.weight.copy_(fitted.reshape(layer.weight.shape))
    if layer.bias is not None:
        layer.bias.copy_((want - fitted @ read)[:, 0])


def _rows(layer: nn.Module, output: Tensor) -> Tensor:
    """A layer's outputs as (o, places), in the order of `reads_of`."""
    if isinstance(layer, nn.Conv2d):
        return output.transpose(0, 1).flatten(1)
    return output.reshape(-1, output.shape[-1]).T
