"""Where values lie in others: against torch, on random chains of permutations, cuts and reshapes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from planish.compilers.tvm_frontend import import_program
from planish.compilers.tvm_graph import Graph, same
from planish.compilers.tvm_views import in_place

pytestmark = pytest.mark.tvm


class Moves(nn.Module):
    """Twice its input, moved, and a tenth of that: what is looked at lies between two computed values."""

    def __init__(self, move: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.move = move

    def forward(self, x: Tensor) -> Tensor:
        return self.move(x * 2) / 10


def looked_up(move: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> tuple[Graph, Any, Any]:
    graph = Graph(import_program(torch.export.export(Moves(move), (torch.zeros(shape),))))
    end = next(
        node for node in graph.nodes if node.op in ("relax.divide", "relax.multiply") and node is graph.nodes[-1]
    )
    base, place = in_place(graph, end.args[0])
    return graph, base, place


def read(values: Tensor, place: Any, shape: tuple[int, ...]) -> Tensor:
    """What lies at a place, read as its definition says."""
    flat = values.reshape(-1)
    return torch.as_strided(flat, shape, place.strides, place.offset)


MOVES: dict[str, tuple[tuple[int, ...], Callable[[Tensor], Tensor]]] = {
    "index": ((2, 5, 24), lambda x: x.reshape(2, 5, 3, 2, 4).permute(2, 0, 3, 1, 4)[1].transpose(1, 2)),
    "unbind": ((2, 5, 24), lambda x: x.reshape(2, 5, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)[2]),
    "chunk": ((2, 5, 24), lambda x: x.chunk(3, -1)[1].reshape(2, 5, 2, 4)),
    "uneven split": ((2, 7, 3), lambda x: torch.split(x, [2, 4, 1], 1)[1].permute(2, 0, 1)),
    "slice": ((4, 9, 6), lambda x: x[1:, 2:8:3, ::2]),
    "narrow": ((4, 9), lambda x: x.narrow(1, 2, 3).narrow(0, -2, 1)),
    "from the end": ((4, 9, 2), lambda x: x[:, -2].select(0, -1)),
    "squeeze": ((3, 1, 4), lambda x: x.squeeze(1).unsqueeze(0).transpose(0, 2)),
    "one of many": ((3, 4), lambda x: x.index_select(1, torch.tensor([2]))),
}


@pytest.mark.parametrize("name", MOVES)
def test_what_is_moved_is_read_where_it_lies(name: str) -> None:
    shape, move = MOVES[name]
    graph, base, place = looked_up(move, shape)
    assert same(base, graph.nodes[0].var)
    assert place.shape == shape
    x = torch.randn(shape)
    moved = move(x)
    assert torch.equal(read(x, place, tuple(moved.shape)), moved)


def test_where_a_step_has_to_copy_the_rest_is_read_in_the_copy() -> None:
    def move(x: Tensor) -> Tensor:
        return x.transpose(0, 1).reshape(12).reshape(2, 6)[1]

    graph, base, place = looked_up(move, (3, 4))
    copied = graph.producers[base]
    assert copied.op == "relax.permute_dims"
    x = torch.randn(3, 4)
    assert torch.equal(read(x.t().contiguous(), place, (6,)), move(x))


def test_several_indices_are_no_place() -> None:
    place = looked_up(lambda x: x.index_select(0, torch.tensor([2, 0])), (3, 4))[2]
    assert place.shape == (2, 4)
    assert place.offset == 0


@settings(max_examples=10, derandomize=True, deadline=None)
@given(data=st.data())
def test_random_chains_are_read_where_they_lie(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 4), min_size=2, max_size=4)))
    steps: list[tuple[str, Any]] = []
    current = torch.zeros(shape)
    for _ in range(data.draw(st.integers(1, 4))):
        kind = data.draw(st.sampled_from(["permute", "select", "narrow", "split", "flatten"]))
        if kind == "permute":
            step: Any = data.draw(st.permutations(range(current.ndim)))
        elif kind == "split":
            step = data.draw(st.integers(0, current.ndim - 1))
            current = torch.zeros(*current.shape[:step], 1, *current.shape[step:])
        else:
            axis = data.draw(st.integers(0, current.ndim - 1))
            place = data.draw(st.integers(0, current.shape[axis] - 1))
            step = (axis, place, data.draw(st.integers(1, current.shape[axis] - place)))
            if kind == "select" and current.ndim < 2:
                continue
        steps.append((kind, step))
        if kind != "split":
            current = applied(current, kind, step)

    def move(x: Tensor) -> Tensor:
        for kind, step in steps:
            x = applied(x, kind, step)
        return x

    graph, base, place = looked_up(move, shape)
    x = torch.randn(shape)
    moved = move(x)
    if same(base, graph.nodes[0].var):
        assert torch.equal(read(x, place, tuple(moved.shape)), moved)
    else:
        assert any(kind == "flatten" for kind, _ in steps)


def applied(x: Tensor, kind: str, step: Any) -> Tensor:
    if kind == "permute":
        return x.permute(*step)
    if kind == "split":
        return x.unsqueeze(step)
    if kind == "flatten":
        return x.flatten()
    axis, place, length = step
    return x.select(axis, place) if kind == "select" else x.narrow(axis, place, length)


class SelfAttention(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.qkv, self.out = nn.Linear(48, 144), nn.Linear(48, 48)
        self.single = nn.ModuleList(nn.Linear(48, 48) for _ in range(3))
        self.whole = nn.MultiheadAttention(48, 3, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        n, t, width = x.shape
        if self.kind == "whole":
            result: Tensor = self.whole(x, x, x, need_weights=False)[0]
            return result
        if self.kind in ("index", "unbind"):
            moved = self.qkv(x).reshape(n, t, 3, 3, 16).permute(2, 0, 3, 1, 4)
            q, k, v = moved.unbind(0) if self.kind == "unbind" else (moved[0], moved[1], moved[2])
        else:
            parts = self.qkv(x).chunk(3, -1) if self.kind == "chunk" else [layer(x) for layer in self.single]
            q, k, v = (part.reshape(n, t, 3, 16).transpose(1, 2) for part in parts)
        heads = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.out(heads.transpose(1, 2).reshape(n, t, width))  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", ["index", "unbind", "chunk", "single", "whole"])
def test_attention_copies_none_of_its_operands(compile_model: Any, difference: Callable[..., float], kind: str) -> None:
    torch.manual_seed(0)
    artifact = compile_model(SelfAttention(kind).eval(), (2, 9, 48))
    assert difference(artifact) <= artifact.manifest.tolerance
    names = [kernel.partition("_")[0] for kernel, _ in artifact.manifest.kernels]
    # What torch's own module turns around its whole batch stays: before the first layer, and behind attention.
    allowed = {"dense", "attention"} | ({"transpose", "fused"} if kind == "whole" else set())
    assert set(names) <= allowed, names
    assert names.count("attention") == 1
