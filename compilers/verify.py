"""What torch computes for a few inputs, stored beside the compiled model that must compute the same."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .manifest import EXAMPLES

if TYPE_CHECKING:
    import torch
    from torch.export import ExportedProgram

# float32 sums in another order differ by about the square root of their length times 6e-8.
FLOAT_TOLERANCE = 1e-3
# A value that lies on a rounding boundary may move by one of 255 steps, in each of several layers.
INT8_TOLERANCE = 0.05


def store_examples(program: ExportedProgram, examples: torch.Tensor, folder: Path) -> None:
    """Writes `examples.npz`: inputs (count, batch, ...) and the outputs that torch gives for each."""
    import torch

    module = program.module()
    with torch.no_grad():
        outputs = np.stack([module(x).numpy() for x in examples])
    with (folder / EXAMPLES).open("wb") as file:
        np.savez(file, inputs=examples.numpy(), outputs=outputs)
