from __future__ import annotations

import logging
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from planish.compilers.cache_folder import cache_folder
from planish.search.data import Data, Split
from planish.search.distill import Recipe
from planish.search.models import load_model
from planish.search.score import accuracy
from planish.search.task_error import TaskError
from planish.search.tasks import BUILTIN, Task, load_task
from planish.search.weights import read_weights
from planish.search.zoo import CifarResNet, DsCnn, SmallResNet
from planish.search.zoo_trained import Plan, trained


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tiny_data(classes: int = 3) -> Data:
    inputs = torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
    part = Split(inputs, torch.arange(12) % classes)
    return Data(part, part, part, tuple("abcdefgh"[:classes]))


def tiny() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))


PLAN = Plan(2, Recipe(alpha=0, attention=0, batch=4))


def test_a_task_needs_only_a_model_and_data() -> None:
    task = Task(tiny(), tiny_data())
    assert task.metric == "accuracy"
    assert task.name == "model"


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Linear(5, 3), r"does not take the data's samples of shape \(4,\): RuntimeError: mat1"),
        (nn.Linear(4, 2), r"returns shape \(2, 2\) for 2 samples, and the data has 3 classes"),
        (nn.Unflatten(1, (2, 2)), r"returns shape \(2, 2, 2\)"),
        (nn.LSTM(4, 3), "returns a tuple"),
    ],
)
def test_a_model_that_does_not_fit_the_data_is_refused(model: nn.Module, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        Task(model, tiny_data())
    assert "\n" not in str(error.value)


def test_a_model_that_returns_nan_is_refused() -> None:
    model = tiny()
    nn.init.constant_(model[2].bias, torch.nan)  # type: ignore[index]
    with pytest.raises(ValueError, match="returns NaN"):
        Task(model, tiny_data())


class Auxiliary(nn.Module):
    """A second classifier beside the first while it is trained."""

    def __init__(self, alone: bool) -> None:
        super().__init__()
        self.own, self.second, self.alone = nn.Linear(4, 3), nn.Linear(4, 3), alone

    def forward(self, x: torch.Tensor) -> object:
        if not self.training:
            return self.own(x)
        if self.alone:
            raise RuntimeError("only in eval mode")
        return self.own(x), self.second(x)


@pytest.mark.parametrize(("alone", "message"), [(False, "returns a tuple in training mode"), (True, "only in eval")])
def test_a_model_that_cannot_be_trained_as_it_is_is_refused(alone: bool, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Task(Auxiliary(alone), tiny_data())


def test_checking_a_task_leaves_the_model_as_it_was() -> None:
    class Grown(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.last = nn.BatchNorm1d(4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.norm(x))  # type: ignore[no-any-return]

    model = Grown().train()
    Task(model, tiny_data())
    assert model.training
    assert int(model.norm.num_batches_tracked) == 0  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("model", "data", "message"),
    [
        ("digit-resnet", "digits32", "did you mean 'digits-resnet'"),
        ("cifar10_resnet20", "digits32", "did you mean 'cifar10-resnet20'"),
        ("", "digits32", "known are cifar10-resnet20"),
        ("timm:", "digits32", "is unknown"),
        ("no_such_package:make", "digits32", "is unknown"),
        ("cifar10-resnet20", None, "needs data; give data cifar10:DIR"),
        ("file.py:make", None, "needs data; give data"),
        ("cifar10-resnet20", "digits32", "comes without weights"),
        ("digits-resnet", "cifar10:there", "is trained on digits32, not 'cifar10:there'"),
        ("fashion-resnet", None, "needs data; give data fashion-mnist:DIR"),
    ],
)
def test_names_that_make_no_task_say_what_is_allowed(model: str, data: str | None, message: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011 (compared as a text below)
        load_task(model, data)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_weights_that_do_not_fit_the_built_in_model_are_refused(tmp_path: Path) -> None:
    save_file(DsCnn().state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match="do not fit the model"):
        load_task("digits-resnet", "digits32", str(tmp_path / "w.safetensors"))


def test_a_built_in_model_with_the_users_weights_is_not_trained(tmp_path: Path) -> None:
    weights = SmallResNet().state_dict()
    save_file(weights, tmp_path / "w.safetensors")
    task = load_task("digits-resnet", weights=str(tmp_path / "w.safetensors"), cache=tmp_path / "cache")
    assert all(torch.equal(value, weights[name]) for name, value in task.model.state_dict().items())
    assert not task.model.training
    assert not (tmp_path / "cache").exists()


def test_a_built_in_model_on_data_of_another_shape_is_refused(tmp_path: Path) -> None:
    save_file(CifarResNet(20).state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=r"'cifar10-resnet20' does not take the data's samples of shape \(1, 32, 32\)"):
        load_task("cifar10-resnet20", "digits32", str(tmp_path / "w.safetensors"))


@pytest.mark.parametrize("name", BUILTIN)
def test_every_built_in_model_has_the_macs_it_is_described_with(name: str) -> None:
    shapes = {
        "digits32": (1, 32, 32),
        "fashion-mnist:DIR": (1, 28, 28),
        "cifar10:DIR": (3, 32, 32),
        "kws:DIR": (1, 49, 10),
    }
    macs = 0

    def count(module: nn.Module, args: object, output: Tensor) -> None:
        nonlocal macs
        weight = module.weight
        assert isinstance(weight, Tensor)
        macs += output.numel() * weight[0].numel()

    model = BUILTIN[name].make().eval()
    for part in model.modules():
        if isinstance(part, nn.Conv2d | nn.Linear):
            part.register_forward_hook(count)
    with torch.no_grad():
        assert model(torch.zeros(1, *shapes[BUILTIN[name].data])).shape == (1, 12 if name == "kws-dscnn" else 10)
    described = float(BUILTIN[name].description.partition(" M MACs")[0].rpartition(" ")[2])
    assert described == pytest.approx(macs / 1e6, rel=0.03)  # written with two or three digits


def test_the_networks_have_the_published_numbers_of_parameters() -> None:
    sizes = {20: 269_722, 56: 853_018}
    for depth, size in sizes.items():
        assert sum(parameter.numel() for parameter in CifarResNet(depth).parameters()) == size
    # The published count of DS-CNN includes batch-norm statistics of no layer: weights, biases, scale and shift only.
    assert sum(parameter.numel() for parameter in DsCnn().parameters()) == 23_756


def test_a_depth_that_is_not_6n_plus_2_is_refused() -> None:
    with pytest.raises(ValueError, match="depth 21 is not 6n"):
        CifarResNet(21)


def test_a_factory_in_a_file_gives_the_model_and_its_weights_come_from_the_file(tmp_path: Path) -> None:
    file = tmp_path / "net.py"
    file.write_text(
        textwrap.dedent(
            """
            import torch
            def make():
                return torch.nn.Sequential(torch.nn.Linear(4, 3))
            def data():
                part = (torch.zeros(6, 4), torch.arange(6) % 3)
                return part, part, part
            def nothing():
                return 3
            """
        )
    )
    first, again, other = (load_model(f"{file}:make", None, seed) for seed in (1, 1, 2))
    assert torch.equal(first[0].weight, again[0].weight)  # type: ignore[index]
    assert not torch.equal(first[0].weight, other[0].weight)  # type: ignore[index]
    torch.save({"0.weight": torch.ones(3, 4), "0.bias": torch.zeros(3)}, tmp_path / "w.pt")
    task = load_task(f"{file}:make", f"{file}:data", str(tmp_path / "w.pt"))
    assert task.model[0].weight.eq(1).all()  # type: ignore[index]
    with pytest.raises(ValueError, match=r"nothing' returned a int; it needs to return a torch\.nn\.Module"):
        load_task(f"{file}:nothing", f"{file}:data")


def test_a_model_is_trained_once_and_then_read_from_the_cache(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    first = trained("tiny", tiny, tiny_data(), PLAN, tmp_path)
    assert "epoch 2 of 2" in caplog.text
    caplog.clear()
    torch.rand(3)
    second = trained("tiny", tiny, tiny_data(), PLAN, tmp_path)
    assert caplog.text == ""
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not second.training
    (file,) = (tmp_path / "models").glob("*.safetensors")
    assert read_weights(file).keys() == first.state_dict().keys()


def test_another_recipe_network_or_data_is_another_model_in_the_cache(tmp_path: Path) -> None:
    trained("tiny", tiny, tiny_data(), PLAN, tmp_path)
    trained("tiny", tiny, tiny_data(), Plan(1, PLAN.recipe), tmp_path)
    trained("tiny", lambda: nn.Linear(4, 3), tiny_data(), PLAN, tmp_path)
    changed = tiny_data()
    changed.train.inputs[0, 0] += 1
    trained("tiny", tiny, changed, PLAN, tmp_path)
    assert len(list((tmp_path / "models").glob("*.safetensors"))) == 4


def test_a_damaged_model_in_the_cache_is_trained_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = trained("tiny", tiny, tiny_data(), PLAN, tmp_path)
    (file,) = (tmp_path / "models").glob("*.safetensors")
    whole = file.read_bytes()
    file.write_bytes(whole[:100])
    torch.rand(3)
    second = trained("tiny", tiny, tiny_data(), PLAN, tmp_path)
    assert "training it again" in caplog.text
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert file.read_bytes() == whole


def test_processes_that_want_one_model_train_it_once(tmp_path: Path) -> None:
    script = """
        import logging, sys, torch
        from pathlib import Path
        from torch import nn
        from planish.search.data import Data, Split
        from planish.search.distill import Recipe
        from planish.search.zoo_trained import Plan, trained
        logging.basicConfig(level="INFO")
        torch.set_num_threads(1)
        part = Split(torch.zeros(64, 4), torch.arange(64) % 3)
        data = Data(part, part, part, ("a", "b", "c"))
        print("ready", flush=True)
        sys.stdin.readline()
        plan = Plan(40, Recipe(alpha=0, attention=0, batch=2))
        trained("tiny", lambda: nn.Linear(4, 3), data, plan, Path(sys.argv[1]))
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)]
    pipe = subprocess.PIPE
    runs = [subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) for _ in range(2)]
    for run in runs:
        assert run.stdout is not None
        assert run.stdout.readline() == "ready\n", run.communicate()[1]
    logs = []
    for run in runs:
        assert run.stdin is not None
        run.stdin.write("go\n")
        run.stdin.flush()
    for run in runs:
        logs.append(run.communicate()[1])
    assert [run.returncode for run in runs] == [0, 0], logs
    assert sum("training tiny once" in log for log in logs) == 1


def test_a_cache_that_cannot_be_written_says_what_to_set(tmp_path: Path) -> None:
    (tmp_path / "models").write_text("a file in the way")
    with pytest.raises(ValueError, match=r"cannot be written.*PLANISH_CACHE"):
        trained("tiny", tiny, tiny_data(), PLAN, tmp_path)


def test_the_cache_folder_is_the_users_choice_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("PLANISH_CACHE", "/somewhere/else")
    assert cache_folder() == Path("/somewhere/else")
    monkeypatch.delenv("PLANISH_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/shared/cache")
    assert cache_folder() == Path("/shared/cache/planish")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "planish"


@pytest.mark.parametrize(("name", "library"), [("timm:resnet18", "timm"), ("hf:some/model", "transformers")])
def test_a_library_that_is_not_installed_is_named_with_its_command(
    name: str, library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ValueError, match=f"pip install {library}"):
        load_model(name, None, 0)


def test_timm_weights_in_the_local_cache_are_taken_from_there(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[object, ...]] = []

    def create_model(name: str, pretrained: bool, pretrained_cfg_overlay: object) -> nn.Module:
        calls.append((name, pretrained, pretrained_cfg_overlay))
        return tiny()

    def cached(repository: str, file: str) -> str:
        return f"/cache/{repository}/{file}"

    timm = SimpleNamespace(
        create_model=create_model,
        is_model=lambda name: name == "small",
        list_models=lambda pattern: ["smaller"],
        get_pretrained_cfg=lambda name: SimpleNamespace(hf_hub_id="timm/small"),
        __version__="1",
    )
    monkeypatch.setitem(sys.modules, "timm", timm)
    hub = SimpleNamespace(try_to_load_from_cache=cached)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    load_model("timm:small", None, 0)
    assert calls == [("small", True, {"file": "/cache/timm/small/model.safetensors"})]
    with pytest.raises(ValueError, match="'timm:smal' is unknown to timm 1; near: smaller"):
        load_model("timm:smal", None, 0)


def test_a_model_with_constants_of_its_own_says_so_where_the_data_has_others(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "net.py"
    file.write_text(
        textwrap.dedent(
            """
            import torch
            def make():
                model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(1024, 10))
                model.pretrained_cfg = {"mean": (0.305,), "std": (0.324,)}
                return model
            def other():
                model = make()
                model.pretrained_cfg = {"mean": (0.5,), "std": (0.25,)}
                return model
            """
        )
    )
    load_task(f"{file}:make", "digits32")
    assert caplog.text == ""
    load_task(f"{file}:other", "digits32")
    assert "?mean=0.5&std=0.25" in caplog.text


def test_a_transformers_model_is_looked_for_locally_first_and_returns_its_logits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[bool] = []

    class Classifier(nn.Module):
        @staticmethod
        def from_pretrained(name: str, use_safetensors: bool, local_files_only: bool = False) -> nn.Module:
            assert use_safetensors
            asked.append(local_files_only)
            if local_files_only:
                raise OSError("not in the cache")
            return Classifier()

        def forward(self, pixel_values: Tensor) -> SimpleNamespace:
            return SimpleNamespace(logits=pixel_values.flatten(1)[:, :3])

    library = SimpleNamespace(AutoModelForImageClassification=Classifier)
    monkeypatch.setitem(sys.modules, "transformers", library)
    model = load_model("hf:some/model", None, 0)
    assert asked == [True, False]
    assert torch.equal(model(torch.ones(2, 3, 4, 4)), torch.ones(2, 3))


@pytest.mark.slow
def test_the_digits_network_reaches_its_accuracy_from_nothing(tmp_path: Path) -> None:
    task = load_task("digits-resnet", cache=tmp_path)
    assert accuracy(task.model, task.data.validation).value >= 0.975


def test_a_task_takes_what_factories_return_and_factories() -> None:
    inputs = torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
    parts = ((inputs, torch.arange(12) % 3),) * 3
    for model, data in ((tiny(), parts), (tiny, lambda: parts), (tiny, tiny_data())):
        task = Task(model, data)
        assert isinstance(task.model, nn.Module)
        assert task.data.shape == (4,)
        assert len(task.data.classes) == 3
    with pytest.raises(TaskError, match="model 'model' is a str; it needs to be an nn"):
        Task("tiny", parts)  # type: ignore[arg-type]
    with pytest.raises(TaskError, match="returned a int; it needs to return"):
        Task(tiny, 3)
