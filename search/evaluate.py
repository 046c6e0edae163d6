"""Evaluates candidates: builds, scores, trains and compiles them. Here spaces, devices and compilers come together."""

from __future__ import annotations

import copy
import logging
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..compilers.pinned import pinned
from ..compilers.registry import compiler_for
from ..compilers.verify import FLOAT_TOLERANCE, INT8_TOLERANCE
from ..hwmodels.device import Device, parse_device
from ..hwmodels.energy import energy_j
from ..spaces.apply import apply, rebuild, simplify, skeleton, state
from ..spaces.local_error import local_errors
from ..spaces.propose import Proposal, propose
from ..spaces.quantize import deploy
from ..spaces.size import count_macs, entropy_coded_bytes, stored_bytes
from ..spaces.space import Candidate, Kind
from ..spaces.trace import TracedModel, trace
from .artifact_path import artifact_path
from .atomic import write_json
from .config import DistillKeys, Spec
from .device_worker import LocalTimer
from .distill import distill
from .distill_recipe import Recipe
from .distill_state import CheckpointError, OtherVersion, load_checkpoint
from .errors import UserError
from .predicting import Predictor
from .rundir import LESSONS
from .score import accuracy, accuracy_and_divergence, outputs, paired_bootstrap
from .task_error import TaskError
from .tasks import Task, load_task
from .tensor_file import TensorFileError, read_tensors, write_tensors
from .training_device import device_for
from .vectors import Vectors

if TYPE_CHECKING:
    from ..compilers.compiler import Compiler
    from ..compilers.tvm_workloads import Plan
    from .measuring import Timer

Metrics = dict[str, object]

# Enough inputs for activation ranges and closed-form weights; more changed nothing on the tasks measured.
_CALIBRATION = 256
_EXAMPLES = 4
CHECKPOINT = "checkpoint.safetensors"
WEIGHTS = "weights.safetensors"


@dataclass(frozen=True)
class Job:
    """One candidate to evaluate: its number, seed and folder (`trials/0007`)."""

    number: int
    candidate: Candidate
    seed: int
    folder: Path


def devices_of(spec: Spec) -> dict[str, Device]:
    """The devices of a search by label, each pinned.

    Raises:
        DeviceError: one is not known.
    """
    return {label: pinned(parse_device(name)) for label, name in zip(spec.labels(), spec.device, strict=True)}


def recipe_of(keys: DistillKeys) -> Recipe:
    """How a search trains its candidates."""
    return Recipe(
        alpha=keys.alpha,
        temperature=keys.temperature,
        attention=keys.attention,
        hints=keys.hints,
        learning_rate=keys.learning_rate,
        batch=keys.batch_size,
        precision=keys.precision,
    )


class Evaluator:
    """A task with its space on its devices, kept warm for many candidates."""

    def __init__(
        self,
        spec: Spec,
        task: Task | None = None,
        devices: Mapping[str, Device] | None = None,
        vectors: Vectors | None = None,
    ) -> None:
        """Loads the task (unless it is given), traces the model and proposes its space.

        Args:
            spec: The search as resolved.
            task: If it has no name to load it by, or was loaded before.
            devices: By label; None: as the specification names them, on this machine.
            vectors: That the space is made for; None: those of the devices.

        Raises:
            ValueError: the task, the model or a device is not usable; one line says which and why.
        """
        self.spec = spec
        self.devices: dict[str, Device] = dict(devices) if devices else devices_of(spec)
        self.compilers: dict[str, Compiler] = {label: compiler_for(device) for label, device in self.devices.items()}
        self.task = task or load_task(spec.model, spec.data or None, spec.weights, seed=spec.seed)
        if not self.task.data.train.labelled and spec.distill.alpha < 1:
            raise TaskError(
                f"the training inputs have no labels and distill.alpha is {spec.distill.alpha}, the rest of which goes "
                "by labels; set distill.alpha = 1"
            )
        self.teacher = self.task.model
        self.traced: TracedModel = trace(self.teacher, self.task.data.example(1))
        self.timers: dict[str, Timer] = {
            label: LocalTimer(device, self.compilers[label]) for label, device in self.devices.items()
        }
        # Whether this process was given a part of a GPU to train on.
        self.gpu = False
        self._teacher_copy: nn.Module | None = None
        # The database that latency models come from, where it is not the user's.
        self.times: Path | None = None
        self.vectors = vectors or Vectors.of(self.devices.values(), spec.space.lanes)
        self.proposal: Proposal = propose(
            self.traced,
            lanes=self.vectors.lanes,
            families=tuple(Kind(family) for family in spec.space.families),
            bfloat16=self.vectors.bfloat16,
        )

    def move(self, label: str, device: Device, timer: Timer) -> None:
        """Lets a device be another machine's: what is compiled and timed from now on is for that one."""
        self.devices[label], self.timers[label] = device, timer

    def predict_by(self, times: Path) -> None:
        """Predicts by a database of kernel times, and plans convolutions by the tiles that it was measured with.

        Raises:
            DatabaseError: it is damaged.
        """
        from ..compilers.kernel_times import database_of

        self.times = times
        for label, device in list(self.devices.items()):
            tiles = database_of(device, times).tiles()
            self.move(label, replace(device, tiles=tiles), self.timers[label])

    @cached_property
    def calibration(self) -> Tensor:
        """Normalised training inputs, augmented as training sees them, shape (n, ...)."""
        train = self.task.data.train
        return train.calibration(min(_CALIBRATION, len(train)))

    def build(self, candidate: Candidate) -> nn.Module:
        """The compressed model before any training; `apply` corrects its batch norms for what compression changed."""
        if candidate.key() == self.proposal.space.original().key():
            return apply(candidate, self.traced, self.proposal, None)
        return apply(candidate, self.traced, self.proposal, self.calibration)

    def skeleton(self, candidate: Candidate) -> nn.Module:
        """The compressed model's structure with weights that nothing was fitted to: what it costs."""
        return skeleton(candidate, self.traced, self.proposal)

    def simplified(self, candidate: Candidate) -> Candidate:
        """The candidate without the options that change nothing next to its others; the same model.

        One that cannot be built is returned as it is: it fails when it is evaluated, and says why.
        """
        try:
            return simplify(candidate, self.traced, self.proposal)
        except (ValueError, RuntimeError):
            return candidate

    def score(self, job: Job) -> Metrics:
        """One-shot metrics on a sample of the validation split, and the size; compiled for every device."""
        torch.manual_seed(job.seed)
        module = self.build(job.candidate)
        metrics = self._one_shot(module)
        if self.spec.measure.latency == "predicted":
            return metrics | self.predicted(module)
        return metrics | self.compile(module, job, "untrained")

    def rescore(self, job: Job) -> Metrics:
        """One-shot accuracy on the whole validation split: of what may be trained, and was scored on a sample."""
        torch.manual_seed(job.seed)
        return self._accuracy(self.build(job.candidate), None)

    def foresee(self, job: Job) -> Metrics:
        """One-shot metrics like `score`'s, with latency predicted from the planned kernels instead of compiled code."""
        torch.manual_seed(job.seed)
        module = self.build(job.candidate)
        return self._one_shot(module) | self.predicted(module)

    def predicted(self, module: nn.Module) -> Metrics:
        """Latency, working memory and energy from the planned kernels; nothing is compiled."""
        program = torch.export.export(deploy(module), (self.traced.example,))
        return self.predictor.metrics(program, self.asks_energy)

    @cached_property
    def predictor(self) -> Predictor:
        """The latency models of the devices."""
        return Predictor(self)

    def _one_shot(self, module: nn.Module) -> Metrics:
        """Accuracy and divergence on a sample of the validation split, stored bytes and MACs."""
        limit = self.spec.search.proxy_images
        result, divergence = accuracy_and_divergence(module, self.task.data.validation, limit, self._teacher_logits)
        metrics: Metrics = {"accuracy": result.value, "accuracy_ci95": list(result.ci95)}
        if divergence is not None and math.isfinite(divergence):
            metrics["divergence"] = divergence
        return metrics | self.costs(module)

    @cached_property
    def _teacher_logits(self) -> Tensor | None:
        """Of the images that the one-shot score looks at; None where the model's outputs are not one row of classes."""
        if len(self.traced.output_shape) != 2 or self.traced.output_shape[1] < 2:
            return None
        chosen = self.task.data.validation.sample(self.spec.search.proxy_images)
        return torch.cat([outputs(self.teacher, inputs) for inputs, _ in chosen.batches(256)])

    def option_errors(self, job: Job, names: Sequence[str]) -> Metrics:
        """The errors of some choices' options (`spaces.local_error`), as `errors` and `failed`."""
        asked = [choice for choice in self.proposal.space.choices if choice.name in names]
        found = local_errors(self.traced, self.proposal, self.calibration, asked, seed=job.seed)
        return {"errors": {name: list(e) for name, e in found.errors.items()}, "failed": dict(found.failed)}

    def train(self, job: Job, epochs: int, total: int) -> Metrics:
        """Distils the original into the candidate up to so many epochs, and scores it on the whole validation split.

        Raises:
            UserError: it is to be trained on a GPU that torch cannot use, or its checkpoint is of another training.
        """
        checkpoint = job.folder / CHECKPOINT
        keys = self.spec.distill
        device = device_for(keys.device, self.gpu)
        torch.manual_seed(job.seed)
        module = self._begun(job).to(device)
        job.folder.mkdir(parents=True, exist_ok=True)
        try:
            distill(
                module,
                self._teacher_on(device),
                self.task.data.train,
                to_epoch=epochs,
                total_epochs=total,
                seed=job.seed,
                recipe=recipe_of(keys),
                checkpoint=checkpoint,
                samples=keys.train_limit,
                shared_seed=self.spec.seed,
                lessons=job.folder.parent.parent / LESSONS,
                restarts=[rung for rung in keys.rungs if rung < total],
            )
        except CheckpointError as error:
            # Of another version, perhaps: no fault of the candidate, and hours of training.
            raise UserError(f"{error}, or carry on with the version of planish that it began with") from None
        return self._accuracy(module, None)

    def _teacher_on(self, device: torch.device) -> nn.Module:
        """The teacher there; a copy elsewhere than on the CPU, because the traced model shares its tensors."""
        if device.type == "cpu":
            return self.teacher
        if self._teacher_copy is None:
            self._teacher_copy = copy.deepcopy(self.teacher).to(device)
        return self._teacher_copy

    def _begun(self, job: Job) -> nn.Module:
        """The candidate as its last checkpoint has it, or untrained.

        A checkpoint that the disk has damaged goes: training from the start gives the same student, bit for bit.
        """
        checkpoint = job.folder / CHECKPOINT
        if checkpoint.exists():
            try:
                return self.trained(job)
            except OtherVersion as error:
                raise UserError(f"{error}, or carry on with the version of planish that it began with") from None
            except CheckpointError as error:
                logging.getLogger(__name__).warning("%s; trial %d is trained from the start", error, job.number)
                checkpoint.unlink()
        return self.build(job.candidate)

    def finish(self, job: Job, recipe: Mapping[str, object] | None) -> Metrics:
        """Writes a trial's weights and recipe, compiles it for every device, and scores it on the validation split.

        Args:
            job: What was trained; with a recipe of None the candidate as it is (the original).
            recipe: Epochs, teacher and seed.
        """
        module = self.trained(job) if recipe is not None else self.build(job.candidate)
        job.folder.mkdir(parents=True, exist_ok=True)
        write_tensors(job.folder / WEIGHTS, state(module), {"options": dict(job.candidate.options)})
        write_json(job.folder / "recipe.json", {"recipe": recipe, "options": dict(job.candidate.options)})
        metrics = self._accuracy(module, None) | self.costs(module)
        metrics["entropy_coded_bytes"] = entropy_coded_bytes(module)
        metrics |= self.compile(module, job, "artifact")
        return metrics | (self.predicted(module) if self.spec.measure.latency == "predicted" else {})

    def test(self, job: Job, trained: bool) -> Metrics:
        """Accuracy on the test split: read once, for what is on the front at the end.

        Of what was trained also the 95 % interval of its change from the original's, on the same samples (paired
        bootstrap): much narrower than either's own.
        """
        module = self._exported(job) if trained else self.build(job.candidate)
        result = accuracy(module, self.task.data.test)
        metrics: Metrics = {"test_accuracy": result.value, "test_accuracy_ci95": list(result.ci95)}
        if trained:
            change = paired_bootstrap(result.correct, self._teacher_on_test, self.spec.seed)
            metrics["test_accuracy_change_ci95"] = list(change)
        return metrics

    @cached_property
    def _teacher_on_test(self) -> Tensor:
        """Which samples of the test split the original names rightly."""
        return accuracy(self.teacher, self.task.data.test).correct

    def trained(self, job: Job) -> nn.Module:
        """The candidate with the weights of its last checkpoint."""
        saved = load_checkpoint(job.folder / CHECKPOINT).student
        return rebuild(job.candidate, self.traced, self.proposal, saved).eval()

    def _exported(self, job: Job) -> nn.Module:
        """The candidate with the weights that `finish` wrote."""
        try:
            saved, _ = read_tensors(job.folder / WEIGHTS)
        except (TensorFileError, FileNotFoundError) as error:
            raise UserError(f"the weights of trial {job.number} cannot be read: {error}; restore them") from None
        return rebuild(job.candidate, self.traced, self.proposal, saved).eval()

    def costs(self, module: nn.Module) -> Metrics:
        """Stored bytes and MACs."""
        return {"size_bytes": stored_bytes(module), "macs": count_macs(module, self.traced.example)}

    def compile(self, module: nn.Module, job: Job, name: str, plans: dict[str, Plan] | None = None) -> Metrics:
        """Compiles for every device into `folder/NAME` (`NAME-DEVICE` for several); what a kill left there goes.

        Energy, where it is asked for, is modelled (see `hwmodels.energy`), the highest of all devices; measuring may
        find the real one. What it is modelled from joins `plans`, by device.
        """
        deployed = deploy(module)
        program = torch.export.export(deployed, (self.traced.example,))
        inputs = self.task.data.validation.batch(slice(0, _EXAMPLES)).unsqueeze(1)
        quantised = any(
            option is not None
            for choice, option in job.candidate.options.items()
            if choice.endswith(f":{Kind.BITS.value}")
        )
        peak, joules = 0, 0.0
        for label, device in self.devices.items():
            if self.asks_energy:
                from ..compilers.tvm_workloads import plan

                planned = plan(program, device)
                joules = max(joules, energy_j(planned.calls))
                if plans is not None:
                    plans[label] = planned
            folder = self.artifact_folder(job.folder, label, name)
            shutil.rmtree(folder, ignore_errors=True)
            artifact = self.compilers[label].compile(
                program, device, folder, inputs, tolerance=INT8_TOLERANCE if quantised else FLOAT_TOLERANCE
            )
            peak = max(peak, artifact.manifest.working_bytes)
        return {"peak_memory_bytes": peak, **({"energy_j": joules} if self.asks_energy else {})}

    @cached_property
    def asks_energy(self) -> bool:
        """Whether energy is asked for: planning a program, which modelling it needs, takes a moment."""
        return "energy" in self.spec.objectives or any(budget.metric == "energy" for budget in self.spec.budgets())

    def artifact_folder(self, folder: Path, label: str, name: str) -> Path:
        """Where a trial's artifact for a device is."""
        return artifact_path(folder, tuple(self.devices), label, name)

    def _accuracy(self, module: nn.Module, limit: int | None) -> Metrics:
        result = accuracy(module, self.task.data.validation, limit)
        return {"accuracy": result.value, "accuracy_ci95": list(result.ci95)}
