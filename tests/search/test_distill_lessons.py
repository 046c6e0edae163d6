from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from planish.search import distill_lessons
from planish.search.data import Split
from planish.search.data_augment import Augment
from planish.search.distill_lessons import Lessons
from planish.search.distill_teacher import Targets, Teacher

CPU = torch.device("cpu")


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Conv2d(3, 4, 3), nn.Linear(4, 10)
        self.asked = 0

    def forward(self, x: Tensor) -> Tensor:
        self.asked += len(x)
        result: Tensor = self.last(self.first(x).relu().mean((2, 3)))
        return result


def split(n: int = 50, augment: Augment | None = None) -> Split:
    inputs = torch.randint(0, 256, (n, 3, 8, 8), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    return Split(inputs, torch.arange(n) % 10, augment=Augment(shift=2, flip=True) if augment is None else augment)


def lessons(network: Network, folder: Path | None, part: Split | None = None, seed: int = 3, own: int = 0) -> Lessons:
    return Lessons(part or split(), Teacher(network, CPU), moves=True, seed=seed, own=own, folder=folder)


def said(given: Targets | None) -> Tensor:
    assert given is not None
    return given.logits


@pytest.fixture(autouse=True)
def _small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distill_lessons, "_CHUNK", 20)
    monkeypatch.setattr(distill_lessons, "_BATCH", 8)


@pytest.mark.parametrize("augment", [Augment(), Augment(shift=2, flip=True)])
@pytest.mark.parametrize("kept", [True, False])
def test_the_teacher_speaks_of_the_inputs_that_are_shown(tmp_path: Path, augment: Augment, kept: bool) -> None:
    network = Network()
    given = lessons(network, tmp_path if kept else None, split(augment=augment))
    for epoch in (0, 1, 4):
        given.begin(epoch)
        inputs, _, wanted = given.batch(torch.tensor([49, 3, 0, 20]))
        with torch.no_grad():
            torch.testing.assert_close(said(wanted), network(inputs))


def test_every_sample_moves_alike_for_every_student_and_differently_in_every_epoch(tmp_path: Path) -> None:
    order = torch.randperm(50)
    shown = []
    for student, indices in enumerate((torch.arange(50), order)):
        given = lessons(Network(), None, own=student)
        for epoch in (0, 1):
            given.begin(epoch)
            inputs = given.batch(indices)[0]
            shown.append(torch.empty_like(inputs).index_copy(0, indices, inputs))
    assert torch.equal(shown[0], shown[2])
    assert torch.equal(shown[1], shown[3])
    assert not torch.equal(shown[0], shown[1])
    other = lessons(Network(), None, seed=4)
    other.begin(0)
    assert not torch.equal(other.batch(torch.arange(50))[0], shown[0])


def test_what_is_kept_is_not_asked_for_again_and_comes_to_the_same(tmp_path: Path) -> None:
    network, second = Network(), Network()
    first, after = lessons(network, tmp_path), lessons(second, tmp_path, own=2)
    for epoch in (0, 1):
        first.begin(epoch)
        after.begin(epoch)
        indices = torch.arange(50)
        assert torch.equal(said(first.batch(indices)[2]), said(after.batch(indices)[2]))
    assert (network.asked, second.asked) == (2 + 2 * 50, 2)
    assert len(list(tmp_path.iterdir())) == 2 * 3


def test_students_that_begin_at_once_share_the_work(tmp_path: Path) -> None:
    networks = [Network(), Network()]
    both = threading.Barrier(2)
    results: dict[int, Tensor] = {}

    def run(number: int) -> None:
        given = lessons(networks[number], tmp_path, split(200), own=number)
        both.wait()
        given.begin(0)
        results[number] = said(given.batch(torch.arange(200))[2])

    threads = [threading.Thread(target=run, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], expected(split(200)))


def expected(part: Split) -> Tensor:
    given = lessons(Network(), None, part)
    given.begin(0)
    answers, length = [], len(part)
    for chunk in range(0, length, 20):  # in the same batches, for the same bits
        for start in range(chunk, min(chunk + 20, length), 8):
            answers.append(said(given.batch(torch.arange(start, min(start + 8, chunk + 20, length)))[2]))
    return torch.cat(answers)


@pytest.mark.parametrize("damage", ["torn", "other", "empty", "of another seed"])
def test_a_file_that_is_damaged_or_of_others_is_written_again(tmp_path: Path, damage: str) -> None:
    given = lessons(Network(), tmp_path)
    given.begin(0)
    file = min(tmp_path.iterdir())
    whole = file.read_bytes()
    if damage == "of another seed":
        lessons(Network(), tmp_path, seed=8).begin(0)
    else:
        file.write_bytes({"torn": whole[:-9], "other": b"no tensors", "empty": b""}[damage])
    again = lessons(Network(), tmp_path)
    again.begin(0)
    assert torch.equal(said(again.batch(torch.arange(50))[2]), said(given.batch(torch.arange(50))[2]))
    assert file.read_bytes() == whole


def test_a_folder_that_cannot_be_written_costs_nothing_but_time(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way")
    given = lessons(Network(), tmp_path / "file" / "deeper")
    given.begin(0)
    assert torch.equal(said(given.batch(torch.arange(50))[2]), expected(split()))
    assert caplog.text.count("are not kept") == 1


def test_too_much_to_keep_is_asked_for_by_the_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distill_lessons, "_DISK_BYTES", 50 * 10 * 4 - 1)
    network = Network()
    given = lessons(network, tmp_path)
    given.begin(0)
    inputs, _, wanted = given.batch(torch.arange(7))
    assert network.asked == 2 + 7
    assert torch.equal(said(wanted), network(inputs))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kept", [True, False])
def test_epochs_of_some_samples_show_all_of_them_in_turn(tmp_path: Path, kept: bool) -> None:
    network = Network()
    part = replace(
        split(), augment=Augment(), inputs=torch.arange(50, dtype=torch.uint8)[:, None, None, None].expand(50, 3, 8, 8)
    )
    given, other = (
        Lessons(part, Teacher(network, CPU), moves=True, seed=3, samples=20, folder=tmp_path if kept else None)
        for _ in range(2)
    )
    seen: list[list[float]] = []
    for epoch in range(5):
        given.begin(epoch)
        inputs, targets, wanted = given.batch(torch.arange(20))
        seen.append(inputs[:, 0, 0, 0].tolist())
        assert targets.tolist() == [int(value) % 10 for value in seen[-1]]
        with torch.no_grad():
            torch.testing.assert_close(said(wanted), network(inputs))
    flat = [value for epoch in seen for value in epoch]
    assert sorted(flat[:50]) == sorted(flat[50:]) == list(range(50))
    assert flat[:50] != flat[50:]
    other.begin(3)
    assert other.batch(torch.arange(20))[0][:, 0, 0, 0].tolist() == seen[3]


def test_without_a_teacher_only_inputs_are_shown() -> None:
    part = split()
    given = Lessons(part, None, moves=False, seed=0)
    given.begin(0)
    inputs, targets, wanted = given.batch(torch.arange(5))
    assert wanted is None
    assert targets.tolist() == part.targets[:5].tolist()
    assert torch.equal(inputs, part.batch(slice(0, 5)))


def test_inputs_that_do_not_move_are_asked_for_once(tmp_path: Path) -> None:
    network = Network()
    given = lessons(network, None, replace(split(), augment=Augment()))
    for epoch in (0, 1, 2):
        given.begin(epoch)
    assert network.asked == 2 + 50


@pytest.mark.parametrize("samples", [0, 20])
def test_what_an_epoch_shows_is_on_the_device_before_its_steps(samples: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # The meta device has shapes and no values; what stays on the CPU is told from what is there.
    device = torch.device("meta")
    given = Lessons(split(), None, moves=True, seed=0, samples=samples, device=device)
    given.begin(0)
    inputs, targets, _ = given.batch(torch.arange(5).to(device))
    assert (inputs.device, targets.device, inputs.shape) == (device, device, (5, 3, 8, 8))
    # Too large for it, batches go there one by one.
    monkeypatch.setattr(distill_lessons, "_GPU_BYTES", 20 * 3 * 8 * 8 - 1)
    given = Lessons(split(), None, moves=True, seed=0, samples=samples, device=device)
    given.begin(0)
    inputs, targets, _ = given.batch(torch.arange(5))
    assert (inputs.device, targets.device, inputs.shape) == (device, device, (5, 3, 8, 8))
