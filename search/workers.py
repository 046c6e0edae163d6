"""Ray: actors that evaluate candidates, each warm with one model and data set."""

from __future__ import annotations

import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..spaces.space import Candidate
from .errors import UserError

if TYPE_CHECKING:
    from .config import Spec
    from .evaluate import Job, Metrics
    from .tasks import Task

# A worker that dies (killed, out of memory) is started again; a candidate that kills it so often has failed.
_RETRIES = 2
# A node that cannot be reached is waited for: so often in a row, with so many seconds between.
_UNREACHABLE, _UNREACHABLE_S = 300, 1.0


class Failure(str):
    """Why a candidate could not be evaluated; its evaluation is over, the search is not."""


@contextmanager
def cluster(address: str, workers: int) -> Iterator[int]:
    """A Ray session, local or on a cluster; the number of workers to use.

    Raises:
        UserError: there is no cluster at the address.
    """
    # No telemetry, and no second progress bar over ours.
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    os.environ.setdefault("TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S", "0")
    # Whatever a user's factory opens by a relative path is found from where the search was launched.
    os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if address == "local":
        # Its processes then listen on loopback alone, as they do on systems where Ray has no clusters.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    import ray

    count = workers or os.cpu_count() or 1
    settings: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "include_dashboard": False}
    if address == "local":
        settings |= {"address": "local", "num_cpus": count}
    else:
        settings = {"address": address, "log_to_driver": False, "logging_level": logging.ERROR}
    try:
        ray.init(**settings)
    except (ConnectionError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()
        raise UserError(
            f"Ray cannot be started at address {address!r}: {reason[0] if reason else type(error).__name__}; "
            "start one with `ray start --head`, or leave address out for a local one"
        ) from error
    try:
        yield count if workers or address == "local" else max(1, int(ray.cluster_resources().get("CPU", 1)))
    finally:
        ray.shutdown()


class Pool:
    """Evaluation actors, as many as there are workers; each keeps one evaluator."""

    def __init__(self, spec: Spec, workers: int, task: Task | None = None, times: Path | None = None) -> None:
        """Starts the actors; they load the task at their first job.

        Args:
            spec: The search as resolved.
            workers: How many actors of one core each.
            task: The task itself, where it has no name to load it by.
            times: The database of kernel times that latency is predicted from; None: the user's.
        """
        import ray

        self._ray = ray
        actor = ray.remote(num_cpus=1, max_restarts=-1, max_task_retries=0)(_Worker)
        shared = ray.put(task) if task is not None else None
        place = Path.cwd()
        self._actors = [actor.remote(spec, shared, times, place) for _ in range(workers)]
        self._busy: set[Any] = set()

    def run(
        self, method: str, jobs: Sequence[tuple[Job, tuple[Any, ...]]], done: Callable[[Job, Metrics | Failure], None]
    ) -> None:
        """Runs a method of the evaluator for every job; `done` is called in the order in which they end."""
        waiting = iter(jobs)
        self.stream(method, lambda: next(waiting, None), done)

    def stream(
        self,
        method: str,
        more: Callable[[], tuple[Job, tuple[Any, ...]] | None],
        done: Callable[[Job, Metrics | Failure], None],
    ) -> None:
        """Runs a method of the evaluator for every job that `more` gives.

        It is asked whenever a worker is free, after `done` of what the worker did; None stands for none now, and if
        nothing runs, for the end.
        """
        ray = self._ray
        idle = list(self._actors)
        running: dict[Any, tuple[Any, Job, tuple[Any, ...]]] = {}
        again: list[tuple[Job, tuple[Any, ...]]] = []
        deaths: Counter[int] = Counter()
        unreachable = 0
        while True:
            while idle and (work := again.pop() if again else more()) is not None:
                # The one that has rested longest: what has just died needs time to be started again.
                job, arguments = work
                actor = idle.pop(0)
                running[actor.call.remote(method, job, arguments)] = (actor, job, arguments)
                self._busy.add(actor)
            if not running:
                return
            [reference], _ = ray.wait(list(running), num_returns=1)
            actor, job, arguments = running.pop(reference)
            idle.append(actor)
            self._busy.discard(actor)
            try:
                result = ray.get(reference)
            except ray.exceptions.ActorUnavailableError as error:
                # Its node cannot be reached, for which the candidate is not to blame; it may come back, or be replaced.
                unreachable += 1
                if unreachable > _UNREACHABLE:
                    raise UserError(
                        f"no worker could be reached for {_UNREACHABLE} tries, the last because {error}; what was "
                        "recorded is kept: once the nodes are back, give the same command again"
                    ) from error
                time.sleep(_UNREACHABLE_S)
                again.append((job, arguments))
                continue
            except ray.exceptions.RayActorError:
                deaths[job.number] += 1
                if deaths[job.number] <= _RETRIES:
                    again.append((job, arguments))
                    continue
                result = Failure(f"the worker process died {_RETRIES + 1} times on it (killed, or out of memory)")
            except ray.exceptions.RayTaskError as error:
                cause = error.cause if isinstance(getattr(error, "cause", None), Exception) else error
                if isinstance(cause, UserError):
                    raise cause from None
                raise
            unreachable = 0
            done(job, result)

    def close(self) -> None:
        """Ends the actors, so that nothing of theirs runs while something is timed or trained elsewhere."""
        for actor in self._actors:
            # One that is at work was interrupted, and the session ends next; killed now, Ray would announce a retry.
            if actor not in self._busy:
                self._ray.kill(actor)
        self._actors = []


class _Worker:
    """The actor."""

    def __init__(self, spec: Spec, task: Task | None, times: Path | None, place: Path) -> None:
        self._spec, self._task, self._times, self._place = spec, task, times, place
        self._evaluator: Any = None

    def call(self, method: str, job: Job, arguments: tuple[Any, ...]) -> Metrics | Failure:
        if self._evaluator is None:
            self._evaluator = evaluator_in_worker(self._spec, self._task, self._place)
            self._evaluator.times = self._times
        return guarded(lambda: getattr(self._evaluator, method)(job, *arguments))


def evaluator_in_worker(spec: Spec, task: Task | None, place: Path) -> Any:
    """An evaluator in a process of its own, on one thread: workers share the machine's cores.

    Args:
        spec: The search as resolved.
        task: The task itself, where it has no name to load it by.
        place: The folder that the search was launched from: a cluster's workers start in another, and whatever a
            user's factory opens by a relative path is found from there.
    """
    import torch

    from .evaluate import Evaluator

    if place.is_dir():
        os.chdir(place)
    torch.set_num_threads(1)
    return Evaluator(spec, task)


def guarded(step: Callable[[], Metrics]) -> Metrics | Failure:
    """The result of a step, or why the candidate failed at it; a user's mistake is still raised."""
    try:
        return step()
    except UserError:
        raise
    except Exception as error:
        # Whatever a candidate provokes in torch, TVM or numpy is that candidate's failure, not the search's.
        lines = str(error).strip().splitlines()
        logging.getLogger(__name__).debug("a candidate failed", exc_info=True)
        return Failure(f"{type(error).__name__}: {lines[0] if lines else 'no message'}")


def job_from(config: Mapping[str, Any]) -> Job:
    """The job that `job_to` wrote into a Tune configuration."""
    from .evaluate import Job

    return Job(int(config["number"]), Candidate(dict(config["options"])), int(config["seed"]), Path(config["folder"]))


def job_to(job: Job) -> dict[str, Any]:
    """A job as plain values."""
    return {
        "number": job.number,
        "options": dict(job.candidate.options),
        "seed": job.seed,
        "folder": str(job.folder),
    }
