from __future__ import annotations

import sys
import textwrap
from pathlib import Path

import pytest
import torch

from planish.search.data_sources import load_data
from planish.search.score import accuracy
from planish.search.task_error import TaskError


def write(folder: Path, body: str, name: str = "mine.py") -> Path:
    file = folder / name
    file.write_text("import torch, numpy as np\n" + textwrap.dedent(body))
    return file


def test_float_pairs_go_to_the_model_as_they_are(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        """
        def make():
            return tuple((np.full((4, 3), i + 0.5), np.array([0, 1, 2, 0])) for i in range(3))
        """,
    )
    data = load_data(f"{file}:make")
    assert data.classes == ("0", "1", "2")
    assert data.test.batch(slice(0, 4)).eq(2.5).all()
    assert data.test.targets.dtype == torch.int64


def test_uint8_inputs_are_divided_by_255(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        """
        def make():
            part = (torch.full((4, 1, 2, 2), 51, dtype=torch.uint8), torch.tensor([0, 1, 1, 0], dtype=torch.int32))
            return part, part, part
        """,
    )
    data = load_data(f"{file}:make")
    assert data.train.inputs.dtype == torch.uint8
    torch.testing.assert_close(data.example(), torch.full((1, 1, 2, 2), 0.2))


def test_train_can_do_without_labels_and_the_others_cannot(tmp_path: Path) -> None:
    body = """
        def make():
            parts = [[np.full((4, 3), i + 0.5), np.array([0, 1, 2, 0])] for i in range(3)]
            parts[{}][1] = None
            return tuple(tuple(part) for part in parts)
        """
    data = load_data(f"{write(tmp_path, body.format(0))}:make")
    assert not data.train.labelled
    assert data.validation.labelled
    assert data.train.targets.tolist() == [0, 0, 0, 0]
    assert data.classes == ("0", "1", "2")
    with pytest.raises(TaskError, match="the test split has no labels"):
        load_data(f"{write(tmp_path, body.format(2), 'other.py')}:make")


def test_a_torch_dataset_is_read_whole(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        """
        class Squares(torch.utils.data.Dataset):
            def __len__(self): return 5
            def __getitem__(self, i): return torch.tensor([float(i), float(i * i)]), i % 2
        def make():
            return Squares(), Squares(), Squares()
        """,
    )
    data = load_data(f"{file}:make")
    assert data.train.inputs.tolist() == [[i, i * i] for i in range(5)]
    assert data.train.targets.tolist() == [0, 1, 0, 1, 0]


def test_the_metric_of_the_user_is_what_is_scored(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        """
        def quarter(outputs, targets):
            return torch.full((len(targets),), 0.25)
        def make():
            part = (torch.zeros(4, 2), torch.tensor([0, 1, 0, 1]))
            return part, part, part, quarter
        """,
    )
    data = load_data(f"{file}:make")
    assert accuracy(torch.nn.Identity(), data.test).value == 0.25


def test_a_metric_that_splits_bring_along_is_kept(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        """
        from planish.search.data import Split
        def quarter(outputs, targets):
            return torch.full((len(targets),), 0.25)
        def make():
            part = Split(torch.zeros(4, 2), torch.tensor([0, 1, 0, 1]), metric=quarter)
            return part, part, part
        """,
    )
    data = load_data(f"{file}:make")
    assert accuracy(torch.nn.Identity(), data.test).value == 0.25


def test_a_whole_data_object_is_taken_as_it_is(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        """
        from planish.search.data import Data, Split
        def make():
            part = Split(torch.zeros(4, 2), torch.tensor([0, 1, 0, 1]))
            return Data(part, part, part, ("no", "yes"))
        """,
    )
    assert load_data(f"{file}:make").classes == ("no", "yes")


def test_a_file_may_import_its_neighbour_and_leaves_the_path_as_it_was(tmp_path: Path) -> None:
    write(tmp_path, "def part(): return torch.zeros(4, 2), torch.tensor([0, 1, 0, 1])", "neighbour_of_data.py")
    file = write(tmp_path, "from neighbour_of_data import part\ndef make(): return part(), part(), part()")
    before = list(sys.path)
    assert len(load_data(f"{file}:make").train) == 4
    assert sys.path == before


def test_a_module_of_the_current_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "def make(): return ((torch.zeros(4, 2), torch.tensor([0, 1, 0, 1])),) * 3", "data_in_cwd.py")
    monkeypatch.chdir(tmp_path)
    assert len(load_data("data_in_cwd:make").train) == 4


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("def make(): return 3", "returned a int"),
        ("def make(): return (1, 2)", "returned 2 things"),
        ("def make(): return (1, 2, 3)", "train is a int"),
        ("def make(): return ((torch.zeros(4, 2), torch.zeros(4)),) * 3", "targets of torch.float32"),
        ("def make(): return ((torch.zeros(4, 2), torch.zeros(4).long()),) * 3 + (7,)", "metric 7"),
        ("def make(): return ((torch.zeros(0, 2), torch.zeros(0).long()),) * 3", r"shape \(0, 2\).*at least 1 sample"),
        ("def make(): return ((torch.zeros(4, 2), torch.zeros(4).long()),) * 3", "has 1 class.*at least 2"),
        ("def make(): return ([], [], [])", "train is empty"),
        ("def make(): return ([(torch.zeros(2), 0), (torch.zeros(3), 1)],) * 3", r"item 1 has shape \(3,\)"),
        ("def make(): return ([1, 2, 3],) * 3", "item 0 is a int"),
        ("def make(): return (({}, [0, 1]),) * 3", "train inputs: a dict is not an array"),
        ("def make(): raise KeyError('no file')", "raised KeyError: 'no file'"),
        ("def other(): pass", "has no 'make'; it has other"),
        ("make = 3", "is a int; it needs to be a callable"),
        ("def make(:", "raised SyntaxError"),
        ("import no_such_library_at_all", "No module named"),
    ],
)
def test_what_a_factory_does_wrong_is_one_clear_line(tmp_path: Path, body: str, message: str) -> None:
    file = write(tmp_path, body)
    with pytest.raises(ValueError, match=message) as error:
        load_data(f"{file}:make")
    assert "\n" not in str(error.value)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no file .*gone\.py"):
        load_data(f"{tmp_path / 'gone.py'}:make")


def test_a_module_that_is_not_there_is_unknown_data() -> None:
    with pytest.raises(ValueError, match="'no_such_package:make' is unknown"):
        load_data("no_such_package:make")


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ("open('nowhere.png')", r"train item 1 raised FileNotFoundError: .*nowhere\.png"),
        ("(np.zeros(3), None)", r"train item 1 has the class None; classes are whole numbers"),
        ("(np.zeros(3), 'cat')", r"train item 1 has the class 'cat'; classes are whole numbers"),
        ("(np.zeros(3), np.eye(3)[0])", r"train item 1 has the class .*; classes are whole numbers"),
        ("(np.zeros(3), -1)", r"train item 1 has the class -1; classes are whole numbers"),
    ],
)
def test_what_is_wrong_with_an_item_is_told_with_its_number(tmp_path: Path, item: str, message: str) -> None:
    body = f"""
        class Items:
            def __len__(self):
                return 3
            def __getitem__(self, index):
                return {item} if index else (np.zeros(3), 0)
        def make():
            return Items(), Items(), Items()
        """
    with pytest.raises(TaskError, match=message):
        load_data(f"{write(tmp_path, body)}:make")


@pytest.mark.parametrize("name", ["sys:exit", "mine.py:quit_at_once"])
def test_code_that_ends_the_process_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    write(tmp_path, "import sys\ndef quit_at_once():\n    sys.exit('bye')\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TaskError, match="raised SystemExit"):
        load_data(name)


def test_a_package_that_cannot_be_imported_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "broken_package"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('no licence')\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TaskError, match="raised RuntimeError: no licence"):
        load_data("broken_package.inner:make")
