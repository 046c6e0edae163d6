"""What runs a model: Planish's artifact and its peers, each checked against torch and timed the same way."""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from planish.compilers.cores import limit_cores
from planish.compilers.loader import LOADERS
from planish.compilers.manifest import read
from planish.compilers.registry import compiler_for
from planish.compilers.verify import FLOAT_TOLERANCE, INT8_TOLERANCE
from planish.hwmodels.device import parse_device
from planish.spaces.apply import apply
from planish.spaces.bfloat16_ops import Bfloat16Conv2d, Bfloat16Linear
from planish.spaces.integer import IntegerConv2d, IntegerLinear, WeightOnlyLinear
from planish.spaces.propose import propose
from planish.spaces.quantize import deploy
from planish.spaces.space import Candidate, Kind
from planish.spaces.trace import trace


class Engine(Protocol):
    """A model that is ready to run in this process on one input."""

    def output(self) -> np.ndarray[Any, Any]:
        """What the model computes."""
        ...

    def run(self) -> None:
        """Computes it once more."""
        ...


class Planish:
    """The artifact that `planish export` would write, through TVM's runtime alone.

    `compile_s` are the seconds from an exported program to an artifact, on one core: with no kernel at hand, and once
    more with all.
    """

    def __init__(self, module: nn.Module, x: Tensor, threads: int, quantised: bool) -> None:
        limit_cores(1)  # what it compiles on; the peers' times to load a model are not compared
        device = parse_device("cpu" if threads == 1 else f"cpu?threads={threads}")
        program = torch.export.export(module, (x,))
        compiler, tolerance = compiler_for(device), INT8_TOLERANCE if quantised else FLOAT_TOLERANCE
        with tempfile.TemporaryDirectory() as folder:
            os.environ["PLANISH_CACHE"] = str(Path(folder, "cache"))
            self.compile_s = []
            for name in ("cold", "warm"):
                start = time.perf_counter()
                compiler.compile(program, device, Path(folder, name), x[None], tolerance=tolerance)
                self.compile_s.append(time.perf_counter() - start)
            manifest = read(Path(folder, "cold"))
            # TVM's pool takes its size from here when it first runs something in parallel.
            os.environ["TVM_NUM_THREADS"] = str(threads)
            allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
            self._loaded = LOADERS[manifest.compiler](Path(folder, "cold"), manifest)
            self._output = self._loaded.run(x.numpy())
            self._pinned = os.sched_getaffinity(0) if allowed else None
        self._allowed = allowed
        self.leave()

    def output(self) -> np.ndarray[Any, Any]:
        return self._output

    def enter(self) -> None:
        """Pins the calling thread as the loader does; the peers get it unpinned."""
        if self._pinned:
            os.sched_setaffinity(0, self._pinned)

    def leave(self) -> None:
        """Undoes `enter`."""
        if self._allowed:
            os.sched_setaffinity(0, self._allowed)

    def run(self) -> None:
        # The call that a user's loop makes, not TVM's own timer, because the peers are called from Python too.
        self._loaded._vm.invoke_stateful("main")  # type: ignore[attr-defined]


class OnnxRuntime:
    """ONNX Runtime on the ONNX form, all graph optimisations, inputs and outputs bound."""

    def __init__(self, onnx_file: str, x: Tensor, threads: int) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        self._session = onnxruntime.InferenceSession(onnx_file, options, providers=["CPUExecutionProvider"])
        self._binding = self._session.io_binding()
        self._binding.bind_cpu_input(self._session.get_inputs()[0].name, x.numpy())
        self._binding.bind_output(self._session.get_outputs()[0].name)

    def output(self) -> np.ndarray[Any, Any]:
        self.run()
        return self._binding.copy_outputs_to_cpu()[0]  # type: ignore[no-any-return]

    def run(self) -> None:
        self._session.run_with_iobinding(self._binding)


class OpenVino:
    """OpenVINO on the ONNX form, latency mode; floats are named, because it would take bf16 where the CPU has it."""

    def __init__(self, onnx_file: str, x: Tensor, threads: int, floats: str = "f32") -> None:
        import openvino

        settings = {
            "INFERENCE_PRECISION_HINT": floats,
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
        }
        core = openvino.Core()
        self._request = core.compile_model(core.read_model(onnx_file), "CPU", settings).create_infer_request()
        self._request.set_input_tensor(openvino.Tensor(x.numpy()))

    def output(self) -> np.ndarray[Any, Any]:
        self.run()
        return np.array(self._request.get_output_tensor().data)

    def run(self) -> None:
        self._request.infer()


class TorchCompile:
    """torch.compile with its default backend, weights frozen."""

    def __init__(self, module: nn.Module, x: Tensor, threads: int) -> None:
        import torch._inductor.config

        torch._inductor.config.freezing = True
        torch.set_num_threads(threads)
        self._module = torch.compile(module)
        self._x = x

    def output(self) -> np.ndarray[Any, Any]:
        with torch.no_grad():
            return self._module(self._x).numpy()  # type: ignore[no-any-return]

    def run(self) -> None:
        with torch.no_grad():
            self._module(self._x)


def folded(module: nn.Module) -> nn.Module:
    """The module with every batch norm folded into the convolution before it, as every engine would."""
    from torch.fx.experimental.optimization import fuse

    return fuse(module) if any(isinstance(layer, nn.BatchNorm2d) for layer in module.modules()) else module


def quantised(module: nn.Module, calibration: Tensor, bits: int | str = 8) -> nn.Module:
    """Every convolution and linear layer that has the option with it, as the search makes it.

    8 and 4 are the bits of weights whose layers have int8 inputs, "w8" and "w4" of weights alone; "bf16" is bfloat16.
    """
    traced = trace(module, calibration[:1])
    proposal = propose(traced, families=(Kind.BITS,), bfloat16=True)
    everywhere = Candidate({c.name: bits if bits in c.options else None for c in proposal.space.choices})
    return apply(everywhere, traced, proposal, calibration)


class _Simulated(nn.Module):
    """An integer layer in the form that peers recognise: quantise-dequantise pairs around a float layer."""

    def __init__(self, layer: IntegerConv2d | IntegerLinear) -> None:
        super().__init__()
        self.layer = layer
        channels = [-1] + [1] * (layer.weight.ndim - 1)
        self.weight_scale = layer.scale / layer.input_scale
        # A parameter, because the ONNX exporter computes what depends on constants alone.
        self.weight = nn.Parameter(layer.weight.float() * self.weight_scale.reshape(channels), requires_grad=False)
        self.zeros = torch.zeros(len(layer.weight), dtype=torch.int32)

    def forward(self, x: Tensor) -> Tensor:
        layer = self.layer
        x = torch.fake_quantize_per_tensor_affine(x, layer.input_scale, layer.zero_point, 0, 255)
        weight = torch.fake_quantize_per_channel_affine(self.weight, self.weight_scale, self.zeros, 0, -128, 127)
        if isinstance(layer, IntegerLinear):
            return functional.linear(x, weight, layer.bias)
        return functional.conv2d(x, weight, layer.bias, layer.stride, layer.padding, layer.dilation, layer.groups)


class _SimulatedWeights(nn.Module):
    """A layer of whole weights in that form: they alone are dequantised."""

    def __init__(self, layer: WeightOnlyLinear) -> None:
        super().__init__()
        self.layer = layer
        self.weight = nn.Parameter(layer.weight.float() * layer.scale[:, None], requires_grad=False)
        self.zeros = torch.zeros(len(layer.weight), dtype=torch.int32)

    def forward(self, x: Tensor) -> Tensor:
        weight = torch.fake_quantize_per_channel_affine(self.weight, self.layer.scale, self.zeros, 0, -128, 127)
        return functional.linear(x, weight, self.layer.bias)


class _Rounded(nn.Module):
    """A layer of bfloat16 in float32: its inputs are not rounded, unless the peer does it."""

    def __init__(self, layer: Bfloat16Conv2d | Bfloat16Linear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        layer = self.layer
        if isinstance(layer, Bfloat16Linear):
            return functional.linear(x, layer.weight, layer.bias)
        return functional.conv2d(x, layer.weight, layer.bias, layer.stride, layer.padding, layer.dilation, layer.groups)


def simulated(module: nn.Module) -> nn.Module:
    """The deployed form with its integer layers simulated: the same model, as ONNX can say it."""
    result = deploy(module)
    for name, layer in list(result.named_modules()):
        if isinstance(layer, IntegerConv2d | IntegerLinear):
            result.set_submodule(name, _Simulated(layer))
        elif isinstance(layer, WeightOnlyLinear):
            result.set_submodule(name, _SimulatedWeights(layer))
        elif isinstance(layer, Bfloat16Conv2d | Bfloat16Linear):
            result.set_submodule(name, _Rounded(layer))
    return result.eval()


def write_onnx(module: nn.Module, x: Tensor, path: str, quantised: bool) -> None:
    """The ONNX form of a module, operator set 17."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # Folding would hide from a peer that the weights are integers.
        torch.onnx.export(module, (x,), path, dynamo=False, opset_version=17, do_constant_folding=not quantised)
