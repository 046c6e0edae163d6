"""Latency on a device, or with a number of threads, that was hardly measured, from the table of another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from .corrector import fetched
from .device import Device
from .held_out import HeldOut, held_out
from .latency import Prediction
from .relative_fit import log_error, relative_fit
from .table import TableModel
from .workload import Workload

# Fewer probes than this cannot tell the terms apart.
LEAST = 8
# Below this share within 10 % a transferred model is not to be used: measure a table.
TRUSTED = 0.9


@dataclass(frozen=True)
class TransferModel:
    """`L = a S + b P + c F`: S and P are what the source says of the calls that stay on one thread and of those that
    are shared among several, F the bytes that cores then fetch from each other. A kernel for several threads is another
    one than that for one: the source's regression says what it takes.

    Attributes:
        device: What is predicted.
        source: The table of another device or number of threads.
        coefficients: (a, b, c), none below zero; c in seconds a byte.
        error: The standard deviation of log(predicted / measured), each probe predicted from the others.
        probes: The errors on the probes, each predicted from the others.
    """

    device: Device
    source: TableModel
    coefficients: tuple[float, float, float]
    error: float
    probes: HeldOut

    @property
    def trusted(self) -> bool:
        """Whether it is exact enough to be used; if not, measure a table of the device."""
        return self.probes.within_10 >= TRUSTED

    @staticmethod
    def fit(
        device: Device, source: TableModel, networks: Sequence[Sequence[Workload]], measured_s: Sequence[float]
    ) -> TransferModel:
        """Fits to a few networks as planned for, and measured on, the device.

        Raises:
            ValueError: fewer than `LEAST`, or not as many of both.
        """
        if len(networks) != len(measured_s) or len(networks) < LEAST:
            raise ValueError(
                f"{len(networks)} networks and {len(measured_s)} times were given; {LEAST} probes of both are needed"
            )
        y = np.array(measured_s)
        terms = np.array([_terms(source, network)[0] for network in networks])
        terms[:, 2] *= 1e-10
        fit = relative_fit(terms, y, _EXPECTED)
        a, b, c = (float(value) for value in fit.coefficients)
        found = held_out(list(fit.left_out), list(y))
        return TransferModel(device, source, (a, b, c * 1e-10), log_error(fit.left_out, y), found)

    @property
    def basis(self) -> str:
        """See `LatencyModel.basis`."""
        return "kernels measured with another number of threads"

    def predict(self, workloads: Sequence[Workload]) -> Prediction:
        """See `LatencyModel.predict`."""
        if not workloads:
            return Prediction(0.0, 0.0, {})
        a, b, c = self.coefficients
        _, seconds, shared = _terms(self.source, workloads)
        own = np.where(shared, b * seconds + c * fetched(workloads), a * seconds)
        sites: dict[str, float] = {}
        for work, value in zip(workloads, own, strict=True):
            sites[work.site] = sites.get(work.site, 0.0) + float(value)
        return Prediction(float(own.sum()), self.error * float(own.sum()), sites)


# Two threads halve what is shared, at best.
_EXPECTED = (1.0, 0.5, 0.0)


def _terms(
    source: TableModel, workloads: Sequence[Workload]
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.bool_]]:
    """(S, P, F) of a network, and of every call the source's seconds and whether it is shared."""
    shared = np.array([work.threads > 1 for work in workloads])
    threads = source.device.threads
    alone = [replace(work, threads=min(work.threads, threads)) for work in workloads]
    kernels, _ = source.kernels(alone)
    seconds = source.corrector.calls_s(kernels, alone)
    terms = np.array([seconds[~shared].sum(), seconds[shared].sum(), fetched(workloads).sum()])
    return terms, seconds, shared
