"""Ray: actors that evaluate candidates, each warm with one model and data set."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..spaces.space import Candidate
from .errors import UserError
from .shipping import fetched, first_line, own_code

if TYPE_CHECKING:
    from ..hwmodels.device import Device
    from .config import Spec
    from .evaluate import Job, Metrics
    from .vectors import Vectors

# A worker that dies (killed, out of memory) is started again; a candidate that kills it so often has failed.
_RETRIES = 2
_DIED_OF = "(killed, or out of memory)"
# Workers that do not answer are waited for so long, and asked this often.
_SILENT_S, _BETWEEN_S = 300.0, 1.0
# A process for a task that does nothing is there within this, on a busy machine too.
_ANSWER_S = 60.0


class Failure(str):
    """Why a candidate could not be evaluated; its evaluation is over, the search is not."""


@contextmanager
def cluster(address: str, workers: int, gpus: int = 0) -> Iterator[int]:
    """A Ray session, local or on a cluster; the number of workers to use.

    Args:
        address: `local`, or where the cluster is.
        workers: 0: as many as there are cores.
        gpus: What a local session may train on; a cluster knows its own.

    Raises:
        UserError: there is no cluster at the address.
    """
    # No telemetry, and no second progress bar over ours.
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    # Else Tune takes a Ctrl-C for the end of a rung, whose trials have then failed.
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
    os.environ.setdefault("TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S", "0")
    # Whatever a user's factory opens by a relative path is found from where the search was launched.
    os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if address == "local":
        # Its processes then listen on loopback alone, as they do on systems where Ray has no clusters.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
        # Where its head dies, nothing brings it back: the session ends, to be carried on, after this and not a minute.
        os.environ.setdefault("RAY_gcs_rpc_server_reconnect_timeout_s", "15")
    elif "RAY_AUTH_MODE" not in os.environ and _has_token() and not _is_open(address):
        # `ray start` asks for the token of its user wherever there is one; a program has to say that it brings it.
        os.environ["RAY_AUTH_MODE"] = "token"
    import ray

    count = workers or os.cpu_count() or 1
    settings: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "include_dashboard": False}
    if address == "local":
        settings |= {"address": "local", "num_cpus": count, "num_gpus": gpus}
    else:
        settings = {"address": address, "log_to_driver": False, "logging_level": logging.ERROR}
    try:
        with ExitStack() as kept:
            code = kept.enter_context(own_code()) if address != "local" else {}
            ray.init(**settings, runtime_env=code)
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


@dataclass(frozen=True)
class Shared:
    """What every worker of a search gets.

    Attributes:
        spec: The search as resolved.
        devices: By label, pinned: a worker's node may have another processor.
        task: A reference to it in the object store; None where a worker loads it by its name.
        times: The database of kernel times that latency is predicted from; None: the user's.
        place: The folder that the search was launched from: a cluster's workers start in another, and whatever a
            user's factory opens by a relative path is found from there.
        vectors: That the space was made for: of a device that turned out to be a node's it would be another one.
    """

    spec: Spec
    devices: Mapping[str, Device] | None = None
    task: Any = None
    times: Path | None = None
    vectors: Vectors | None = None
    place: Path = field(default_factory=Path.cwd)


def _has_token() -> bool:
    """Whether the user has a token for Ray's clusters, where Ray looks for it."""
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    home = Path(named) if named else Path.home() / ".ray" / "auth_token"
    return bool(os.environ.get("RAY_AUTH_TOKEN")) or home.is_file()


def _is_open(address: str) -> bool:
    """Whether a cluster takes whoever comes, without a token.

    Asked in a process of its own: Ray reads its mode once. One that brings a token to a cluster without is let in, and
    then refuses what the cluster's nodes, who have none, ask of it.
    """
    code = (
        "import logging, sys, ray; ray.init(address=sys.argv[1], logging_level=logging.CRITICAL, log_to_driver=False)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, address], env={**os.environ, "RAY_AUTH_MODE": "disabled"}, capture_output=True,
        stdin=subprocess.DEVNULL, check=False,
    )  # fmt: skip
    return done.returncode == 0


class Pool:
    """Evaluation actors, as many as there are workers; each keeps one evaluator."""

    def __init__(self, shared: Shared, workers: int) -> None:
        """Starts the actors, of one core each; they load the task at their first job."""
        import ray

        self._ray, self._shared = ray, shared
        actor = ray.remote(num_cpus=1, max_restarts=-1, max_task_retries=0)(_Worker)
        self._actors = [actor.remote() for _ in range(workers)]
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

        A worker whose process died gets no job before it has answered again: where Ray itself dies, all of them die,
        again and again, and no candidate is to blame.
        """
        ray = self._ray
        idle = list(self._actors)
        # What runs: the actor, and its job; None where the actor is only asked whether it is alive.
        running: dict[Any, tuple[Any, tuple[Job, tuple[Any, ...]] | None]] = {}
        again: list[tuple[Job, tuple[Any, ...]]] = []
        deaths: Counter[int] = Counter()
        condemned: dict[Any, Job] = {}
        silent_since: float | None = None
        while True:
            while idle and (work := again.pop() if again else more()) is not None:
                # The one that has rested longest: what has just died needs time to be started again.
                actor = idle.pop(0)
                running[actor.call.remote(self._shared, method, *work)] = (actor, work)
                self._busy.add(actor)
            if not running:
                return
            [reference], _ = ray.wait(list(running), num_returns=1)
            actor, working = running.pop(reference)
            self._busy.discard(actor)
            try:
                result = ray.get(reference)
            except (ray.exceptions.RayActorError, ray.exceptions.OutOfMemoryError) as error:
                # One that cannot be reached may come back or be replaced; nobody knows that its process died.
                if working is not None and isinstance(error, ray.exceptions.ActorUnavailableError):
                    again.append(working)
                elif working is not None:
                    deaths[working[0].number] += 1
                    if deaths[working[0].number] > _RETRIES:
                        condemned[actor] = working[0]
                    else:
                        again.append(working)
                if _left_behind(ray):
                    raise UserError(
                        "Ray's process on this machine has died, and with it every worker of this session; what was "
                        "recorded is kept: give the same command again to carry on"
                    ) from error
                silent_since = silent_since or time.monotonic()
                if time.monotonic() - silent_since > _SILENT_S:
                    raise UserError(
                        f"no worker has answered for {_SILENT_S:.0f} s, the last because {first_line(error)}; what "
                        "was recorded is kept: once Ray's nodes have what workers need, give the same command again"
                    ) from error
                time.sleep(_BETWEEN_S)
                running[actor.answer.remote()] = (actor, None)
                continue
            except ray.exceptions.RayTaskError as error:
                cause = error.cause if isinstance(getattr(error, "cause", None), Exception) else error
                if isinstance(cause, UserError):
                    raise cause from None
                raise
            silent_since = None
            idle.append(actor)
            if working is not None:
                done(working[0], result)
            elif actor in condemned:
                done(condemned.pop(actor), Failure(f"the worker process died {_RETRIES + 1} times on it {_DIED_OF}"))

    def close(self) -> None:
        """Ends the actors, so that nothing of theirs runs while something is timed or trained elsewhere."""
        for actor in self._actors:
            # One that is at work was interrupted, and the session ends next; killed now, Ray would announce a retry.
            if actor not in self._busy:
                self._ray.kill(actor)
        self._actors = []


class _Worker:
    """The actor; `shared` comes with every call, because one that is started again knows nothing."""

    def __init__(self) -> None:
        self._evaluator: Any = None

    def call(self, shared: Shared, method: str, job: Job, arguments: tuple[Any, ...]) -> Metrics | Failure:
        if self._evaluator is None:
            self._evaluator = evaluator_in_worker(shared)
        return guarded(lambda: getattr(self._evaluator, method)(job, *arguments))

    def answer(self) -> bool:
        """Says that the process is there."""
        return True


def evaluator_in_worker(shared: Shared) -> Any:
    """An evaluator in a process of its own, on one thread: workers share the machine's cores."""
    import torch

    from ..compilers.cores import limit_cores
    from .allocator import keep_freed_memory
    from .evaluate import Evaluator

    if shared.place.is_dir():
        os.chdir(shared.place)
    torch.set_num_threads(1)
    limit_cores(1)
    keep_freed_memory()
    task = None if shared.task is None else fetched(shared.task)
    evaluator = Evaluator(shared.spec, task, shared.devices, shared.vectors)
    evaluator.times = shared.times
    return evaluator


def _left_behind(ray: Any) -> bool:
    """Whether the node that this program belongs to is dead: what it owns dies with it, and nothing comes back."""
    own = ray.get_runtime_context().get_node_id()
    return own not in {node["NodeID"] for node in ray.nodes() if node["Alive"]}


def answers(timeout_s: float = _ANSWER_S) -> bool:
    """Whether Ray still runs what it is given: where its own processes have died, everything dies."""
    import ray

    try:
        return bool(ray.get(ray.remote(num_cpus=0)(_true).remote(), timeout=timeout_s))
    except ray.exceptions.RayError:
        return False


def _true() -> bool:
    return True


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
