"""What a network sees at the ends of its stages, compared between student and teacher: attention maps and features.

Source of attention transfer: Zagoruyko and Komodakis, "Paying More Attention to Attention", 2017, equation 2 (p = 2).
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


def hint_loss(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """The sum over layers of |F_s - F_t|^2 / |F_t|^2; features of shape (n, c, h, w), student and teacher alike.

    Source: Romero et al., "FitNets: Hints for Thin Deep Nets", 2015. Their regressor from the student's channels to the
    teacher's is left out: a compressed student begins with the teacher's own channels.
    """
    terms = [
        (s - t).square().mean() / t.square().mean().clamp_min(1e-12) for s, t in zip(student, teacher, strict=True)
    ]
    return torch.stack(terms).sum()


def stage_ends(student: nn.Module, teacher: nn.Module, example: Tensor, channels: bool = False) -> tuple[str, ...]:
    """The modules whose outputs are compared: for each size of image, the teacher's last one that the student shares.

    Shared means the same name and the same height and width. Maps of one pixel say nothing and are left out. Empty
    where no name is shared, as after a rewrite by torch.fx.

    Args:
        student: Whose modules are looked for.
        teacher: Whose last module of a size it is.
        example: Normalised inputs (n, ...) on the device of both.
        channels: Whether the channels need to agree too.
    """
    of_student = dict(_shapes(student, example))
    last: dict[tuple[int, ...], str] = {}
    for name, shape in _shapes(teacher, example):
        theirs = of_student.get(name, ())
        if shape[1:] != (1, 1) and theirs[1:] == shape[1:] and (not channels or theirs == shape):
            last[shape[1:]] = name
    return tuple(last.values())


class FeatureTap:
    """Collects the outputs of named modules while a network runs; a context manager.

    Attributes:
        features: Of the last forward pass, in the order of the names.
    """

    def __init__(self, module: nn.Module, names: Sequence[str]) -> None:
        self._names = tuple(names)
        self._found: dict[str, Tensor] = {}
        self._handles = [module.get_submodule(name).register_forward_hook(self._hook(name)) for name in set(names)]

    @property
    def features(self) -> tuple[Tensor, ...]:
        """The outputs in the last forward pass; used up by reading."""
        found = tuple(self._found[name] for name in self._names)
        self._found = {}
        return found

    def __enter__(self) -> FeatureTap:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()

    def _hook(self, name: str):  # type: ignore[no-untyped-def]
        def keep(module: nn.Module, args: object, output: Tensor) -> None:
            # A clone, because a relu in place may follow and would destroy what the square needs.
            self._found[name] = output.clone()

        return keep


def _shapes(module: nn.Module, example: Tensor) -> list[tuple[str, tuple[int, ...]]]:
    """Name and (channels, height, width) of every module with one image-shaped output, in the order they finish in."""
    found: list[tuple[str, tuple[int, ...]]] = []
    handles = []
    for name, part in module.named_modules():

        def note(part: nn.Module, args: object, output: object, name: str = name) -> None:
            if isinstance(output, Tensor) and output.ndim == 4:
                found.append((name, tuple(int(size) for size in output.shape[1:])))

        if name:
            handles.append(part.register_forward_hook(note))
    try:
        with evaluating(module), torch.no_grad():
            module(example)
    finally:
        for handle in handles:
            handle.remove()
    return found
