from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from planish.search import distill as distill_file
from planish.search.data import Split
from planish.search.data_augment import Augment
from planish.search.distill import DistillError, Epoch, History, Recipe, distill
from planish.search.distill_attention import attention_map
from planish.search.distill_loss import losses, softened_kl
from planish.search.distill_recipe import learning_rate
from planish.search.distill_state import CheckpointError
from planish.search.distill_teacher import Targets


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Network(nn.Module):
    def __init__(self, width: int, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self._fill(width)

    def _fill(self, width: int) -> None:
        self.first = nn.Conv2d(1, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.second = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.drop = nn.Dropout(0.2)
        self.last = nn.Linear(2 * width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x)).relu()
        return self.last(self.drop(self.second(x).relu().mean((2, 3))))  # type: ignore[no-any-return]


def train_split(n: int = 21, augment: Augment | None = None) -> Split:
    """Three classes that differ in which third of the image is bright."""
    generator = torch.Generator().manual_seed(0)
    targets = torch.arange(n) % 3
    inputs = torch.randn(n, 1, 6, 6, generator=generator) / 2
    for i, label in enumerate(targets.tolist()):
        inputs[i, 0, 2 * label : 2 * label + 2] += 2
    return Split(inputs, targets, augment=augment or Augment())


SMALL = Recipe(batch=8, learning_rate=0.05)


def train(student: nn.Module, to_epoch: int, checkpoint: Path | None = None, **changes: object) -> tuple[Epoch, ...]:
    recipe = replace(SMALL, **changes)  # type: ignore[arg-type]
    split = train_split(augment=Augment(shift=1, flip=True))
    teacher = Network(4, seed=1)
    return distill(
        student, teacher, split, to_epoch=to_epoch, total_epochs=4, seed=5, recipe=recipe, checkpoint=checkpoint
    ).epochs


def equal(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize("changes", [{}, {"optimiser": "adamw"}, {"precision": "bfloat16"}])
@pytest.mark.parametrize("augment", [True, False])
@pytest.mark.parametrize("stops", [(1,), (2,), (1, 2, 3)])
def test_a_restart_gives_bit_for_bit_the_uninterrupted_student(
    tmp_path: Path, changes: dict[str, Any], augment: bool, stops: tuple[int, ...]
) -> None:
    whole = Network(2, seed=2)
    history = train(whole, 4, None, augment=augment, **changes)
    for number, stop in enumerate((*stops, 4)):
        student = Network(2, seed=100 + number) if number else Network(2, seed=2)  # a new process remembers nothing
        torch.rand(number)
        resumed = train(student, stop, tmp_path / "c.safetensors", augment=augment, **changes)
    assert equal(student, whole)
    assert resumed == history


def test_training_is_the_same_whatever_was_drawn_before_and_leaves_the_generator_alone() -> None:
    first, second = Network(2, seed=2), Network(2, seed=2)
    torch.manual_seed(11)
    train(first, 2)
    torch.manual_seed(12)
    expected = torch.rand(3)
    torch.manual_seed(12)
    train(second, 2)
    assert equal(first, second)
    assert torch.equal(torch.rand(3), expected)


def test_every_epoch_has_its_own_randomness_and_seed() -> None:
    first, second = Network(2, seed=2), Network(2, seed=2)
    split, teacher = train_split(), Network(4, seed=1)
    for student, seed in ((first, 0), (second, 1)):
        distill(student, teacher, split, to_epoch=1, total_epochs=1, seed=seed, recipe=SMALL)
    assert not equal(first, second)


def test_every_epoch_takes_all_samples_in_an_order_of_its_own() -> None:
    split = replace(train_split(), inputs=torch.arange(21.0)[:, None, None, None].expand(21, 1, 6, 6))
    student, seen = Network(2, seed=2), list[float]()

    def note(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        if module.training:
            seen.extend(arguments[0][:, 0, 0, 0].tolist())

    student.register_forward_pre_hook(note)
    distill(student, Network(4, seed=1), split, to_epoch=2, total_epochs=2, seed=0, recipe=SMALL)
    assert sorted(seen[:21]) == sorted(seen[21:]) == list(range(21))
    assert seen[:21] != seen[21:]


def test_the_learning_rate_is_planned_over_all_epochs() -> None:
    rates = [epoch.learning_rate for epoch in train(Network(2, seed=2), 4)]
    # 21 samples in batches of at most 8 are 3 steps an epoch.
    assert rates == [learning_rate(SMALL, step, 12) for step in (2, 5, 8, 11)]


@pytest.mark.parametrize(("augment", "passes"), [(Augment(), 1), (Augment(shift=1), 3)])
def test_the_teacher_is_asked_once_for_a_sample_that_never_moves(augment: Augment, passes: int) -> None:
    teacher, samples = Network(4, seed=1), list[int]()
    teacher.register_forward_pre_hook(lambda module, arguments: samples.append(len(arguments[0])))
    split = train_split(augment=augment)
    distill(Network(2, seed=2), teacher, split, to_epoch=3, total_epochs=3, seed=0, recipe=SMALL)
    # Two samples to find the stage ends, and two to see what all would take in memory.
    assert sum(samples) == 2 + passes * 21 + (0 if augment else 2)


def test_hints_bring_the_features_nearer_to_the_teachers() -> None:
    split = train_split(60)
    distances = []
    for hints in (0.0, 5.0):
        recipe = replace(SMALL, attention=0, alpha=0, hints=hints)
        student = Network(4, seed=3)
        history = distill(
            student, Network(4, seed=1), split, to_epoch=6, total_epochs=6, seed=0, recipe=replace(recipe, hints=hints)
        )
        with torch.no_grad():
            teacher = Network(4, seed=1).eval()
            theirs = teacher.second(teacher.norm(teacher.first(split.inputs)).relu())
            ours = student.second(student.norm(student.first(split.inputs)).relu())
        distances.append(float((ours - theirs).square().mean() / theirs.square().mean()))
        assert (history.epochs[-1].hints > 0) == (hints > 0)
    assert distances[1] < distances[0] / 2


def test_students_of_one_run_share_what_the_teacher_says_and_are_none_the_worse(tmp_path: Path) -> None:
    teacher, asked = Network(4, seed=1), list[int]()
    teacher.register_forward_pre_hook(lambda module, arguments: asked.append(len(arguments[0])))
    split = train_split(augment=Augment(shift=1, flip=True))
    students: dict[str, nn.Module] = {}
    for name, seed, folder in (("alone", 2, "a"), ("first", 1, "b"), ("after", 2, "b"), ("own", 2, None)):
        student = students[name] = Network(2, seed=2)
        distill(
            student, teacher, split, to_epoch=3, total_epochs=3, seed=seed, shared_seed=9,
            recipe=replace(SMALL, attention=0), lessons=tmp_path / folder if folder else None,
        )  # fmt: skip
        asked.append(0)
    assert equal(students["alone"], students["after"])
    assert not equal(students["first"], students["after"])
    # Batches of another size round differently.
    for a, b in zip(students["own"].parameters(), students["after"].parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    by_student = [sum(part) for part in split_at_zeros(asked)]
    assert by_student == [2 + 3 * 21, 2 + 3 * 21, 2, 3 * 21]


def split_at_zeros(numbers: list[int]) -> list[list[int]]:
    parts: list[list[int]] = [[]]
    for number in numbers:
        if number:
            parts[-1].append(number)
        else:
            parts.append([])
    return parts[:-1]


def test_a_student_learns_what_the_teacher_knows_without_labels() -> None:
    split = train_split(60)
    teacher = Network(8, seed=1)
    distill(teacher, None, split, to_epoch=12, total_epochs=12, seed=0, recipe=replace(SMALL, alpha=0, attention=0))
    wrong = replace(split, targets=torch.zeros_like(split.targets))
    student = Network(4, seed=3)
    before = copy.deepcopy(teacher)
    distill(student, teacher, wrong, to_epoch=12, total_epochs=12, seed=0, recipe=replace(SMALL, alpha=1))
    with torch.no_grad():
        right = student(split.batch(slice(0, 60))).argmax(1) == split.targets
    assert right.double().mean() > 0.9
    assert equal(teacher, before)
    assert not student.training


def test_the_teacher_stays_in_its_mode_and_without_gradients() -> None:
    teacher = Network(4, seed=1).train()
    distill(Network(2, seed=2), teacher, train_split(), to_epoch=1, total_epochs=1, seed=0, recipe=SMALL)
    assert teacher.training
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_targets_that_are_remembered_are_those_of_the_moment() -> None:
    students = [Network(2, seed=2), Network(2, seed=2)]
    teacher = Network(4, seed=1).eval()
    # A flip that is declared but never changes a symmetric image: the same inputs without the shortcut.
    plain = train_split()
    symmetric = plain.inputs + plain.inputs.flip(3)
    for student, augment in zip(students, (Augment(), Augment(flip=True)), strict=True):
        split = replace(plain, inputs=symmetric, augment=augment)
        recipe = replace(SMALL, attention=2.0)
        distill(student, teacher, split, to_epoch=1, total_epochs=1, seed=0, recipe=recipe)
    # Batches of another size round differently.
    for a, b in zip(students[0].parameters(), students[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_the_loss_is_the_weighted_sum_of_its_definition() -> None:
    torch.manual_seed(0)
    logits, teacher, targets = torch.randn(5, 3), torch.randn(5, 3), torch.tensor([0, 2, 1, 1, 0])
    ours, theirs = torch.rand(5, 3, 2, 2), torch.rand(5, 3, 2, 2)
    recipe = Recipe(alpha=0.7, temperature=3.0, attention=0.5, hints=0.2)
    wanted = Targets(teacher, (attention_map(theirs),), (theirs,))
    loss, ce, kl, attention, hints = losses(recipe, logits, ((ours,), (ours,)), targets, wanted).tolist()
    p, q = (teacher / 3).softmax(1), (logits / 3).softmax(1)
    expected_kl = 9 * float((p * (p / q).log()).sum(1).mean())
    expected_ce = -float(logits.softmax(1)[torch.arange(5), targets].log().mean())
    expected_attention = float(((attention_map(ours) - attention_map(theirs)) ** 2).sum(1).mean())
    expected_hints = float(((ours - theirs) ** 2).sum() / (theirs**2).sum())
    expected = (expected_ce, expected_kl, expected_attention, expected_hints)
    assert (ce, kl, attention, hints) == pytest.approx(expected, rel=1e-5)
    assert loss == pytest.approx(0.3 * ce + 0.7 * kl + 0.5 * attention + 0.2 * hints, rel=1e-5)


def test_softened_kl_is_zero_for_the_teacher_itself_and_falls_with_distance() -> None:
    logits = torch.randn(4, 5)
    assert float(softened_kl(logits, logits, 4.0)) == pytest.approx(0, abs=1e-6)
    assert softened_kl(logits + torch.eye(4, 5), logits, 4.0) > 0


def test_the_learning_rate_rises_then_falls_to_nearly_zero() -> None:
    rates = [learning_rate(Recipe(learning_rate=0.1, warmup=0.2), step, 50) for step in range(50)]
    assert rates[:11] == sorted(rates[:11])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert max(rates) == rates[10] == 0.1
    assert rates[30] == pytest.approx(0.05)  # half way down the cosine
    assert 0 < rates[-1] < 0.001
    assert rates[0] > 0


def test_a_loss_that_is_not_finite_stops_the_training() -> None:
    student = Network(2, seed=2)
    with torch.no_grad():
        student.last.weight[0, 0] = torch.nan
    with pytest.raises(DistillError, match="loss is nan in epoch 1, step 1"):
        train(student, 2)
    assert not student.training


def test_a_gradient_that_is_not_finite_stops_the_training() -> None:
    class Root(Network):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + (self.last.bias * 0).sqrt().sum()  # its slope at 0 is infinite

    with pytest.raises(DistillError, match="gradient is nan in epoch 1, step 1"):
        train(Root(2, seed=2), 2)


def test_frozen_parameters_stay_as_they_are_and_fake_quantisation_trains() -> None:
    class Rounded(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight + ((weight * 8).round() / 8 - weight).detach()

    student = Network(2, seed=2)
    student.first.weight.requires_grad_(False)
    parametrize.register_parametrization(student.second, "weight", Rounded())
    frozen = student.first.weight.clone()
    latent = student.second.parametrizations.weight.original.detach().clone()  # type: ignore[union-attr,operator]
    train(student, 1)
    assert torch.equal(student.first.weight, frozen)
    assert not torch.equal(student.second.parametrizations.weight.original, latent)  # type: ignore[union-attr,arg-type]
    assert torch.equal((student.second.weight * 8).round(), student.second.weight * 8)


def test_after_every_epoch_the_checkpoint_is_there_before_the_caller_hears_of_it(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "c.safetensors"
    seen: list[int] = []

    class Stop(Exception):
        pass

    def stop_after_two(epoch: Epoch) -> None:
        seen.append(epoch.number)
        assert path.exists()
        if epoch.number == 2:
            raise Stop

    student = Network(2, seed=2)
    split, teacher = train_split(), Network(4, seed=1)
    with pytest.raises(Stop):
        distill(
            student,
            teacher,
            split,
            to_epoch=4,
            total_epochs=4,
            seed=5,
            recipe=SMALL,
            checkpoint=path,
            on_epoch=stop_after_two,
        )
    other = Network(2, seed=9)
    distill(
        other,
        teacher,
        split,
        to_epoch=4,
        total_epochs=4,
        seed=5,
        recipe=SMALL,
        checkpoint=path,
        on_epoch=lambda epoch: seen.append(epoch.number),
    )
    assert seen == [1, 2, 3, 4]


def test_the_learning_rate_rises_anew_after_a_restart_and_a_kill_there_leaves_no_trace(tmp_path: Path) -> None:
    split, teacher, path = train_split(), Network(4, seed=1), tmp_path / "c.safetensors"

    def trained(student: Network, to_epoch: int, checkpoint: Path | None = None) -> History:
        return distill(
            student, teacher, split, to_epoch=to_epoch, total_epochs=6, seed=5, recipe=SMALL, checkpoint=checkpoint,
            restarts=[1, 3],
        )  # fmt: skip

    whole, parts = Network(2, seed=2), Network(2, seed=2)
    history = trained(whole, 6)
    for until in (1, 3):
        trained(parts, until, path)
    assert trained(parts, 6, path) == history
    assert equal(whole, parts)
    steps = math.ceil(len(split) / SMALL.batch)
    expected = [learning_rate(SMALL, steps * (e - s) - 1, steps * (t - s)) for s, t in ((0, 1), (1, 3), (3, 6))
                for e in range(s + 1, t + 1)]  # fmt: skip
    assert [epoch.learning_rate for epoch in history.epochs] == expected
    assert expected[0] < expected[1] > expected[2] < expected[3]


@pytest.mark.parametrize("restarts", [[0], [3, 2], [4], [2, 2]])
def test_restarts_out_of_order_are_refused(restarts: list[int]) -> None:
    with pytest.raises(ValueError, match="must rise, from 1 on"):
        distill(
            Network(2, 2), Network(4, 1), train_split(), to_epoch=1, total_epochs=4, seed=0, restarts=restarts
        )  # fmt: skip


def test_a_finished_training_is_only_read_back(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    first, second = Network(2, seed=2), Network(2, seed=9)
    history = train(first, 3, path)
    written = path.read_bytes()
    assert train(second, 3, path) == history
    assert equal(first, second)
    assert path.read_bytes() == written


@pytest.mark.parametrize(
    "change",
    [
        {"learning_rate": 0.01},
        {"alpha": 0.5},
        {"batch": 4},
        {"augment": False},
        {"optimiser": "adamw"},
        {"precision": "bfloat16"},
    ],
)
def test_a_checkpoint_of_another_recipe_is_refused(tmp_path: Path, change: dict[str, object]) -> None:
    train(Network(2, seed=2), 1, tmp_path / "c.safetensors")
    with pytest.raises(CheckpointError, match="of another training"):
        train(Network(2, seed=2), 2, tmp_path / "c.safetensors", **change)


def test_a_checkpoint_of_another_student_is_refused(tmp_path: Path) -> None:
    train(Network(2, seed=2), 1, tmp_path / "c.safetensors")
    student = Network(3, seed=2)
    before = copy.deepcopy(student)
    with pytest.raises(CheckpointError, match=r"of another student: first\.weight differs"):
        train(student, 2, tmp_path / "c.safetensors")
    assert equal(student, before)


def test_a_checkpoint_that_is_missing_or_too_far_on_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    split, teacher = train_split(), Network(4, seed=1)
    with pytest.raises(CheckpointError, match="from epoch 1 and there is no checkpoint"):
        distill(Network(2, 2), teacher, split, from_epoch=1, to_epoch=2, total_epochs=4, seed=5, checkpoint=path)
    train(Network(2, seed=2), 3, path)
    with pytest.raises(CheckpointError, match=r"of epoch 3, outside 0\.\.2"):
        train(Network(2, seed=2), 2, path)


@pytest.mark.parametrize(("start", "end", "total"), [(2, 1, 4), (0, 5, 4), (-1, 1, 4), (0, 0, 0)])
def test_epochs_out_of_order_are_refused(start: int, end: int, total: int) -> None:
    with pytest.raises(ValueError, match="out of order"):
        distill(Network(2, 2), None, train_split(), from_epoch=start, to_epoch=end, total_epochs=total, seed=0)


def test_a_teacher_is_needed_to_imitate_and_must_not_be_the_student() -> None:
    student = Network(2, 2)
    with pytest.raises(ValueError, match="need a teacher"):
        distill(student, None, train_split(), to_epoch=1, total_epochs=1, seed=0)
    with pytest.raises(ValueError, match="teacher itself"):
        distill(student, student, train_split(), to_epoch=1, total_epochs=1, seed=0)


def test_a_teacher_with_other_classes_is_refused() -> None:
    teacher = Network(4, seed=1)
    teacher.last = nn.Linear(8, 5)
    with pytest.raises(ValueError, match=r"\(7, 3\) and the teacher \(7, 5\)"):
        distill(Network(2, 2), teacher, train_split(), to_epoch=1, total_epochs=1, seed=0, recipe=SMALL)


@pytest.mark.parametrize(
    "change",
    [
        {"alpha": 1.1},
        {"alpha": float("nan")},
        {"temperature": 0.0},
        {"attention": -1.0},
        {"hints": float("inf")},
        {"optimiser": "sgdd"},
        {"learning_rate": 0.0},
        {"warmup": 1.0},
        {"weight_decay": -1.0},
        {"batch": 1},
        {"clip": 0.0},
        {"precision": "float16"},
    ],
)
def test_a_recipe_that_makes_no_sense_is_refused_by_name(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=f"recipe {next(iter(change))} is"):
        Recipe(**change)  # type: ignore[arg-type]


def test_at_the_end_batch_norms_have_the_statistics_of_what_was_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    def trained(settles: bool) -> nn.Module:
        if not settles:
            monkeypatch.setattr(distill_file, "recalibrate", lambda module, inputs: None)
        torch.manual_seed(0)
        student = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4, momentum=0.001), nn.Flatten(), nn.LazyLinear(3))
        student(inputs[:2])
        distill(student, None, split, to_epoch=3, total_epochs=3, seed=0, restarts=[1], recipe=recipe)
        return student

    inputs = torch.randn(64, 1, 6, 6, generator=torch.Generator().manual_seed(0)) + 3
    split, recipe = Split(inputs, torch.arange(64) % 3), Recipe(alpha=0, attention=0, batch=16)
    settled, stale = trained(True), trained(False)
    for (name, one), (_, other) in zip(settled.named_parameters(), stale.named_parameters(), strict=True):
        assert torch.equal(one, other), name
    with torch.no_grad():
        read = settled[0](inputs)  # type: ignore[index]
    norm = settled.get_submodule("1")
    assert torch.allclose(norm.get_buffer("running_mean"), read.mean((0, 2, 3)), atol=1e-5)
    assert torch.allclose(norm.get_buffer("running_var"), read.var((0, 2, 3)), rtol=1e-3)
    assert not torch.allclose(stale.get_buffer("1.running_mean"), read.mean((0, 2, 3)), atol=0.5)
    assert norm.momentum == 0.001
