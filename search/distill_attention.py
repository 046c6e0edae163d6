"""Attention transfer: where in an image a network looks, compared between student and teacher at stage ends.

Source: Zagoruyko and Komodakis, "Paying More Attention to Attention", 2017, equation 2 (p = 2).
"""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType

import torch
from torch import Tensor, nn
from torch.nn import functional

from .score import evaluating


def attention_map(activation: Tensor) -> Tensor:
    """The sum of squares over channels, as a unit vector: (n, c, h, w) to (n, h * w)."""
    return functional.normalize(activation.square().sum(1).flatten(1))


def attention_loss(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """The sum over layers of |A_s - A_t|^2, the mean over samples; maps of shape (n, h * w)."""
    terms = [(s - t).square().sum(1).mean() for s, t in zip(student, teacher, strict=True)]
    return torch.stack(terms).sum()


def stage_ends(student: nn.Module, teacher: nn.Module, example: Tensor) -> tuple[str, ...]:
    """The modules whose outputs are compared: for each size of image, the teacher's last one that the student shares.

    Shared means the same name and the same height and width; the channels may differ. Maps of one pixel say nothing and
    are left out. Empty where no name is shared, as after a rewrite by torch.fx.

    Args:
        example: Normalised inputs (n, ...) on the device of both.
    """
    of_student = dict(_spatial_sizes(student, example))
    last: dict[tuple[int, int], str] = {}
    for name, size in _spatial_sizes(teacher, example):
        if size != (1, 1) and of_student.get(name) == size:
            last[size] = name
    return tuple(last.values())


class AttentionTap:
    """Collects the attention maps of named modules while a network runs; a context manager.

    Attributes:
        maps: Of the last forward pass, in the order of the names.
    """

    def __init__(self, module: nn.Module, names: Sequence[str]) -> None:
        self._names = tuple(names)
        self._found: dict[str, Tensor] = {}
        self._handles = [module.get_submodule(name).register_forward_hook(self._hook(name)) for name in names]

    @property
    def maps(self) -> tuple[Tensor, ...]:
        """The maps of the last forward pass; used up by reading."""
        maps = tuple(self._found[name] for name in self._names)
        self._found = {}
        return maps

    def __enter__(self) -> AttentionTap:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()

    def _hook(self, name: str):  # type: ignore[no-untyped-def]
        def keep(module: nn.Module, args: object, output: Tensor) -> None:
            # A clone, because a relu in place may follow and would destroy what the square needs.
            self._found[name] = attention_map(output.clone())

        return keep


def _spatial_sizes(module: nn.Module, example: Tensor) -> list[tuple[str, tuple[int, int]]]:
    """Name and (height, width) of every module with one image-shaped output, in the order in which they finish."""
    found: list[tuple[str, tuple[int, int]]] = []
    handles = []
    for name, part in module.named_modules():

        def note(part: nn.Module, args: object, output: object, name: str = name) -> None:
            if isinstance(output, Tensor) and output.ndim == 4:
                found.append((name, (int(output.shape[2]), int(output.shape[3]))))

        if name:
            handles.append(part.register_forward_hook(note))
    try:
        with evaluating(module), torch.no_grad():
            module(example)
    finally:
        for handle in handles:
            handle.remove()
    return found
