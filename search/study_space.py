"""A search space as Optuna has it, and finished trials put into a study without asking for them."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

from ..spaces.space import Candidate, SearchSpace

if TYPE_CHECKING:
    import optuna


def distributions_of(space: SearchSpace) -> dict[str, optuna.distributions.BaseDistribution]:
    """Every choice as a categorical distribution over its options."""
    import optuna

    return {c.name: optuna.distributions.CategoricalDistribution(list(c.options)) for c in space.choices}


def add_finished(
    study: optuna.Study,
    storage: optuna.storages.BaseStorage,
    distributions: dict[str, optuna.distributions.BaseDistribution],
    finished: Sequence[tuple[Candidate, Sequence[float] | None, Mapping[str, object]]],
) -> None:
    """Adds trials that have ended: (candidate, values or None if it failed, user attributes).

    `Study.add_trials` checks and copies every parameter, milliseconds a trial of a large space.
    """
    import optuna

    class Finished(optuna.trial.FrozenTrial):
        def __deepcopy__(self, memo: dict[int, Any]) -> optuna.trial.FrozenTrial:
            # Nothing changes a trial that has ended, so that its parameters need not be copied.
            return copy.copy(self)

    states, now = optuna.trial.TrialState, datetime.now()
    place = storage.get_study_id_from_name(study.study_name)
    for candidate, values, attributes in finished:
        trial = Finished(
            number=-1,
            trial_id=-1,
            state=states.FAIL if values is None else states.COMPLETE,
            value=None,
            values=None if values is None else list(values),
            datetime_start=now,
            datetime_complete=now,
            params=dict(candidate.options),
            distributions=distributions,
            user_attrs=dict(attributes),
            system_attrs={},
            intermediate_values={},
        )
        storage.create_new_trial(place, template_trial=trial)
