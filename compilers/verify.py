"""What torch computes for a few inputs, stored beside the compiled model that must compute the same."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .manifest import EXAMPLES

if TYPE_CHECKING:
    import torch
    from torch.export import ExportedProgram

# float32 sums in another order differ by about the square root of their length times 6e-8.
FLOAT_TOLERANCE = 1e-3
# A value that lies on a rounding boundary may move by one of 255 steps, in each of several layers.
INT8_TOLERANCE = 0.05


# How much inputs are moved, relative to themselves, to see how far that moves the outputs of bytes; how often; and what
# such a difference may count at the most.
_MOVED, _DRAWS, _MOST = 1e-5, 2, 0.25


def store_examples(program: ExportedProgram, examples: torch.Tensor, folder: Path) -> None:
    """Writes `examples.npz`: inputs (count, batch, ...) and the outputs that torch gives for each."""
    with (folder / EXAMPLES).open("wb") as file:
        np.savez(file, inputs=examples.numpy(), outputs=_outputs(program, examples))


def tolerance_of(program: ExportedProgram, examples: torch.Tensor, least: float) -> float:
    """What a compiled model of bytes may differ by: at least so much, and twice what torch's own outputs move by.

    A value between two bytes goes either way, and a model that has little left to tell classes apart by makes much of
    it. Inputs that are no floats stay where they are, and so does the tolerance.

    Args:
        program: Of bytes.
        examples: Inputs (count, batch, ...).
        least: The tolerance where nothing moves; relative to the largest output of an example.
    """
    import torch

    if not examples.is_floating_point():
        return least
    generator = torch.Generator().manual_seed(0)
    still, moved = _outputs(program, examples), 0.0
    scale = np.maximum(np.abs(still).reshape(len(still), -1).max(1), 1e-12)
    for _ in range(_DRAWS):
        noise = 2 * torch.rand(examples.shape, generator=generator, dtype=examples.dtype) - 1
        change = np.abs(_outputs(program, examples * (1 + _MOVED * noise)) - still).reshape(len(still), -1).max(1)
        moved = max(moved, float((change / scale).max()))
    return max(least, min(2 * moved, _MOST)) if np.isfinite(moved) else least


def _outputs(program: ExportedProgram, examples: torch.Tensor) -> Any:
    import torch
    from torch.export.graph_signature import InputKind

    # The graph with everything that it holds as inputs: to make a module of it takes longer than to run it.
    held = {**program.state_dict, **program.constants}
    inputs = program.graph_signature.input_specs
    with torch.no_grad():
        return np.stack(
            [
                program.graph_module(*(x if s.kind == InputKind.USER_INPUT else held[s.target] for s in inputs))[0]
                for x in examples
            ]
        )
