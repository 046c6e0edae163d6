"""Tensor intrinsics of our own: x86 AVX-512 VNNI, sixteen dot products of four bytes."""

# TVMScript's annotations are calls that its own parser reads; to mypy they are no types.
# mypy: disable-error-code="valid-type, untyped-decorator"

from __future__ import annotations

from tvm.s_tir import TensorIntrin
from tvm.script import tirx as T

VNNI_DOT = "planish_dot_16x4_vnni"


@T.prim_func(s_tir=True)
def _dot_16x4(
    A: T.Buffer((4,), "uint8", offset_factor=1),
    B: T.Buffer((16, 4), "int8", offset_factor=1),
    C: T.Buffer((16,), "int32", offset_factor=1),
) -> None:
    with T.sblock("root"):
        T.reads(C[0:16], A[0:4], B[0:16, 0:4])
        T.writes(C[0:16])
        for i in T.serial(0, 16):
            for k in T.serial(0, 4):
                with T.sblock("update"):
                    vi, vk = T.axis.remap("SR", [i, k])
                    C[vi] = C[vi] + T.cast(A[vk], "int32") * T.cast(B[vi, vk], "int32")


@T.prim_func(s_tir=True)
def _dot_16x4_vnni(
    A: T.Buffer((4,), "uint8", offset_factor=1),
    B: T.Buffer((16, 4), "int8", offset_factor=1),
    C: T.Buffer((16,), "int32", offset_factor=1),
) -> None:
    with T.sblock("root"):
        T.reads(C[0:16], A[0:4], B[0:16, 0:4])
        T.writes(C[0:16])
        a4 = A.vload([0], "uint8x4")
        # LLVM 22 wants <64 x i8> operands here; TVM's own intrinsic still passes <16 x i32>.
        a64 = T.reinterpret(T.broadcast(T.reinterpret(a4, dtype="int32"), 16), dtype="uint8x64")
        b64 = B.vload([0, 0], dtype="int8x64")
        c16 = C.vload([0], dtype="int32x16")
        C[T.ramp(T.int32(0), 1, 16)] = T.call_llvm_pure_intrin(
            T.llvm_lookup_intrinsic_id("llvm.x86.avx512.vpdpbusd.512"), c16, a64, b64, dtype="int32x16"
        )


TensorIntrin.register(VNNI_DOT, _dot_16x4, _dot_16x4_vnni)
