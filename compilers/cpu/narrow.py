"""Four vectors of float32 to one of bytes, by x86's instructions that narrow two vectors to one and clamp on the way.

Vector by vector the clamps, the rounding, the zero point and the narrowing of a result take more instructions than the
products of a small convolution of bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm.tirx.script import builder as T

from .machine import Dot

# The vectors that become one.
TOGETHER = 4
# Those of `DOTS` that are there only where x86 narrows vectors: VPMADDWD of 64 bytes and both VNNI ask for AVX512BW.
_DOTS = ("vnni", "words", "madd", "bytes", "bfloat16")
# LLVM's names by float32 lanes: rounding as the mode is (halves to even), to 16 bits signed, to 8 unsigned, any order.
_ROUND = {16: "llvm.x86.avx512.mask.cvtps2dq.512", 8: "llvm.x86.avx.cvt.ps2dq.256"}
_TO_16 = {16: "llvm.x86.avx512.packssdw.512", 8: "llvm.x86.avx2.packssdw"}
_TO_8 = {16: "llvm.x86.avx512.packuswb.512", 8: "llvm.x86.avx2.packuswb"}
_PERMUTE = {16: "llvm.x86.avx512.permvar.si.512", 8: "llvm.x86.avx2.permd"}


def starts(extent: int) -> list[int]:
    """Where the pieces of `TOGETHER` begin that cover an extent of at least so many; the last may overlap."""
    return [min(start, extent - TOGETHER) for start in range(0, extent, TOGETHER)]


def narrows(dot: Dot | None, lanes: int) -> bool:
    """Whether the CPU that multiplies so has these instructions for vectors of so many float32."""
    return dot is not None and dot.name in _DOTS and lanes in _ROUND


def bytes_of(values: Sequence[Any], zero_point: Any, lanes: int) -> Any:
    """clamp(round(value) + zero point, 0, 255) of four vectors, one after the other: uint8 of 4 x lanes.

    Args:
        values: float32 vectors; the multiple of the scale that is to be stored, of any size.
        zero_point: float32, a whole number of 0..255.
        lanes: Of each vector.
    """
    # Beyond 2**31, and of NaN, the conversion gives the least int32, which is right below and wrong above. In this
    # order the lesser of NaN and a number is NaN, and its byte 0, as where vectors are narrowed one by one.
    top = T.broadcast(T.float32(255) - zero_point, lanes)
    whole = [_rounded(T.min(top, value), lanes) for value in values]
    offset = T.broadcast(T.cast(zero_point, "int16"), 2 * lanes)
    words = [_pack(_TO_16, f"int16x{2 * lanes}", lanes, whole[i], whole[i + 1]) for i in (0, 2)]
    added = [_saturating_sum(pair, offset, lanes) for pair in words]
    mixed = T.reinterpret(f"int32x{lanes}", _pack(_TO_8, f"int8x{4 * lanes}", lanes, *added))
    # Both work within 128 bits: four bytes of the first vector, of the second, ..., then the next four of the first.
    parts = lanes // TOGETHER
    number = T.ramp(0, 1, lanes)
    place = number % parts * TOGETHER + number // parts
    return T.reinterpret(f"uint8x{4 * lanes}", _call(_PERMUTE[lanes], f"int32x{lanes}", mixed, place))


def _rounded(value: Any, lanes: int) -> Any:
    kind = f"int32x{lanes}"
    if lanes == 8:
        return _call(_ROUND[lanes], kind, value)
    # What stands where the mask is off, the mask, and the rounding: the current mode.
    return _call(_ROUND[lanes], kind, value, T.broadcast(T.int32(0), lanes), T.int16(-1), T.int32(4))


def _pack(names: dict[int, str], kind: str, lanes: int, first: Any, second: Any) -> Any:
    return _call(names[lanes], kind, first, second)


def _saturating_sum(a: Any, b: Any, lanes: int) -> Any:
    return _call("llvm.sadd.sat", f"int16x{2 * lanes}", a, b)


def _call(name: str, kind: str, *arguments: Any) -> Any:
    return T.bind(T.call_llvm_pure_intrin(kind, T.llvm_lookup_intrinsic_id(name), *arguments))
