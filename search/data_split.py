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
        Indices of the samples of every part, shuffled; together they are all n, each once. A part has its share
        of all samples to within one, and of every class to within two, also where classes are very small.
    """
    generator = torch.Generator().manual_seed(_SEED)
    shuffled = torch.randperm(len(targets), generator=generator)
    by_class = shuffled[targets[shuffled].argsort(stable=True)]
    parts: list[list[int]] = [[] for _ in fractions]
    # Dealt out class after class, each sample to the part that is furthest behind its share so far.
    for dealt, index in enumerate(by_class.tolist(), start=1):
        behind = [share * dealt - len(part) for share, part in zip(fractions, parts, strict=True)]
        parts[behind.index(max(behind))].append(index)
    whole = [torch.tensor(part, dtype=torch.int64) for part in parts]
    return [part[torch.randperm(len(part), generator=generator)] for part in whole]
