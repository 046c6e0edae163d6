"""What a candidate will turn out to be: the option table's guesses, corrected by the candidates that were evaluated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from .option_table import Array, OptionTable

Levels = NDArray[np.int64]
# What is to be added to a logarithm, (n,), for features (n, f).
Correction = Callable[[Array], Array]

# Evaluations before which nothing but a line is tried.
_LEAST = 8
_FOLDS = 5
# Trees of a forest; fewer while it is judged on many pairs, whose error is known well enough.
_TREES, _FEWER_TREES, _MANY = 100, 30, 200
# How strongly the weights of options are held to zero.
_SHRINKS = (0.3, 3.0)
# log KL = a + b log(error): what a and b are held to, and how strongly, before there are evaluations. The slope is from
# small experiments on two networks, where the sum of errors rose by 1 and the divergence by 1.2 decades.
_LINE = (0.5, 1.2)
_LINE_STRENGTH = (0.3, 2.0)
_LINE_STD = 1.0
_COST_STD = 0.1
# The error of what could not be fitted alone, and was evaluated beside others all the same.
_DESTROYED = 1e3
# No damage is told apart below this: half a wrong image of a thousand.
_SMALLEST = 5e-4


@dataclass(frozen=True)
class Guess:
    """Predicted values of n candidates with their standard deviations, each (n,)."""

    mean: Array
    std: Array


class LogModel:
    """`log y = a + b log x`, and what corrects it best by cross-validation: a forest, weights of options, or nothing.

    The standard deviation is that of what cross-validation left.
    """

    def __init__(
        self,
        x: Array,
        y: Array,
        features: Array,
        *,
        line: tuple[float, float] = (0.0, 1.0),
        strength: tuple[float, float] = (0.3, 3.0),
        std: float = _COST_STD,
        seed: int = 0,
    ) -> None:
        """Fits to n positive pairs.

        Args:
            x: The guess, (n,).
            y: What it turned out to be, (n,).
            features: (n, f) for what corrects the line.
            line: a and b before any pair.
            strength: How many pairs that is worth, for each.
            std: Of log y before any pair.
            seed: Of the forest and the folds.
        """
        self._line, self._prior, self._strength = np.array(line), np.array(line), np.array(strength)
        self._correction: Correction | None = None
        self.std = std
        if len(x) == 0:
            return
        u, v = np.log(x), np.log(y)
        self._line = self._solved(u, v)
        folds = np.random.default_rng(seed).permutation(len(u)) % min(_FOLDS, len(u))
        makers: dict[str, Callable[[Array, Array], Correction] | None] = {"none": None}
        if len(u) >= _LEAST:
            makers |= {f"weights {shrink}": partial(_weights, shrink=shrink) for shrink in _SHRINKS}
            makers["forest"] = partial(_forest, seed=seed, trees=_TREES if len(u) <= _MANY else _FEWER_TREES)
        left = {name: np.empty(len(u)) for name in makers}
        for fold in range(int(folds.max()) + 1):
            inside = folds != fold
            a, b = self._solved(u[inside], v[inside])
            over = v - a - b * u
            for name, make in makers.items():
                correction = make(features[inside], over[inside]) if make else None
                left[name][~inside] = over[~inside] - (correction(features[~inside]) if correction else 0)
        best = min(left, key=lambda name: float(np.square(left[name]).mean()))
        make = makers[best] if best != "forest" else partial(_forest, seed=seed, trees=_TREES)
        if make is not None:
            self._correction = make(features, v - self._line[0] - self._line[1] * u)
        # As if the prior's spread had been seen twice: few pairs that happen to agree are no certainty.
        self.std = float(np.sqrt((np.square(left[best]).sum() + 2 * std**2) / (len(u) + 2)))

    def predict(self, x: Array, features: Array) -> Guess:
        """The median of y and the standard deviation of log y, of n candidates."""
        v = self._line[0] + self._line[1] * np.log(x)
        if self._correction is not None:
            v = v + self._correction(features)
        return Guess(np.exp(v), np.full(len(x), self.std))

    def _solved(self, u: Array, v: Array) -> Array:
        """Least squares with the prior as extra rows, the slope never below a fifth of what is expected."""
        middle = u.mean() if len(u) else 0.0
        rows = np.stack([np.ones(len(u)), u - middle], 1)
        # The prior of the offset holds at the middle of what was seen, where it does not tilt the line.
        weight = np.diag(np.sqrt(self._strength))
        wanted = np.array([self._prior[0] + self._prior[1] * middle, self._prior[1]])
        found = np.linalg.lstsq(np.concatenate([rows, weight]), np.concatenate([v, weight @ wanted]), rcond=None)[0]
        slope = max(float(found[1]), 0.2 * float(self._prior[1]))
        offset = float(v.mean()) if slope != found[1] else float(found[0])
        return np.array([offset - slope * middle, slope])


@dataclass(frozen=True, eq=False)
class Evaluated:
    """What n candidates turned out to be.

    Attributes:
        levels: (n, n_choices).
        loss: 1 - accuracy, (n,).
        divergence: From the original's outputs, (n,), NaN where it was not measured.
        costs: By name relative to the original, (n,).
    """

    levels: Levels
    loss: Array
    divergence: Array
    costs: dict[str, Array]


class Surrogate:
    """Predicts loss and costs of candidates.

    Attributes:
        top_loss: Of a model that knows nothing.
    """

    def __init__(
        self, table: OptionTable, seen: Evaluated, costs: Sequence[str], base_loss: float, top_loss: float, seed: int
    ) -> None:
        """Fits to what was seen.

        Args:
            table: Errors and costs of options.
            seen: The evaluated candidates; none is enough to begin with.
            costs: The names of the costs to predict; those that the table has not are predicted from its first one.
            base_loss: The original's.
            top_loss: Of a model that knows nothing.
            seed: Of all that is random.
        """
        self._table, self._base = table, base_loss
        self.top_loss = self._top = max(top_loss, base_loss + 0.01)
        self._option_errors = [np.minimum(errors, _DESTROYED) for errors in table.option_errors]
        zero = np.zeros((1, seen.levels.shape[1]), dtype=np.int64)
        self._known = [name for name in costs if name in table.fixed]
        self._whole = {name: max(float(table.cost(name, zero)[0]), 1e-300) for name in table.fixed}
        features = self.features(seen.levels)
        self._damage_of = _DamageMap(seen, self._base, self._top)
        harm = self._damage_of.harm(seen)
        self._harm = LogModel(
            self._errors(seen.levels), harm, features, line=_LINE, strength=_LINE_STRENGTH, std=_LINE_STD, seed=seed
        )
        guesses = {name: (self._guess(name, seen.levels), np.maximum(seen.costs[name], 1e-9)) for name in costs}

        def fitted(rows: NDArray[np.bool_]) -> dict[str, LogModel]:
            return {n: LogModel(x[rows], y[rows], features[rows], seed=seed) for n, (x, y) in guesses.items()}

        # What the table has no combination for is off by far more, and would make all others as uncertain.
        complete = table.complete(seen.levels)
        self._costs = fitted(np.ones(len(complete), dtype=np.bool_))
        self._complete_costs = self._costs if complete.all() else fitted(complete)

    def harm(self, levels: Levels) -> Guess:
        """The divergence from the original, or what stands for it; see `loss_at`."""
        return self._harm.predict(self._errors(levels), self.features(levels))

    def loss_at(self, harm: Array) -> Array:
        """The loss that goes with a harm."""
        return self._base + (self._top - self._base) * -np.expm1(-self._damage_of.damage(harm))

    def harm_at(self, loss: Array) -> Array:
        """The harm that goes with a loss, 0 at the original's and infinite beyond the worst."""
        share = np.clip((loss - self._base) / (self._top - self._base), 0, 1)
        with np.errstate(divide="ignore"):
            return self._damage_of.harm_of(-np.log1p(-share))

    def cost(self, name: str, levels: Levels) -> Guess:
        """A cost relative to the original's; the standard deviation is that of its logarithm."""
        asked = self._guess(name, levels), self.features(levels)
        found = self._costs[name].predict(*asked)
        if self._complete_costs is self._costs:
            return found
        complete = self._complete_costs[name].predict(*asked)
        inside = self._table.complete(levels)
        return Guess(np.where(inside, complete.mean, found.mean), np.where(inside, complete.std, found.std))

    def features(self, levels: Levels) -> Array:
        """What corrections see: the share of the error that comes from every choice, and whether an option is taken."""
        parts = np.stack([e[levels[:, p]] for p, e in enumerate(self._option_errors)], 1)
        taken = [levels[:, p, None] == np.arange(1, len(e)) for p, e in enumerate(self._option_errors)]
        return np.concatenate([parts / np.maximum(parts.sum(1, keepdims=True), 1e-12), *taken], 1)

    def _errors(self, levels: Levels) -> Array:
        return np.clip(self._table.error(levels), 1e-9, _DESTROYED)

    def _guess(self, name: str, levels: Levels) -> Array:
        source = name if name in self._known else next(iter(self._table.fixed), None)
        if source is None:
            return np.ones(len(levels))
        return np.maximum(self._table.cost(source, levels) / self._whole[source], 1e-9)


class _DamageMap:
    """loss = base + (top - base)(1 - exp(-damage)), damage = exp(q) divergence^p where divergences were measured."""

    def __init__(self, seen: Evaluated, base: float, top: float) -> None:
        self._base, self._top = base, top
        self._p, self._q = 1.0, 0.0
        self._measured = len(seen.loss) > 0 and bool(np.isfinite(seen.divergence).all())
        if not self._measured:
            return
        from scipy.optimize import least_squares

        divergence = np.maximum(seen.divergence, 1e-9)

        def residuals(parameters: Array) -> Array:
            damage = np.exp(np.clip(parameters[1] + parameters[0] * np.log(divergence), -50, 50))
            loss = base + (top - base) * -np.expm1(-damage)
            # Held to where few candidates leave it open: a tenth of a point of accuracy for a step of one.
            return np.concatenate([loss - seen.loss, [0.02 * (parameters[0] - 1.0), 0.005 * (parameters[1] + 0.5)]])

        fit = least_squares(residuals, np.array([1.0, -0.5]), bounds=([0.3, -6.0], [3.0, 6.0]))
        self._p, self._q = float(fit.x[0]), float(fit.x[1])

    def harm(self, seen: Evaluated) -> Array:
        """The harm of evaluated candidates, positive."""
        if self._measured:
            return np.maximum(seen.divergence, 1e-6)
        share = np.clip((seen.loss - self._base) / (self._top - self._base), _SMALLEST, 1 - _SMALLEST)
        return -np.log1p(-share)

    def damage(self, harm: Array) -> Array:
        return np.asarray(np.exp(self._q) * harm**self._p)

    def harm_of(self, damage: Array) -> Array:
        found: Array = (damage * np.exp(-self._q)) ** (1 / self._p)
        return found


def _forest(features: Array, residuals: Array, seed: int, trees: int) -> Correction:
    from sklearn.ensemble import ExtraTreesRegressor

    forest = ExtraTreesRegressor(trees, min_samples_leaf=2, max_features=0.5, random_state=seed)
    forest.fit(features, residuals)
    return lambda asked: np.asarray(forest.predict(asked))


def _weights(features: Array, residuals: Array, shrink: float) -> Correction:
    """A weight for every option (ridge regression): costs add up, and an option that is misjudged is so everywhere."""
    mean = features.mean(0)
    rows = features - mean
    # As many unknowns as options and as many equations as candidates: the smaller system is solved.
    dual = np.linalg.solve(rows @ rows.T + shrink * np.eye(len(rows)), residuals)
    weights = rows.T @ dual
    return lambda asked: np.asarray((asked - mean) @ weights)
