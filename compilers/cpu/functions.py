"""Elementary functions on float32 vectors, as few multiply-adds: LLVM calls the C library for every single lane."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import tvm
from tvm import te


def const(number: float) -> Any:
    """A float32 constant."""
    return tvm.tirx.const(number, "float32")


# 1.5 * 2**23: added to a float32 of less than 2**22, it leaves no room for a fraction, so the sum is rounded, halves to
# even, and its low bits are the whole number. TVM calls for `nearbyint` a lane at a time, and so for all around it.
_WHOLE = 12582912.0
_WHOLE_BITS = 0x4B400000


def whole(x: Any) -> Any:
    """round(x) as int32, halves to even; |x| must be less than 2**22."""
    return tvm.tirx.reinterpret("int32", x + const(_WHOLE)) - tvm.tirx.const(_WHOLE_BITS, "int32")


# e**r = 1 + r * (c0 + c1 r + ... + c4 r**4) for |r| <= ln(2) / 2, of least relative error: 9.2e-8.
_E_TO_R = (0.9999997019767761, 0.4999915063381195, 0.1666763573884964, 0.04189793020486832, 0.008290314115583897)


def exp(x: Any) -> Any:
    """e**x to about one unit in the last place; of the argument only -87.3 to 88 counts, so no result is infinite.

    2**n e**r with |r| <= ln(2) / 2, n from rounding. The polynomial is summed in pairs: a loop over vectors takes
    as long as the steps that wait for each other, not as their number.
    """

    def remainder(x: Any, shifted: Any) -> Any:
        # ln(2) in two parts, the first exact in 10 bits: n times it loses nothing.
        return _let(
            shifted - const(_WHOLE),
            lambda n: _let(x - n * const(0.693359375) + n * const(2.12194440e-4), lambda r: power(r, shifted)),
        )

    def power(r: Any, shifted: Any) -> Any:
        # The low bits of the shifted number are n; as an exponent they stand 23 bits further up, on a bias of 127.
        bits = tvm.tirx.reinterpret("int32", shifted) << tvm.tirx.const(23, "int32")
        two_to_n = tvm.tirx.reinterpret("float32", bits + tvm.tirx.const(127 << 23, "int32"))
        c = [const(value) for value in _E_TO_R]
        return _let(
            r * r,
            lambda r2: (const(1) + r * (c[0] + c[1] * r + (c[2] + c[3] * r + c[4] * r2) * r2)) * two_to_n,
        )

    bounded = te.min(te.max(x, const(-87.3)), const(88.0))
    return _let(
        bounded,
        lambda x: _let(x * const(1.4426950408889634) + const(_WHOLE), lambda shifted: remainder(x, shifted)),
    )


def bfloat16(x: Any) -> Any:
    """The bits of the nearest bfloat16 as uint16, halves to even; NaN stays NaN as arithmetic gives it (0x7FC00000)."""

    def bits(x: Any) -> Any:
        whole = tvm.tirx.reinterpret("uint32", x)
        half, one, sixteen = (tvm.tirx.const(value, "uint32") for value in (0x7FFF, 1, 16))
        return ((whole + half + ((whole >> sixteen) & one)) >> sixteen).astype("uint16")

    return _let(x, bits)


def sigmoid(x: Any) -> Any:
    """1 / (1 + e**-x)."""
    return const(1) / (const(1) + exp(const(0) - x))


def silu(x: Any) -> Any:
    """x / (1 + e**-x)."""
    return _let(x, lambda x: x / (const(1) + exp(const(0) - x)))


def tanh(x: Any) -> Any:
    """1 - 2 / (1 + e**2x), to about 1e-7."""
    return const(1) - const(2) / (const(1) + exp(x * const(2)))


# erf(x) = x P(x**2) / Q(x**2) of least relative error for |x| up to where erf is 1 in float32, lowest powers first.
_ERF_RANGE = 3.919206
_ERF_P = (1.1283791065216064, 0.1903775930404663, 0.05274558067321777, 3.7645555566996336e-3, 2.8489023679867387e-4,
          2.0507311546680285e-6)  # fmt: skip
_ERF_Q = (1.0, 0.502050518989563, 0.11409778892993927, 0.014967075549066067, 1.1623358586803079e-3, 3.8098751247162e-5)


def erf(x: Any) -> Any:
    """The error function to 4e-7: one division, where the usual series takes two and an exponential."""

    def ratio(x: Any, t: Any) -> Any:
        return x * _polynomial(_ERF_P, t) / _polynomial(_ERF_Q, t)

    bounded = te.min(te.max(x, const(-_ERF_RANGE)), const(_ERF_RANGE))
    return _let(bounded, lambda x: _let(x * x, lambda t: ratio(x, t)))


def _polynomial(coefficients: Sequence[float], t: Any) -> Any:
    """Their sum over powers of t, the lowest first."""
    total = const(coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        total = total * t + const(coefficient)
    return total


def gelu(x: Any) -> Any:
    """x times the normal distribution function of x."""

    def halves(x: Any) -> Any:
        return _let(const(0.5) * x, lambda half: half + half * erf(x * const(0.7071067811865476)))

    return _let(x, halves)


def hardsigmoid(x: Any) -> Any:
    """clamp(x + 3, 0, 6) / 6."""
    return te.min(te.max(x + const(3), const(0)), const(6)) * const(1 / 6)


def hardswish(x: Any) -> Any:
    """x clamp(x + 3, 0, 6) / 6."""
    return _let(x, lambda x: x * hardsigmoid(x))


def _let(value: Any, body: Callable[[Any], Any]) -> Any:
    """body(value), with the value computed once: as a plain expression it would be copied to each of its uses."""
    name = tvm.tirx.Var("value", str(value.ty.dtype))
    return tvm.tirx.Let(name, value, body(name))
