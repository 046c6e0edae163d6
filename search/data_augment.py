"""Random shifts and flips of images, drawn from a generator that the caller gives."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from .task_error import TaskError


@dataclass(frozen=True, eq=False)
class Moves:
    """How n images move: the first row and column of the padded image, shape (2, n), and whether mirrored, (n,)."""

    offsets: Tensor
    mirrored: Tensor

    def take(self, indices: Tensor) -> Moves:
        """Those of some images."""
        return Moves(self.offsets[:, indices], self.mirrored[indices])

    def to(self, device: torch.device) -> Moves:
        """The same on a device."""
        return Moves(self.offsets.to(device), self.mirrored.to(device))


@dataclass(frozen=True)
class Augment:
    """How training may move an image.

    Attributes:
        shift: Up to this many pixels in both directions, the border filled with `fill` (the usual "pad and crop").
        flip: Whether half of the images are mirrored left to right.
        fill: The stored value of the border (before normalisation).
    """

    shift: int = 0
    flip: bool = False
    fill: float = 0.0

    def __bool__(self) -> bool:
        return self.shift > 0 or self.flip

    def check(self, shape: tuple[int, ...]) -> None:
        """Raises TaskError if samples of this shape cannot be moved so."""
        if self and len(shape) != 3:
            raise TaskError(f"{self} needs images (channels, height, width), not samples of shape {shape}")
        if not 0 <= self.shift <= (min(shape[1:]) if self else 0):
            raise TaskError(f"shift {self.shift} is outside 0..{min(shape[1:])}, the size of the images")

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Moved copies of images (n, c, h, w), every image on its own."""
        return self.move(images, self.draw(len(images), generator))

    def draw(self, count: int, generator: torch.Generator) -> Moves:
        """How so many images are to move."""
        offsets = torch.randint(0, 2 * self.shift + 1, (2, count), generator=generator)
        return Moves(offsets, torch.randint(0, 2, (count,), generator=generator) == 1)

    def move(self, images: Tensor, moves: Moves) -> Tensor:
        """Copies of images (n, c, h, w), moved so."""
        if not self:
            return images
        n, _, height, width = images.shape
        device = images.device
        moves = moves.to(device)
        rows = moves.offsets[0, :, None] + torch.arange(height, device=device)
        columns = torch.arange(width, device=device).expand(n, width)
        if self.flip:
            columns = torch.where(moves.mirrored[:, None], columns.flip(1), columns)
        columns = moves.offsets[1, :, None] + columns
        padded = functional.pad(images, (self.shift,) * 4, value=self.fill)
        # Channels last, so that one gather takes every image's own rows and columns.
        images_index = torch.arange(n, device=device)[:, None, None]
        moved = padded.permute(0, 2, 3, 1)[images_index, rows[:, :, None], columns[:, None, :]]
        return moved.permute(0, 3, 1, 2).contiguous()
