"""Splits that are the same in every process: by class, from a fixed seed that no run's seed changes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Not a run's seed: a cached teacher must never have seen the validation samples of any run.
_SEED = 20_180


def stratified(targets: Tensor, fractions: Sequence[float]) -> list[Tensor]:
    """Cuts samples into parts in which every class has its share.

    Args:
        targets: Shape (n,), the classes.
        fractions: The share of every part, summing to 1.

    Returns:
        Indices of the samples of every part, shuffled; together they are all n, each once.
    """
    generator = torch.Generator().manual_seed(_SEED)
    parts: list[list[Tensor]] = [[] for _ in fractions]
    for label in sorted(set(targets.tolist())):
        members = (targets == label).nonzero()[:, 0]
        members = members[torch.randperm(len(members), generator=generator)]
        start, share = 0, 0.0
        for part, fraction in zip(parts, fractions, strict=True):
            share += fraction
            end = round(share * len(members))
            part.append(members[start:end])
            start = end
    whole = [torch.cat(part) for part in parts]
    return [part[torch.randperm(len(part), generator=generator)] for part in whole]
