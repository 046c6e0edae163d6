"""Kernels read and write nothing beside their arguments: every argument lies against a page that may not be touched."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

from planish.compilers.cpu.machine import usable_dots
from planish.hwmodels.device import host

pytestmark = pytest.mark.tvm

# Winograd's tiles hang over the edge by up to five pixels, the direct form's by the filter.
SPECS = {
    "winograd": "ConvSpec(1, 32, 7, 7, 32, (3, 3), padding=(1, 1, 1, 1), lanes=16, steps=(Step('bias'), Step('add')))",
    "direct": "ConvSpec(2, 32, 6, 6, 32, (3, 3), (2, 2), (1, 1, 1, 1), lanes=16, steps=(Step('relu'),))",
    "flat": "ConvSpec(2, 32, 5, 5, 48, (1, 1), lanes=16, steps=(Step('bias'),))",
    "plain": "ConvSpec(1, 4, 8, 8, 16, (3, 3), padding=(1, 1, 1, 1), lanes=16, in_lanes=1)",
    "depthwise": "ConvSpec(1, 32, 6, 6, 32, (3, 3), padding=(1, 1, 1, 1), lanes=16, depthwise=True)",
    "int8": "ConvSpec(1, 32, 8, 8, 32, (3, 3), padding=(1, 1, 1, 1), lanes=16, dot=DOTS['widen'], steps=AFFINE)",
    "int8, quantised on the way": "ConvSpec(1, 32, 8, 8, 32, (1, 1), (2, 2), lanes=16, dot=DOTS['widen'],"
    " quantize=True, steps=AFFINE)",
}
# Whose results are stored four pixels at once, and whose depthwise form reads four at once, where this CPU can.
NAMES = [dot.name for dot in usable_dots(host().features, 16) if dot.name != "widen"]
STORED = {
    f"{kind}, {name}": f"ConvSpec({shape}, lanes=16, dot=DOTS['{name}'], quantize={quantize}, steps=(*AFFINE, DIVIDED))"
    for name in NAMES
    for quantize in (False, True)
    for kind, shape in {
        f"bytes {quantize}": "1, 32, 10, 8, 32, (3, 3), padding=(1, 1, 1, 1)",
        f"flat bytes {quantize}": "2, 32, 6, 6, 48, (1, 1)",
        **({} if quantize and name != "vnni" else {
            f"depthwise bytes {quantize}": "2, 32, 8, 12, 32, (3, 5), (1, 2), (1, 1, 1, 1), depthwise=True",
            f"steps {quantize}": "1, 32, 9, 36, 32, (1, 1), (3, 9), depthwise=True",
        }),
    }.items()
}  # fmt: skip
CODE = """
    import ctypes, mmap
    import numpy as np
    import tvm
    from planish.compilers.cpu.convspec import DIVIDED, ConvSpec, Step
    from planish.compilers.cpu.epilogue import quantize_numbers
    from planish.compilers.cpu.kernels import conv_kernel, conv_weights
    from planish.compilers.cpu.machine import DOTS, Machine
    from planish.compilers.cpu.tiles import WinogradTile, choices

    AFFINE, PAGE, kept = (Step("scale"), Step("bias")), mmap.PAGESIZE, []

    def guarded(array, at_end):
        array = np.ascontiguousarray(array)
        assert array.nbytes % 64 == 0, "TVM's arguments are aligned to 64 bytes"
        size = -(-array.nbytes // PAGE) * PAGE
        memory = mmap.mmap(-1, size + 2 * PAGE)
        kept.append(memory)
        start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        for page in (start, start + PAGE + size):
            assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(page), PAGE, 0) == 0
        offset = PAGE + (size - array.nbytes if at_end else 0)
        view = np.frombuffer(memory, array.dtype, array.size, offset).reshape(array.shape)
        view[...] = array
        return tvm.runtime.from_dlpack(view)

    spec = SPEC
    machine = Machine(16, 32, spec.dot or DOTS['widen'])
    weight = np.ones((spec.o, 1 if spec.depthwise else spec.c, *spec.kernel), np.int8 if spec.int8 else np.float32)
    shape = (spec.n, spec.in_blocks, spec.h, spec.w, 16) if spec.in_lanes == 16 else (spec.n, spec.c, spec.h, spec.w)
    data = np.ones(shape, np.uint8 if spec.int8 and not spec.quantize else np.float32)
    out = (spec.n, spec.out_blocks, spec.oh, spec.ow, 16)
    extra = [np.ones((spec.out_blocks, 16) if step.op in ("scale", "bias") else out, np.float32)
             for step in spec.steps if step.op in ("scale", "bias", "add")]
    numbers = [quantize_numbers(1.0, 3)] if spec.int8 else []
    last = [tvm.runtime.tensor(quantize_numbers(1.0, 3))] if spec.out_dtype == "uint8" else []
    found = choices(spec, machine, 0, 2**20)
    direct = next(c for c in found if not isinstance(c, WinogradTile))
    winograd = [next((c for c in found if isinstance(c, WinogradTile) and c.m == m), None) for m in (2, 4)]
    target = tvm.target.Target({"kind": "llvm", "mcpu": tvm.target.codegen.llvm_get_system_cpu()})
    for choice in [direct, *(c for c in winograd if c)]:
        function = conv_kernel(spec, choice, machine).with_attr("global_symbol", "main")
        run = tvm.compile(tvm.IRModule({"main": function}), target)["main"]
        for at_end in (False, True):
            arguments = [data, *conv_weights(spec, choice, machine, weight, 3), *extra, np.zeros(out, spec.out_dtype)]
            arguments = [guarded(a, at_end) for a in arguments]
            numbered = [tvm.runtime.tensor(n) for n in numbers]
            run(arguments[0], *numbered, *arguments[1:-1], *last, arguments[-1])
            print(type(choice).__name__, at_end, bool(np.isfinite(arguments[-1].numpy()).all()), flush=True)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="protects pages by mprotect")
@pytest.mark.parametrize("name", [*SPECS, *STORED])
def test_kernels_touch_nothing_beside_their_arguments(name: str) -> None:
    code = textwrap.dedent(CODE).replace("spec = SPEC", f"spec = {(SPECS | STORED)[name]}", 1)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert len(lines) == (6 if name in ("winograd", "int8") or name.startswith("bytes") else 2)
    assert all(line.endswith("True") for line in lines)
