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
    from torch.export.graph_signature import InputKind

    # The graph with everything that it holds as inputs: to make a module of it takes longer than to run it.
    held = {**program.state_dict, **program.constants}
    inputs = program.graph_signature.input_specs
    with torch.no_grad():
        outputs = np.stack(
            [
                program.graph_module(*(x if s.kind == InputKind.USER_INPUT else held[s.target] for s in inputs))[0]
                for x in examples
            ]
        )
    with (folder / EXAMPLES).open("wb") as file:
        np.savez(file, inputs=examples.numpy(), outputs=outputs)
