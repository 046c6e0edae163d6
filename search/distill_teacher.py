"""What a student is to imitate: the teacher's logits, attention maps and features."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .distill_attention import FeatureTap, attention_map
from .score import evaluating


@dataclass(frozen=True, eq=False)
class Targets:
    """The teacher's logits (n, classes), attention maps, each (n, h * w), and features, each (n, c, h, w)."""

    logits: Tensor
    maps: tuple[Tensor, ...] = ()
    features: tuple[Tensor, ...] = ()

    def take(self, indices: Tensor) -> Targets:
        """Those of some samples."""
        return Targets(
            self.logits[indices],
            tuple(part[indices] for part in self.maps),
            tuple(part[indices] for part in self.features),
        )

    def to(self, device: torch.device) -> Targets:
        """The same on a device."""
        maps, features = (tuple(part.to(device) for part in parts) for parts in (self.maps, self.features))
        return Targets(self.logits.to(device), maps, features)

    @property
    def bytes(self) -> int:
        """What they take in memory."""
        return sum(tensor.numel() * tensor.element_size() for tensor in (self.logits, *self.maps, *self.features))


class Teacher:
    """The teacher in eval mode, without gradients."""

    def __init__(
        self,
        module: nn.Module,
        device: torch.device,
        stages: tuple[str, ...] = (),
        hints: tuple[str, ...] = (),
        computing: AbstractContextManager[object] | None = None,
    ) -> None:
        """`stages` and `hints` name the modules whose attention maps and whose features are imitated.

        Args:
            computing: The context that it runs in, entered for every answer; what it says is float32 all the same.
        """
        self._module, self.device = module, device
        self.stages, self.hints = stages, hints
        self._computing = computing or nullcontext()

    def answer(self, inputs: Tensor) -> Targets:
        """What to imitate on these normalised inputs (n, ...)."""
        with evaluating(self._module), torch.no_grad(), FeatureTap(self._module, (*self.stages, *self.hints)) as tap:
            with self._computing:
                logits = self._module(inputs.to(self.device)).float()
            found = tuple(feature.float() for feature in tap.features)
        maps = tuple(attention_map(feature) for feature in found[: len(self.stages)])
        return Targets(logits, maps, found[len(self.stages) :])
