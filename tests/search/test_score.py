from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from planish.search import score
from planish.search.data import Split
from planish.search.score import accuracy, agreement, kl_to_teacher, paired_bootstrap, recalibrate, wilson


class Table(nn.Module):
    """Returns logits that put the class in input[0] first."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.one_hot(x[:, 0].long(), 3).float()


def split(predicted: list[int], targets: list[int]) -> Split:
    return Split(torch.tensor(predicted, dtype=torch.float32)[:, None], torch.tensor(targets))


def test_accuracy_is_the_share_of_right_samples_in_order() -> None:
    result = accuracy(Table(), split([0, 1, 2, 0, 1], [0, 2, 2, 1, 1]), batch=2)
    assert result.value == 0.6
    assert result.correct.tolist() == [True, False, True, False, True]


def test_a_limit_scores_the_same_samples_for_every_model_and_batch_size() -> None:
    targets = torch.randint(0, 3, (50,), generator=torch.Generator().manual_seed(0)).tolist()
    part = split([0] * 50, targets)
    limited = accuracy(Table(), part, limit=20, batch=7)
    chosen = part.sample(20).targets
    assert torch.equal(limited.correct, chosen == 0)
    assert torch.equal(accuracy(Table(), part, limit=20, batch=64).correct, limited.correct)


def test_nan_outputs_are_wrong_whatever_argmax_says() -> None:
    class Broken(Table):
        def forward(self, x: Tensor) -> Tensor:
            logits = super().forward(x)
            logits[0, 1] = torch.nan
            return logits

    targets = [1, 0, 0]
    assert accuracy(Broken(), split([1, 0, 1], targets)).correct.tolist() == [False, True, False]


def test_scoring_leaves_modes_as_they_were_and_evaluates_in_eval_mode() -> None:
    module = nn.Sequential(nn.Dropout(1.0), nn.Sequential(Table()))
    module.train()
    module[1].eval()
    assert accuracy(module, split([2, 2], [2, 2])).value == 1.0
    assert (module.training, module[0].training, module[1].training) == (True, True, False)


@pytest.mark.parametrize(("right", "count"), [(0, 10), (1, 10), (9, 10), (10, 10), (1, 1), (917, 1000), (500, 1000)])
def test_the_wilson_interval_holds_exactly_the_shares_a_score_test_accepts(right: int, count: int) -> None:
    # Definition: all p with |right/n - p| <= z sqrt(p (1-p) / n).
    grid = np.linspace(0, 1, 200_001)
    accepted = grid[np.abs(right / count - grid) <= 1.959963984540054 * np.sqrt(grid * (1 - grid) / count) + 1e-15]
    low, high = wilson(right / count, count)
    assert low == pytest.approx(accepted.min(), abs=1e-5)  # twice the grid's step
    assert high == pytest.approx(accepted.max(), abs=1e-5)
    result = accuracy(Table(), split([0] * count, [0] * right + [1] * (count - right)))
    assert result.ci95 == (low, high)


@pytest.mark.parametrize(("value", "count"), [(0.5, 0), (1.5, 3), (math.nan, 3)])
def test_an_impossible_share_has_no_interval(value: float, count: int) -> None:
    with pytest.raises(ValueError, match="no interval"):
        wilson(value, count)


def test_the_bootstrap_interval_agrees_with_resampling_pairs() -> None:
    rng = np.random.default_rng(3)
    a, b = torch.from_numpy(rng.random(300) < 0.9), torch.from_numpy(rng.random(300) < 0.8)
    low, high = paired_bootstrap(a, b, seed=0)
    difference = (a.double() - b.double()).numpy()
    means = difference[rng.integers(0, 300, (10_000, 300))].mean(1)
    # Two independent runs of 10000: the quantile's own error is about 0.001.
    assert low == pytest.approx(np.quantile(means, 0.025), abs=0.004)
    assert high == pytest.approx(np.quantile(means, 0.975), abs=0.004)
    assert (low, high) == paired_bootstrap(a, b, seed=0)


def test_the_bootstrap_of_a_metric_with_many_values_needs_no_more_memory_than_one_with_two(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rng = np.random.default_rng(4)
    a, b = torch.from_numpy(rng.random(500)), torch.from_numpy(rng.random(500))
    whole = paired_bootstrap(a, b, seed=0)
    drawn: list[int] = []
    generator = np.random.default_rng(0)

    class Counting:
        def multinomial(self, count: int, shares: object, size: int) -> object:
            drawn.append(size * 500)
            return generator.multinomial(count, shares, size=size)  # type: ignore[arg-type]

    monkeypatch.setattr(score, "_DRAWN", 7 * 500)
    monkeypatch.setattr("numpy.random.default_rng", lambda seed: Counting())
    assert paired_bootstrap(a, b, seed=0) == pytest.approx(whole, abs=1e-12)
    assert max(drawn) == 7 * 500


def test_swapping_the_models_turns_the_bootstrap_interval_around() -> None:
    a = torch.tensor([True] * 90 + [False] * 10)
    b = torch.tensor([True] * 70 + [False] * 30)
    low, high = paired_bootstrap(a, b, seed=0)
    swapped = paired_bootstrap(b, a, seed=0)
    assert 0 < low < 0.2 < high
    assert swapped[1] < 0
    assert paired_bootstrap(a, a, seed=0) == (0.0, 0.0)


@pytest.mark.parametrize(("a", "b"), [([True], [True, False]), ([], [])])
def test_the_bootstrap_needs_the_same_samples(a: list[bool], b: list[bool]) -> None:
    with pytest.raises(ValueError, match="need the same samples"):
        paired_bootstrap(torch.tensor(a), torch.tensor(b), seed=0)


def test_kl_is_that_of_the_definition_and_zero_for_the_teacher() -> None:
    torch.manual_seed(0)
    inputs, teacher = torch.randn(9, 4), torch.randn(9, 4)
    p, q = teacher.double().softmax(1), inputs.double().softmax(1)
    expected = float((p * (p / q).log()).sum(1).mean())
    assert kl_to_teacher(nn.Identity(), teacher, inputs, batch=4) == pytest.approx(expected, rel=1e-6)
    assert kl_to_teacher(nn.Identity(), inputs, inputs) == 0.0
    inputs[3] = torch.nan
    assert kl_to_teacher(nn.Identity(), teacher, inputs) == math.inf


def test_agreement_is_the_share_of_equal_classes() -> None:
    teacher = torch.eye(3)[[0, 1, 2, 0]]
    student = torch.eye(3)[[0, 1, 1, 0]]
    assert agreement(nn.Identity(), teacher, student) == 0.75


def norms() -> nn.Sequential:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3, momentum=0.3), nn.Dropout(0.5), nn.BatchNorm2d(3))
    nn.init.constant_(module[1].running_mean, 9.0)  # type: ignore[arg-type]
    module[1].num_batches_tracked += 3  # type: ignore[operator,assignment]
    return module.train()


def norm(module: nn.Sequential, index: int) -> nn.BatchNorm2d:
    part = module[index]
    assert isinstance(part, nn.BatchNorm2d)
    return part


def test_recalibrated_statistics_are_those_of_the_inputs() -> None:
    module, inputs = norms(), torch.randn(8, 2, 6, 6)
    recalibrate(module, inputs, batch=8)
    with torch.no_grad():
        hidden = module[0](inputs).transpose(0, 1).flatten(1)
    # float32 means of 128 values
    torch.testing.assert_close(norm(module, 1).running_mean, hidden.mean(1), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(norm(module, 1).running_var, hidden.var(1), atol=1e-6, rtol=1e-5)


def test_recalibration_weighs_every_batch_alike() -> None:
    module, inputs = norms(), torch.randn(10, 2, 6, 6)
    recalibrate(module, inputs, batch=4)
    with torch.no_grad():
        parts = [module[0](part).transpose(0, 1).flatten(1) for part in inputs.tensor_split(3)]
    expected = torch.stack([part.mean(1) for part in parts]).mean(0)
    torch.testing.assert_close(norm(module, 1).running_mean, expected, atol=1e-6, rtol=1e-5)


def test_recalibration_restores_momentum_and_modes() -> None:
    module = norms()
    module[1].eval()
    recalibrate(module, torch.randn(4, 2, 6, 6))
    assert (norm(module, 1).momentum, norm(module, 3).momentum) == (0.3, 0.1)
    assert [part.training for part in module] == [True, False, True, True]


def test_recalibration_restores_momentum_after_a_failure() -> None:
    module = norms()
    with pytest.raises(RuntimeError):
        recalibrate(module, torch.randn(4, 5, 6, 6))
    assert (norm(module, 1).momentum, norm(module, 3).momentum) == (0.3, 0.1)
    assert module.training


def test_recalibration_without_dropout_noise_is_the_same_twice() -> None:
    inputs = torch.randn(4, 2, 6, 6)
    first, second = norms(), norms()
    recalibrate(first, inputs)
    recalibrate(second, inputs)
    torch.testing.assert_close(norm(first, 3).running_var, norm(second, 3).running_var, atol=0, rtol=0)


def test_a_module_without_batch_norm_is_not_run() -> None:
    class Untouchable(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise AssertionError

    recalibrate(Untouchable(), torch.zeros(1, 1))


@pytest.mark.parametrize("score", [torch.tensor([2.0, 0.0]), torch.tensor([1.0]), "high"])
def test_a_metric_that_returns_no_score_for_every_sample_is_refused(score: object) -> None:
    part = Split(torch.zeros(2, 2), torch.tensor([0, 1]), metric=lambda outputs, targets: score)  # type: ignore[arg-type,return-value]
    with pytest.raises(ValueError, match="the metric returned"):
        accuracy(nn.Identity(), part)
