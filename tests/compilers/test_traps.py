"""Traps of TVM that were met once: the pin, the package, VNNI, slow imports, batch norms, the runtime alone."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import tomllib
from collections.abc import Callable
from importlib.metadata import distribution, version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from planish.compilers.cpu.machine import usable_dots
from planish.hwmodels.device import host

pytestmark = pytest.mark.tvm

ROOT = Path(__file__).resolve().parents[2]
Compile = Callable[..., Any]


def child(code: str, **environment: str) -> str:
    """What a Python process prints; its exit status must be 0."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=False,
    )
    assert done.returncode == 0, f"exit status {done.returncode}: {done.stderr[-2000:]}"
    return done.stdout.strip()


# -- the packages -----------------------------------------------------------------------------------------------------


def test_the_installed_tvm_is_the_pinned_one() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pins = dict(line.split("==") for line in project["dependencies"] if "==" in line and "tvm" in line)
    assert set(pins) == {"apache-tvm", "apache-tvm-ffi"}
    assert {name: version(name) for name in pins} == pins


def test_a_function_can_be_serialised() -> None:
    # apache-tvm-ffi 0.1.15 dies here with a segmentation fault.
    code = """
        import tvm
        from tvm import te
        x = te.placeholder((4,), name="x")
        function = te.create_prim_func([x, te.compute((4,), lambda i: x[i] + 1.0)])
        text = tvm.ir.save_json(function)
        assert tvm.ir.load_json(text).script() == function.script()
        print(len(text) > 0)
    """
    assert child(code) == "True"


def test_tvm_is_the_apache_package_with_its_torch_frontend() -> None:
    files = {str(file) for file in distribution("apache-tvm").files or ()}
    assert "tvm/__init__.py" in files, "the package named tvm on PyPI is something else"
    from tvm.relax.frontend.torch import from_exported_program

    assert callable(from_exported_program)


def test_compiling_never_imports_tvms_tensor_intrinsics() -> None:
    # That import parses hundreds of functions and takes tens of seconds.
    code = """
        import sys, tempfile, torch
        from pathlib import Path
        import planish.compilers.tvm_build
        from planish.compilers.tvm_compiler import TvmCompiler
        from planish.hwmodels.device import host
        x = torch.zeros(1, 3, 4, 4)
        program = torch.export.export(torch.nn.Conv2d(3, 16, 3), (x,))
        with tempfile.TemporaryDirectory() as folder:
            TvmCompiler().compile(program, host(), Path(folder, "a"), x[None], tolerance=1e-4)
        print([name for name in sys.modules if name.startswith("tvm.s_tir.tensor_intrin")])
    """
    assert child(code) == "[]"


# -- Instructions -----------------------------------------------------------------------------------------------------


def dot_function(name: str, lanes: int) -> Any:
    """out[i] = sum_k a[k] * b[i, k], one step of a sum."""
    from planish.compilers.cpu.emit import argument, dot_product, kernel
    from planish.compilers.cpu.machine import DOTS

    dot = DOTS[name]
    with kernel() as (emitted, body):
        a = argument("a", (1, dot.depth), dot.data)
        b = argument("b", (1, lanes, dot.depth), "int16" if name == "words" else "int8")
        out = argument("out", (1, lanes), "int32")

        def emit() -> None:
            from tvm.tirx.script import builder as T

            sums = dot_product(1, 1, lanes, (1,), lambda i, r: (a, (r, 0)), lambda j, r: (b, (r,)), dot)
            with T.vectorized(0, lanes) as lane:
                T.buffer_store(out, sums(0, 0, lane), [0, lane])

        body(emit)
    return emitted.function


@pytest.mark.parametrize(
    ("name", "lanes", "target", "instruction"),
    [
        ("vnni", 16, "x86_64-linux-gnu cascadelake", "vpdpbusd"),
        ("vnni", 8, "x86_64-linux-gnu alderlake", "vpdpbusd"),
        ("words", 16, "x86_64-linux-gnu cascadelake", "vpdpwssd"),
        ("words", 8, "x86_64-linux-gnu alderlake", "vpdpwssd"),
        ("madd", 16, "x86_64-linux-gnu skylake-avx512", "vpmaddwd"),
        ("madd", 8, "x86_64-linux-gnu x86-64-v3", "vpmaddwd"),
        ("madd", 4, "x86_64-linux-gnu x86-64-v2", "pmaddwd"),
        ("bytes", 16, "x86_64-linux-gnu skylake-avx512", "vpmaddubsw"),
        ("bytes", 8, "x86_64-linux-gnu x86-64-v3", "vpmaddubsw"),
        ("bytes", 4, "x86_64-linux-gnu x86-64-v2", "pmaddubsw"),
        ("sdot", 4, "aarch64-linux-gnu cortex-a76", "sdot"),
        ("widen", 4, "aarch64-linux-gnu cortex-a72", "smull"),
    ],
)
def test_products_of_bytes_compile_to_the_instruction(name: str, lanes: int, target: str, instruction: str) -> None:
    import tvm

    triple, cpu = target.split()
    module = tvm.IRModule({"main": dot_function(name, lanes).with_attr("global_symbol", "main")})
    built = tvm.compile(module, target=tvm.target.Target({"kind": "llvm", "mcpu": cpu, "mtriple": triple}))
    assert instruction in built.mod.inspect_source("asm")


HERE = [(dot.name, lanes) for lanes in (4, 8, 16) for dot in usable_dots(host().features, lanes)]
HERE += [("words", lanes) for name, lanes in HERE if name == "vnni"]


@pytest.mark.parametrize(("name", "lanes"), HERE)
@pytest.mark.parametrize("a", [(255,) * 4, (0, 255, 0, 255), (1, 2, 3, 4), (128,) * 4])
def test_products_of_bytes_are_exact_at_the_extremes(
    name: str, lanes: int, a: tuple[int, ...], run_kernel: Compile
) -> None:
    from planish.compilers.cpu.machine import DOTS

    dot = DOTS[name]
    rows = [(127,) * 4, (-128,) * 4, (127, -128, 127, -128), (-1, 1, -1, 1), (0,) * 4]
    b = np.array((rows * 4)[:lanes])[:, : dot.depth].astype(np.int16 if name == "words" else np.int8)
    data = (np.array(a)[: dot.depth] - (128 if name == "sdot" else 0)).astype(dot.data)
    # The saturating 16-bit sums of vpmaddubsw would give 32767 for 2 * 255 * 127.
    expected = b.astype(np.int64) @ data.astype(np.int64)
    output = run_kernel(dot_function(name, lanes), [data[None], b[None]], (1, lanes), "int32")
    np.testing.assert_array_equal(output[0], expected)


# -- batch norm -------------------------------------------------------------------------------------------------------


class AfterAddition(nn.Module):
    """Pre-activation as in ResNet v2: the norm follows an addition, so that no weight can take it up."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.norm = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8, eps=0.1)
        self.last = nn.Conv2d(8, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.last(F.relu(self.norm(self.a(x) + self.b(x))))
        return result


class ReadTwice(nn.Module):
    """The convolution's own output is needed beside its normalised one."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8, eps=0.1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        result: Tensor = y + self.norm(y)
        return result


NORMS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    # An epsilon and a momentum that differ much: mistaking one for the other shows.
    "after a convolution": (
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, eps=0.5, momentum=0.9)),
        (1, 3, 6, 6),
    ),
    "after one with a bias of its own and depthwise": (
        nn.Sequential(nn.Conv2d(3, 3, 3, groups=3), nn.BatchNorm2d(3, eps=0.1), nn.ReLU()),
        (1, 3, 6, 6),
    ),
    "without factor and offset": (
        nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8, affine=False)),
        (1, 3, 6, 6),
    ),
    "after a dense layer": (nn.Sequential(nn.Linear(7, 5), nn.BatchNorm1d(5, eps=0.1), nn.Tanh()), (2, 7)),
    "after an addition": (AfterAddition(), (1, 3, 6, 6)),
    "before everything": (
        nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 8, 3, padding=1)),
        (1, 3, 6, 6),
    ),
    "alone": (nn.Sequential(nn.BatchNorm2d(3, eps=0.1)), (2, 3, 6, 6)),
    "beside its own input": (ReadTwice(), (1, 3, 6, 6)),
}


def with_statistics(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for norm in model.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            assert norm.running_mean is not None
            assert norm.running_var is not None
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.01, 2)
            if norm.affine:
                nn.init.uniform_(norm.weight, -2, -0.5)  # negative: a ReLU must not be moved across it
                nn.init.normal_(norm.bias)
    return model.eval()


@pytest.mark.parametrize("name", NORMS)
def test_a_batch_norm_with_random_statistics_equals_torchs(
    name: str, compile_model: Compile, difference: Compile
) -> None:
    model, shape = NORMS[name]
    assert difference(compile_model(with_statistics(model), shape)) <= 1e-5


@pytest.mark.parametrize("name", ["after a convolution", "without factor and offset", "after a dense layer"])
def test_a_batch_norm_after_a_product_is_folded_into_its_weights(name: str) -> None:
    from planish.compilers.tvm_build import cpu_machine
    from planish.compilers.tvm_frontend import import_program
    from planish.compilers.tvm_graph import Graph
    from planish.compilers.tvm_lower import lower

    model, shape = NORMS[name]
    program = torch.export.export(with_statistics(model), (torch.zeros(shape),))
    lowered = lower(Graph(import_program(program)), cpu_machine(host()))
    assert len(lowered.calls) == 1
    assert not [
        word for word in ("R.multiply", "R.add", "R.subtract", "R.divide") if word in lowered.module["main"].script()
    ]


# -- the runtime alone ------------------------------------------------------------------------------------------------


def test_an_artifact_runs_with_tvms_runtime_library_and_without_torch(compile_model: Compile) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 5), nn.Softmax(-1)).eval()
    artifact = compile_model(model, (1, 3, 6, 6))
    code = f"""
        import sys
        from pathlib import Path
        import numpy as np
        from planish.compilers import child, manifest
        folder = Path({str(artifact.path)!r})
        loaded = child._load(folder, None)
        with np.load(folder / manifest.EXAMPLES) as examples:
            worst = max(np.abs(loaded.run(x) - y).max() for x, y in zip(examples["inputs"], examples["outputs"]))
        assert not [name for name in sys.modules if name == "torch" or name.startswith("torch.")]
        libraries = {{line.split("/")[-1].strip() for line in open("/proc/self/maps") if ".so" in line}}
        assert any("tvm_runtime" in name for name in libraries), libraries
        assert not any(name in ("libtvm.so", "libtvm_compiler.so") for name in libraries), libraries
        print(worst)
    """
    if not Path("/proc/self/maps").exists():
        pytest.skip("only Linux tells which libraries a process has loaded")
    # Softmax gives probabilities: an absolute difference is a relative one.
    assert float(child(code, TVM_USE_RUNTIME_LIB="1")) < 1e-6
