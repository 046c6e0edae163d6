"""Builds the table of a space's options: the error of each on the original's own inputs, and what each site costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from torch import nn

from ..hwmodels.cycles import CountedCycles
from ..hwmodels.device import server_address
from ..hwmodels.latency import LatencyModel
from ..hwmodels.roofline import Roofline
from ..hwmodels.table import TableModel
from ..hwmodels.workload import Workload
from ..spaces.layer_shapes import LayerShape, layers_at, shape_of
from ..spaces.local_error import LocalErrors
from ..spaces.propose import extent_of
from ..spaces.prune import Group, kept_channels
from ..spaces.size import count_macs, stored_bytes
from ..spaces.space import Kind, Option, SearchSpace
from .objective import split_metric
from .option_table import Array, OptionTable, Site, every_level, undominated

if TYPE_CHECKING:
    from ..hwmodels.transfer import TransferModel
    from .evaluate import Evaluator


# States of the shared choices of a layer that are looked at together. A layer behind a concatenation of many others
# (DenseNet) has thousands of them; beyond this its narrowest inputs are looked at by themselves.
_MOST_STATES = 1024


def option_table(
    evaluator: Evaluator, errors: LocalErrors, costs: Sequence[str], *, every: bool = False
) -> OptionTable:
    """The table of an evaluator's space.

    Args:
        evaluator: With the model, the space and the devices.
        errors: Of the space's options.
        costs: The names of objectives and budgets that are costs: `latency[DEVICE]`, `size`, `macs`; others do not add
            up over sites, and latencies and MACs stand for them.
        every: Keep combinations that others beat.
    """
    space = evaluator.proposal.space
    names = [name for name in costs if split_metric(name)[0] in ("latency", "size", "macs")]
    if len(names) < len(costs):
        # What saves only memory or energy has to be worth something: these are near what they hang on.
        names += [name for name in (*(f"latency[{label}]" for label in evaluator.devices), "macs") if name not in names]
    option_errors = tuple(np.array(errors.errors[choice.name]) for choice in space.choices)
    layers = _layers(evaluator)
    drafts = [_combinations(evaluator, layer, option_errors) for layer in layers]
    apart = [_alone(evaluator, layer) for layer in layers]
    known = {_timed(part) for draft in drafts for parts in draft.standing.values() for part in parts}
    known |= {_timed(part) for one in apart for parts in one.values() for part in parts}
    seconds = {
        name: _seconds(evaluator, label, sorted(known, key=repr))
        for name in names
        if (label := split_metric(name)[1]) is not None
    }
    sites, left_out = [], dict(errors.failed)
    for draft in drafts:
        site = _site(draft, space, names, seconds)
        if not every:
            site, beaten = _worthwhile(site, space)
            left_out |= beaten
        sites.append(site)
    table = OptionTable(
        space=space,
        shared_errors={p: option_errors[p] for p, c in enumerate(space.choices) if c.kind is Kind.PRUNE},
        shared_costs=_shared_costs(evaluator, names, layers, apart, seconds),
        sites=tuple(sites),
        fixed=dict.fromkeys(names, 0.0),
        option_errors=option_errors,
        left_out=left_out,
    )
    zero = np.zeros((1, len(space.choices)), dtype=np.int64)
    own = {name: float(table.cost(name, zero)[0]) for name in names}
    whole = own | _original(evaluator, names)
    return replace(table, fixed={name: max(0.0, whole[name] - own[name]) for name in names})


@dataclass(frozen=True)
class _Layer:
    """A convolution or linear layer whose costs hang on choices.

    `inside` and `outside` give, for its input and its output, the pruning choices and the positions that one channel of
    the group takes there; `apart` those of its input that are looked at by themselves.
    """

    name: str
    shape: LayerShape
    calls: int
    inside: Mapping[int, int]
    outside: Mapping[int, int]
    own: tuple[int, ...]
    apart: Mapping[int, int]

    @property
    def shared(self) -> tuple[int, ...]:
        return tuple(sorted({*self.inside, *self.outside}))


@dataclass(frozen=True)
class _Draft:
    """A layer with the combinations of its own options, and what stands there for every state of the shared choices."""

    layer: _Layer
    combinations: NDArray[np.int64]
    errors: Array
    standing: Mapping[tuple[tuple[int, ...], int], tuple[LayerShape, ...]]


def _layers(evaluator: Evaluator) -> list[_Layer]:
    """Every layer that has choices, or loses channels with one that has."""
    space, groups = evaluator.proposal.space, evaluator.proposal.groups
    places = {choice.name: place for place, choice in enumerate(space.choices)}
    found = []
    for layer in evaluator.traced.layers:
        module = None if ":" in layer.name else evaluator.traced.module.get_submodule(layer.name)
        if type(module) not in (nn.Conv2d, nn.Linear):
            continue
        assert isinstance(module, nn.Conv2d | nn.Linear)
        if isinstance(module.padding if isinstance(module, nn.Conv2d) else 0, str):
            continue
        sides: dict[str, dict[int, int]] = {"in": {}, "out": {}}
        for site, group in groups.items():
            for member in group.members:
                if member.name == layer.name and member.role != "parameter":
                    for side in ("in", "out") if member.role == "both" else (member.role,):
                        sides[side][places[f"{site}:{Kind.PRUNE.value}"]] = len(member.indices[0])
        names = [f"{layer.name}:{kind.value}" for kind in Kind if kind is not Kind.PRUNE]
        own = tuple(places[name] for name in names if name in places)
        if own or sides["in"] or sides["out"]:
            extent = extent_of(layer)
            inside, apart = _coupled(evaluator, sides["in"], sides["out"])
            shape = shape_of(module, extent.reads)
            found.append(_Layer(layer.name, shape, layer.calls, inside, sides["out"], own, apart))
    return found


def _coupled(
    evaluator: Evaluator, inside: Mapping[int, int], outside: Mapping[int, int]
) -> tuple[dict[int, int], dict[int, int]]:
    """The pruning choices of a layer's input that are looked at with its output's, the widest first, and the rest."""
    choices, groups = evaluator.proposal.space.choices, evaluator.proposal.groups
    states = prod(len(choices[place].options) for place in outside)
    coupled: dict[int, int] = {}
    for place in sorted(inside, key=lambda place: (-inside[place] * groups[choices[place].site].width, place)):
        if place not in outside:
            states *= len(choices[place].options)
        if states > _MOST_STATES:
            break
        coupled[place] = inside[place]
    return coupled, {place: size for place, size in inside.items() if place not in coupled}


def _alone(evaluator: Evaluator, layer: _Layer) -> dict[tuple[int, int], tuple[LayerShape, ...]]:
    """What stands where a layer loses channels of one of the inputs that are looked at by themselves, by place, level.

    Output, other inputs and numbers are as narrow as they can be, so that what one choice saves there it saves in wider
    layers, too. Where another form of the layer leaves less than that, `OptionTable.cost` has a floor.
    """
    space, lanes = evaluator.proposal.space, evaluator.proposal.lanes
    found = {}
    narrowest = {
        place: _lost(evaluator.proposal.groups[space.choices[place].site], space.choices[place].options[-1])
        for place in layer.shared
    }
    narrow = replace(
        layer.shape,
        inputs=layer.shape.inputs - sum(narrowest[place] * size for place, size in layer.inside.items()),
        outputs=layer.shape.outputs - sum(narrowest[place] * size for place, size in layer.outside.items()),
    )
    options = {
        space.choices[p].kind: space.choices[p].options[-1] for p in layer.own if space.choices[p].kind is Kind.BITS
    }
    for place, size in layer.apart.items():
        group = evaluator.proposal.groups[space.choices[place].site]
        for level, option in enumerate(space.choices[place].options):
            lost = _lost(group, option)
            shape = replace(narrow, inputs=narrow.inputs - size * lost)
            found[place, level] = layers_at(shape, options, lanes, same_channels=False)
    return found


def _shared_costs(
    evaluator: Evaluator,
    names: Sequence[str],
    layers: Sequence[_Layer],
    apart: Sequence[Mapping[tuple[int, int], tuple[LayerShape, ...]]],
    seconds: Mapping[str, Mapping[LayerShape, float]],
) -> dict[str, dict[int, Array]]:
    """What pruning saves outside of all sites: batch norms, and layers that look at a choice by itself."""
    found: dict[str, dict[int, Array]] = {"size": _norm_bytes(evaluator)} if "size" in names else {}
    for layer, one in zip(layers, apart, strict=True):
        for name in names if one else ():
            own = found.setdefault(name, {})
            for (place, level), parts in one.items():
                costs = own.setdefault(place, np.zeros(len(evaluator.proposal.space.choices[place].options)))
                costs[level] += _cost(name, layer, parts, seconds) - _cost(name, layer, one[place, 0], seconds)
    return found


def _cost(
    name: str, layer: _Layer, parts: Sequence[LayerShape], seconds: Mapping[str, Mapping[LayerShape, float]]
) -> float:
    if name in seconds:
        return layer.calls * sum(seconds[name][_timed(part)] for part in parts)
    if name == "macs":
        return float(layer.calls * sum(part.macs for part in parts))
    return float(sum(part.stored_bytes for part in parts))


def _combinations(evaluator: Evaluator, layer: _Layer, errors: Sequence[Array]) -> _Draft:
    """The combinations of a layer's own options that make sense; the first leaves it as it is.

    A block type is not combined with a rank: only the separable block has something to factorise, and the table need
    not hold everything that a candidate may be.
    """
    space, lanes = evaluator.proposal.space, evaluator.proposal.lanes
    kinds = [space.choices[place].kind for place in layer.own]
    rows, sums = [], []
    for levels in every_level([len(space.choices[place].options) for place in layer.own]):
        by_kind = dict(zip(kinds, levels, strict=True))
        total = sum(float(errors[place][level]) for place, level in zip(layer.own, levels, strict=True))
        if not (by_kind.get(Kind.BLOCK) and by_kind.get(Kind.RANK)) and np.isfinite(total):
            rows.append(levels)
            sums.append(total)
    standing = {}
    for state in every_level([len(space.choices[place].options) for place in layer.shared]):
        lost = {
            place: _lost(evaluator.proposal.groups[space.choices[place].site], space.choices[place].options[level])
            for place, level in zip(layer.shared, state, strict=True)
        }
        shape = replace(
            layer.shape,
            inputs=layer.shape.inputs - sum(lost[place] * size for place, size in layer.inside.items()),
            outputs=layer.shape.outputs - sum(lost[place] * size for place, size in layer.outside.items()),
        )
        if layer.shape.groups > 1 and layer.shape.groups == layer.shape.inputs:  # depthwise
            shape = replace(shape, groups=shape.inputs)
        same = {p for p in layer.inside if lost[p]} == {p for p in layer.outside if lost[p]}
        for row, levels in enumerate(rows):
            options = {
                kind: space.choices[place].options[level]
                for kind, place, level in zip(kinds, layer.own, levels, strict=True)
            }
            standing[state, row] = layers_at(shape, options, lanes, same)
    combinations = np.array(rows, dtype=np.int64).reshape(len(rows), len(layer.own))
    return _Draft(layer, combinations, np.array(sums), standing)


def _lost(group: Group, fraction: Option) -> int:
    """The channels that a group loses."""
    return 0 if fraction is None else group.width - kept_channels(group.width, float(fraction))


def _site(
    draft: _Draft, space: SearchSpace, names: Sequence[str], seconds: Mapping[str, Mapping[LayerShape, float]]
) -> Site:
    layer = draft.layer
    sizes = [len(space.choices[place].options) for place in layer.shared]
    costs = {name: np.zeros((*sizes, len(draft.combinations))) for name in names}
    for (state, row), parts in draft.standing.items():
        for name in names:
            costs[name][state][row] = _cost(name, layer, parts, seconds)
    return Site(layer.name, layer.shared, layer.own, draft.combinations, draft.errors, costs)


def _worthwhile(site: Site, space: SearchSpace) -> tuple[Site, dict[str, str]]:
    """The site without the combinations that another one beats, and which options that leaves without any use."""
    rows = [tuple(int(level) for level in row) for row in site.combinations]
    kept, beaten = undominated(rows, site.errors, site.costs)
    used = {(place, int(rows[row][column])) for row in kept for column, place in enumerate(site.own)}
    left_out = {}
    for row, by in beaten.items():
        alone = [(place, level) for place, level in zip(site.own, rows[row], strict=True) if level]
        if len(alone) == 1 and alone[0] not in used:
            better = " with ".join(
                f"{space.choices[p].kind.value} {space.choices[p].options[level]}"
                for p, level in zip(site.own, rows[by], strict=True)
                if level
            )
            choice, level = space.choices[alone[0][0]], alone[0][1]
            left_out[f"{choice.name}={choice.options[level]}"] = (
                f"{better or 'leaving the layer as it is'} spoils no more ({site.errors[by]:.2g} against "
                f"{site.errors[row]:.2g} of the output's variance) and costs no more"
            )
    costs = {name: values[..., kept] for name, values in site.costs.items()}
    return replace(site, combinations=site.combinations[kept], errors=site.errors[kept], costs=costs), left_out


def _timed(layer: LayerShape) -> LayerShape:
    """What decides how long a layer takes: the bits of its weights do, a codebook does not."""
    return replace(layer, entries=0, bias=True)


def _seconds(evaluator: Evaluator, label: str, layers: Sequence[LayerShape]) -> dict[LayerShape, float]:
    # A site for each, so that one prediction tells the seconds of all.
    works = [replace(work, site=str(place)) for place, work in enumerate(_workloads(evaluator, label, layers))]
    found = evaluator.predictor.model(label).predict(works).site_s
    return {layer: found[str(place)] for place, layer in enumerate(layers)}


def latency_model(evaluator: Evaluator, label: str) -> LatencyModel:
    """The best model of a device that costs no measuring.

    By the times that `planish profile` left in the database, of the device or, carried over, of the same processor with
    another number of threads, whichever states the lower error (`model_choice`); the compiler's counted cycles where
    they would be better, and for a device that is only described; the roofline where the compiler has no schedules to
    count.
    """
    device = evaluator.devices[label]
    if evaluator.compilers[label].name != "tvm":
        return Roofline(device)
    from ..compilers.kernel_times import database_of
    from ..compilers.tvm_build import cpu_machine
    from ..hwmodels.kernel_database import DatabaseError
    from .model_choice import best_known

    like_this = device.here or (device.rpc and server_address(device.rpc, device.name)[2] == "cpu")
    counted = (
        CountedCycles(device)
        if like_this
        else CountedCycles.described(device, cpu_machine(device).macs_per_cycle(None))
    )
    if not device.timed:
        return counted
    try:
        known = best_known(device, database_of(device, evaluator.times))
    except DatabaseError:  # `planish profile` tells; a search need not end for it
        return counted
    return counted if known is None or _stated(known) > counted.error else known


def _stated(model: TableModel | TransferModel) -> float:
    """The relative standard deviation of networks."""
    return model.corrector.error if isinstance(model, TableModel) else model.error


def _workloads(evaluator: Evaluator, label: str, layers: Sequence[LayerShape]) -> list[Workload]:
    """What a device's latency model reads of layers."""
    if evaluator.compilers[label].name != "tvm":
        return _plain_workloads(layers)
    from ..compilers.tvm_layers import layer_workloads

    return layer_workloads(evaluator.devices[label])(layers)


def _plain_workloads(layers: Sequence[LayerShape]) -> list[Workload]:
    found = []
    for layer in layers:
        size = layer.bits // 8
        weights = layer.weights * size
        moved = (layer.inputs * prod(layer.reads) + layer.outputs * prod(layer.writes)) * size + weights
        found.append(Workload("", layer.op, {}, layer.macs, moved, layer.bits, weights))
    return found


def _norm_bytes(evaluator: Evaluator) -> dict[int, Array]:
    """What batch norms and other vectors of a group's channels store less, by the group's choice and level."""
    found = {}
    for place, choice in enumerate(evaluator.proposal.space.choices):
        if choice.kind is not Kind.PRUNE:
            continue
        group = evaluator.proposal.groups[choice.site]
        each = sum(_vector_bytes(evaluator, member.name) for member in group.members if member.role == "both")
        found[place] = np.array([-each * _lost(group, option) for option in choice.options], dtype=np.float64)
    return found


def _vector_bytes(evaluator: Evaluator, name: str) -> int:
    """The bytes that a module without a kernel stores for one channel."""
    module = evaluator.traced.module.get_submodule(name)
    if isinstance(module, nn.Conv2d | nn.Linear):
        return 0
    tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    return sum(tensor.element_size() for tensor in tensors if tensor.ndim == 1 and len(tensor) > 1)


def _original(evaluator: Evaluator, names: Sequence[str]) -> dict[str, float]:
    """The whole original's costs, by the same models."""
    from .latency_table import plan_of

    space, traced = evaluator.proposal.space, evaluator.traced
    found: dict[str, float] = {}
    for name in names:
        label = split_metric(name)[1]
        if label is None:
            found[name] = float(
                stored_bytes(traced.module) if name == "size" else count_macs(traced.module, traced.example)
            )
        elif evaluator.compilers[label].name == "tvm":
            model = evaluator.predictor.model(label)
            found[name] = model.predict(plan_of(evaluator, label, space.original()).calls).latency_s
    return found
