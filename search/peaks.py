"""The peaks that a device really reaches, measured with the product's own kernels."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..compilers.runner import site_times
from ..hwmodels.device import Device
from ..hwmodels.measurement import MeasureProtocol

if TYPE_CHECKING:
    from ..compilers.compiler import Compiler

# A convolution that every tile fits, short enough to run undisturbed; and a tensor that fits a second-level cache.
_CHANNELS, _PIXELS = 64, 16
_STREAM = (1, 32, 32, 32)


def with_measured_peaks(device: Device, compiler: Compiler) -> Device:
    """The device with rates of float32 arithmetic and cached traffic as measured; other widths are scaled alike.

    Takes a few seconds. The result's `source` says how its rates came about.
    """
    import torch
    from torch import nn

    conv = nn.Conv2d(_CHANNELS, _CHANNELS, 3, padding=1).eval()
    pictures = torch.randn(1, 1, _CHANNELS, _PIXELS, _PIXELS)
    stream = torch.randn(1, *_STREAM)
    with tempfile.TemporaryDirectory(prefix="planish-peaks-") as folder:
        paths = {}
        for name, module, example in (("conv", conv, pictures), ("stream", nn.ReLU(), stream)):
            program = torch.export.export(module, (example[0],))
            paths[name] = compiler.compile(program, device, Path(folder, name), example, tolerance=1e-3).path
        found = site_times(paths, device, MeasureProtocol())
    seconds = {name: sum(row[2] for row in rows) for name, rows in found.items()}
    macs_per_s = _CHANNELS**2 * 9 * _PIXELS**2 / seconds["conv"]
    moved_bytes = 2 * 4 * stream.numel()
    # A device may be described without the rate of float32: the one next to it stands for that.
    widths = device.macs_per_s
    scale = macs_per_s / widths[min((bits for bits in widths if bits >= 32), default=max(widths))]
    return replace(
        device,
        macs_per_s={bits: rate * scale for bits, rate in device.macs_per_s.items()},
        bytes_per_s=moved_bytes / seconds["stream"],
        source="measured: a 64x16x16 3x3 convolution, and a ReLU over 128 KiB",
    )
