"""Distillation rungs on Ray Tune.

Ray Tune runs one rung at a time: a trainable of one candidate trains from its checkpoint to the rung's epochs. What
came out is in the run's journal before the next rung begins, so that a killed search trains again only what was not
recorded, from the last epoch's checkpoint.
"""

from __future__ import annotations

import logging
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from .errors import UserError
from .workers import Failure, Shared, answers, evaluator_in_worker, guarded, job_from, job_to

if TYPE_CHECKING:
    from .config import Spec
    from .evaluate import Job, Metrics

_RETRIES = 2


def run_rung(
    shared: Shared,
    jobs: Sequence[Job],
    epochs: int,
    total: int,
    workers: int,
    done: Callable[[int, Metrics | Failure], None],
) -> None:
    """Trains every job up to `epochs` of `total` on Ray Tune; `done` is called with its number as each one ends.

    Raises:
        UserError: a worker cannot load the task, or Ray itself has died; no trial is the worse for it.
    """
    from ray import tune

    # It prints the traceback of every process that dies; the trial says what became of it.
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    mistakes: list[str] = []
    unrecorded: list[Exception] = []
    outstanding = {job.number for job in jobs}

    class Record(tune.Callback):  # type: ignore[misc]
        def on_step_begin(self, iteration: int, trials: Any, **info: Any) -> None:
            if pressed:
                raise KeyboardInterrupt

        def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: Any, **info: Any) -> None:
            number = int(result["number"])
            if result.get("mistake"):
                mistakes.append(result["mistake"])
            elif number in outstanding:
                outstanding.discard(number)
                failure = result.get("failure")
                try:
                    done(number, Failure(failure) if failure else dict(result["metrics"]))
                except Exception as error:  # a full disk, for one; Tune would tell its traceback as text
                    unrecorded.append(error)
                    raise

    # Where a Ctrl-C ends the rung, Tune's processes may still write there while it is removed.
    kept = tempfile.TemporaryDirectory(prefix="planish-tune-", ignore_cleanup_errors=True)
    share = gpu_part(shared.spec, min(workers, len(jobs)))
    with _interrupts() as pressed, kept as storage:
        tuner = tune.Tuner(
            tune.with_resources(
                tune.with_parameters(_trainable(), shared=shared),
                tune.PlacementGroupFactory([{"CPU": 1, "GPU": share} if share else {"CPU": 1}]),
            ),
            param_space={"job": tune.grid_search([job_to(job) for job in jobs]), "epochs": epochs, "total": total},
            tune_config=tune.TuneConfig(max_concurrent_trials=workers, reuse_actors=True),
            run_config=tune.RunConfig(
                name="rung",
                storage_path=storage,
                verbose=0,
                callbacks=[Record()],
                failure_config=tune.FailureConfig(max_failures=_RETRIES),
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False, checkpoint_frequency=0),
                stop={"training_iteration": 1},
            ),
        )
        try:
            results = tuner.fit()
        except Exception:
            if unrecorded:
                raise unrecorded[0] from None
            raise
    if pressed:
        raise KeyboardInterrupt
    if mistakes:
        raise UserError(mistakes[0])
    # Whoever did not end and did not fail either was stopped, with all of Tune.
    if len(outstanding) > results.num_errors or (outstanding and not answers()):
        raise UserError(
            "Ray Tune or Ray's own processes were stopped; what was recorded is kept: give the same command again to "
            "carry on"
        )
    for number in sorted(outstanding):
        done(number, Failure(f"the training process died {_RETRIES + 1} times on it (killed, or out of memory)"))


def gpu_part(spec: Spec, trainings: int) -> float:
    """The part of a GPU of Ray's session that each of so many trainings at once gets; 0 where they use the CPU.

    Raises:
        UserError: the specification asks for a GPU, and the session has none.
    """
    import ray

    from .training_device import gpu_share

    return gpu_share(spec.distill.device, float(ray.cluster_resources().get("GPU", 0)), trainings)


@contextmanager
def _interrupts() -> Iterator[list[int]]:
    """The Ctrl-C that were pressed; the first raises nothing, a second does.

    Raised wherever Ray happens to be, in the middle of freeing an object for one, the exception is lost.
    """
    pressed: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield pressed
        return

    def note(number: int, frame: object) -> None:
        pressed.append(number)
        if len(pressed) > 1:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, note)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)


def _trainable() -> type:
    import ray
    from ray import tune

    class Rung(tune.Trainable):  # type: ignore[misc]
        """One candidate's training; the actor and its evaluator are reused for the next candidate."""

        def setup(self, config: dict[str, Any], shared: Shared | None = None) -> None:
            assert shared is not None
            self._job_config = config
            self._mistake = ""
            try:
                self._evaluator = evaluator_in_worker(shared)
                self._evaluator.gpu = bool(ray.get_gpu_ids())
            except UserError as error:
                # Raised here it would be taken for the death of the process, and tried again for every candidate.
                self._mistake = str(error)

        def step(self) -> dict[str, Any]:
            job = job_from(self._job_config["job"])
            if self._mistake:
                return {"number": job.number, "mistake": self._mistake, "failure": "", "metrics": {}}
            epochs, total = int(self._job_config["epochs"]), int(self._job_config["total"])
            try:
                result = guarded(lambda: self._evaluator.train(job, epochs, total))
            except UserError as error:
                return {"number": job.number, "mistake": str(error), "failure": "", "metrics": {}}
            if isinstance(result, Failure):
                return {"number": job.number, "failure": str(result), "metrics": {}}
            return {"number": job.number, "failure": "", "metrics": result}

        def reset_config(self, new_config: dict[str, Any]) -> bool:
            self._job_config = new_config
            return True

        def save_checkpoint(self, checkpoint_dir: str) -> None:
            """Nothing: the trial's own folder holds a checkpoint of every epoch."""

        def load_checkpoint(self, checkpoint: Any) -> None:
            """Nothing: see `save_checkpoint`."""

    return Rung
