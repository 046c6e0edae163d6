"""What a student is to imitate: the teacher's logits and attention maps, computed once where inputs never move."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .data import Split
from .distill_attention import AttentionTap
from .score import evaluating

# Beyond this the targets are computed again in every epoch.
_CACHE_BYTES = 512 * 2**20


@dataclass(frozen=True, eq=False)
class Targets:
    """The teacher's logits (n, classes) and attention maps, each (n, h * w)."""

    logits: Tensor
    maps: tuple[Tensor, ...]

    def take(self, indices: Tensor) -> Targets:
        """Those of some samples."""
        return Targets(self.logits[indices], tuple(part[indices] for part in self.maps))


class Teacher:
    """The teacher in eval mode, without gradients."""

    def __init__(self, module: nn.Module, stages: tuple[str, ...], device: torch.device) -> None:
        self._module, self._stages, self._device = module, stages, device
        self._cached: Targets | None = None

    def remember(self, train: Split, batch: int) -> None:
        """Computes the targets of a whole split, where they fit into memory; `targets` then looks them up."""
        parts: list[Targets] = []
        for start in range(0, len(train), batch):
            inputs = train.batch(slice(start, start + batch)).to(self._device)
            parts.append(self._forward(inputs))
            if start == 0 and _bytes(parts[0]) * math.ceil(len(train) / batch) > _CACHE_BYTES:
                return
        maps = zip(*(part.maps for part in parts), strict=True)
        self._cached = Targets(torch.cat([part.logits for part in parts]), tuple(torch.cat(part) for part in maps))

    def targets(self, inputs: Tensor, indices: Tensor) -> Targets:
        """What to imitate on these inputs, the samples `indices` of the split."""
        if self._cached is not None:
            return self._cached.take(indices.to(self._device))
        return self._forward(inputs)

    def _forward(self, inputs: Tensor) -> Targets:
        with evaluating(self._module), torch.no_grad(), AttentionTap(self._module, self._stages) as tap:
            return Targets(self._module(inputs), tap.maps)


def _bytes(targets: Targets) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in (targets.logits, *targets.maps))
