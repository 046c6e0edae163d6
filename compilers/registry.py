"""Which compiler takes a device."""

from __future__ import annotations

from ..hwmodels.device import Device, DeviceError
from .compiler import Compiler
from .native import NativeCompiler
from .tvm_compiler import TvmCompiler

COMPILERS: tuple[Compiler, ...] = (TvmCompiler(), NativeCompiler())


def compiler_for(device: Device, name: str = "tvm") -> Compiler:
    """The compiler of that name, if it can use the device here.

    Raises:
        DeviceError: no such compiler, or something is missing; it is named.
    """
    for compiler in COMPILERS:
        if compiler.name == name:
            lacking = compiler.missing(device)
            if lacking:
                raise DeviceError(f"device {device.name!r} is not usable here: {lacking}")
            return compiler
    raise DeviceError(f"compiler {name!r} is not known; known are {', '.join(c.name for c in COMPILERS)}")
