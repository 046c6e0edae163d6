"""A user's model as a table of layers, by torch.export."""

from __future__ import annotations

import copy
import io
import linecache
import logging
import os
import traceback
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import Node

from .aliases import first_names


class TraceError(ValueError):
    """A model cannot be traced; the message is one line with the reason and the source line."""


@dataclass(frozen=True)
class Layer:
    """One operation of the traced model, or all calls of one module with parameters.

    `name` is the module's path for an operation that reads parameters and `path:operation` for any other. Shapes are
    those of the first call, without the batch; `macs` counts every call. `inputs` names the layers that are read.
    `obstacle` says why the module cannot be replaced by another one; it is empty when it can.
    """

    name: str
    op: str
    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    macs: int
    parameters: int
    inputs: tuple[str, ...] = ()
    calls: int = 1
    obstacle: str = ""


@dataclass(frozen=True, eq=False)
class TracedModel:
    """A copy of the user's model in eval mode, one example input (1, ...), its layers in order of execution, and
    the shape (1, ...) of its output."""

    module: nn.Module
    example: Tensor
    layers: tuple[Layer, ...]
    output_shape: tuple[int, ...]

    def feeds(self) -> Mapping[str, tuple[str, ...]]:
        """The layers that read each layer's output, by the layer's name."""
        readers: dict[str, list[str]] = {layer.name: [] for layer in self.layers}
        for layer in self.layers:
            for source in layer.inputs:
                readers[source].append(layer.name)
        return {name: tuple(names) for name, names in readers.items()}


def trace(model: nn.Module, example: Tensor) -> TracedModel:
    """Traces a copy of the model on the first item of `example`, shape (n, ...).

    Raises:
        TraceError: the model does not run on the example, cannot be exported, or does not return one tensor.
    """
    if example.ndim < 1 or len(example) < 1:
        raise TraceError(f"the example has shape {tuple(example.shape)}; it needs a batch dimension of at least 1")
    module = _copy(model)
    example = example[:1].detach().cpu().clone()
    given = example.clone()
    try:
        with torch.no_grad():
            output = module(example)
    except Exception as error:
        shape = tuple(example.shape)
        raise TraceError(f"the model does not run on an input of shape {shape}: {reason_of(error)}") from None
    if not torch.equal(example.nan_to_num(), given.nan_to_num()):
        raise TraceError(
            "the model writes to its input, which others read too: it is normalised in place, say (`x -= mean`); "
            "write `x = x - mean`"
        )
    if not isinstance(output, Tensor):
        raise TraceError(f"the model returns a {type(output).__name__}; wrap it in a module that returns one tensor")
    if output.ndim < 1 or len(output) != 1:
        raise TraceError(f"the model returns shape {tuple(output.shape)} for one input; the batch must come first")
    try:
        with _quiet():
            program = torch.export.export(module, (example,))
    except Exception as error:
        raise TraceError(f"the model cannot be traced: {reason_of(error)}") from None
    if not all(isinstance(size, int) for size in _result(program).shape):
        raise TraceError("the model cannot be traced: the shape of its output depends on the values of its input")
    return TracedModel(module, example, _layers(program, module), tuple(output.shape))


def macs_of(node: Node) -> int:
    """Multiply-accumulates of one exported operation; 0 for what does not multiply matrices."""
    op = _op(node)
    inputs = [_tensor(source) for source in node.all_input_nodes]
    output = _tensor(node)
    if output is None or not inputs or inputs[0] is None:
        return 0
    first, second = inputs[0], inputs[1] if len(inputs) > 1 else inputs[0]
    if op in ("conv1d", "conv2d", "conv3d") and second is not None:
        return output.numel() * second[0].numel()
    if op.startswith("conv_transpose") and second is not None:
        return first.numel() * second[0].numel()
    if op in ("linear", "matmul", "mm", "bmm"):
        return output.numel() * first.shape[-1]
    if op == "addmm" and second is not None:
        return output.numel() * second.shape[-1]
    if op == "scaled_dot_product_attention" and second is not None:
        return first.numel() * second.shape[-2] + output.numel() * second.shape[-2]
    if op in ("gru", "lstm", "rnn_tanh", "rnn_relu"):
        return first.shape[:-1].numel() * sum(w.numel() for w in inputs[1:] if w is not None and w.ndim == 2)
    return 0


# What students train, whatever the user froze.
_TRAINED = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear, nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm,
)  # fmt: skip


def _copy(model: nn.Module) -> nn.Module:
    """A copy on the CPU in eval mode; a model that is one layer becomes a sequence of one, so that it has a name."""
    try:
        module = copy.deepcopy(model).cpu().eval()
    except Exception as error:
        raise TraceError(f"the model cannot be copied: {reason_of(error)}") from None
    for layer in module.modules():
        if isinstance(layer, _TRAINED):
            # Frozen for transfer learning, or to be used: what compression spoils is theirs to make up.
            for parameter in layer.parameters(recurse=False):
                parameter.requires_grad_(parameter.is_floating_point())
        if type(layer) is nn.Conv2d and isinstance(layer.padding, str):
            total = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
            if layer.padding == "valid":
                layer.padding = (0, 0)
            elif not any(size % 2 for size in total):
                layer.padding = (total[0] // 2, total[1] // 2)
    return module if next(module.children(), None) is not None else nn.Sequential(module)


def _layers(program: ExportedProgram, module: nn.Module) -> tuple[Layer, ...]:
    first = first_names(module)
    stored = {
        spec.arg.name: _canonical(str(spec.target), first)
        for spec in program.graph_signature.input_specs
        if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER) and hasattr(spec.arg, "name")
    }
    obstacles = _obstacles(program, stored, first)
    names: dict[Node, tuple[str, ...]] = {}
    layers: dict[str, Layer] = {}
    for node in program.graph.nodes:
        if node.op != "call_function":
            continue
        sources = [source for source in node.all_input_nodes if source.name not in stored]
        inputs = tuple(dict.fromkeys(name for source in sources for name in names.get(source, ())))
        output = _tensor(node)
        if output is None or "getitem" in str(node.target):
            names[node] = inputs
            continue
        name = _name(node, stored, first)
        names[node] = (name,)
        shapes = [tuple(value.shape[1:]) for source in sources if (value := _tensor(source)) is not None]
        parameters = sum(p.numel() for p in module.get_submodule(name).parameters(False)) if ":" not in name else 0
        layer = Layer(
            name,
            _op(node),
            shapes[0] if shapes else (),
            tuple(output.shape[1:]),
            macs_of(node),
            parameters,
            inputs,
            obstacle=obstacles.get(name, ""),
        )
        known = layers.get(name)
        if known is not None:
            both = tuple(dict.fromkeys(known.inputs + inputs))
            layer = replace(known, macs=known.macs + layer.macs, calls=known.calls + 1, inputs=both)
        layers[name] = layer
    return tuple(layers.values())


def _obstacles(program: ExportedProgram, stored: Mapping[str, str], first: Mapping[str, str]) -> dict[str, str]:
    """Modules whose parameters are read by something else than their own forward, with the reason."""
    found: dict[str, str] = {}
    for node in program.graph.nodes:
        if node.op != "placeholder" or node.name not in stored:
            continue
        module, _, parameter = stored[node.name].rpartition(".")
        owners = sorted({_owner(user, first) for user in node.users} - {module})
        if owners:
            where = owners[0] or "the model's own forward"
            found[module] = f"its {parameter} is also read by {where}"
            found.update(dict.fromkeys(owners, f"it shares its {parameter} with {module or 'the model'}"))
    return found


def _canonical(target: str, first: Mapping[str, str]) -> str:
    """The name of a parameter by the first name of its module."""
    module, dot, parameter = target.rpartition(".")
    return f"{first.get(module, module)}{dot}{parameter}"


def _name(node: Node, stored: Mapping[str, str], first: Mapping[str, str]) -> str:
    """The path of the module whose parameters the operation reads, or a name that only this operation has."""
    owner = _owner(node, first)
    modules = [stored[source.name].rpartition(".")[0] for source in node.all_input_nodes if source.name in stored]
    if owner and owner in modules:
        return owner
    if modules and modules[0]:
        return modules[0]
    return f"{owner}:{node.name}"


def _owner(node: Node, first: Mapping[str, str]) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    paths = [str(path) for path, _ in stack.values()]
    return first.get(paths[-1], paths[-1]) if paths else ""


def _op(node: Node) -> str:
    packet = getattr(node.target, "overloadpacket", None)
    name = str(packet).rpartition(".")[2] if packet is not None else str(getattr(node.target, "__name__", node.target))
    return name.rstrip("_")


def _tensor(node: Node) -> Tensor | None:
    """What the operation returns, the first if it returns several."""
    value = node.meta.get("val")
    if isinstance(value, tuple | list) and value:
        value = value[0]
    return value if isinstance(value, Tensor) else None


def _result(program: ExportedProgram) -> Tensor:
    (output,) = (node for node in program.graph.nodes if node.op == "output")
    value = _tensor(output.all_input_nodes[0])
    assert value is not None  # the eager run returned one tensor
    return value


def reason_of(error: Exception) -> str:
    """The first line of the message and the innermost line of code that is neither torch's nor this package's."""
    text = str(error).strip() or type(error).__name__
    reason = " ".join(text.splitlines()[0].split())
    if "data-dependent" in reason:
        reason = "control flow or a shape depends on the values of the input"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if _is_users(frame.filename)]
    if not frames:
        return reason
    frame = frames[-1]
    line = (frame.line or linecache.getline(frame.filename, frame.lineno or 0)).strip()
    code = f" in `{' '.join(line.split())}`" if line else ""
    file = os.path.relpath(frame.filename)
    return f"{reason}{code} ({frame.filename if file.startswith('..') else file}:{frame.lineno})"


def _is_users(filename: str) -> bool:
    folders = [os.path.dirname(os.path.realpath(file)) + os.sep for file in (torch.__file__, __file__)]
    return not filename.startswith("<") and not any(os.path.realpath(filename).startswith(f) for f in folders)


@contextmanager
def _quiet() -> Iterator[None]:
    """Hides what torch.export logs and prints about a failure: TraceError says it in one line."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
