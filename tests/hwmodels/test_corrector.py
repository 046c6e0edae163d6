"""Networks whose weights are more than a cache holds, and whose calls are shared among cores."""

from __future__ import annotations

from math import inf

import numpy as np
import pytest

from planish.hwmodels.corrector import Corrector, fetched, spilled, weights_of
from planish.hwmodels.device import host
from planish.hwmodels.kernel_database import KernelTime
from planish.hwmodels.quiet import Settled
from planish.hwmodels.table import TableModel
from planish.hwmodels.transfer import TransferModel
from planish.hwmodels.workload import Workload

_CACHE = 8e6
_SPILL_S = 4e-11


def _layer(size: int, threads: int = 1) -> Workload:
    """A layer of so many bytes of weights, whose time alone is `_alone`."""
    return Workload(f"l{size}", "conv2d", {"c": size}, size, size, 32, size, threads, "", float(size))


def _alone(work: Workload) -> float:
    return 5e-6 + 2e-11 * work.weight_bytes


def _networks(count: int, seed: int) -> list[list[Workload]]:
    """Networks of which one in four has large layers, most of them with more than `_CACHE` bytes of weights in all."""
    rng = np.random.default_rng(seed)
    sizes = ((5e3, 3e5, 6e5), (5e3, 5e4), (5e4, 2e5), (5e3, 5e4))
    return [[_layer(int(size)) for size in rng.choice(sizes[n % 4], rng.integers(20, 60))] for n in range(count)]


def _takes(network: list[Workload], spill_s: float = _SPILL_S) -> float:
    """A sum of kernels, and the bytes of what the cache does not keep at all, beyond a quarter more than it holds."""
    weights = weights_of(network)
    share = min(1.0, max(0.0, weights - _CACHE) / (0.25 * _CACHE))
    return 1.05 * sum(map(_alone, network)) + 3e-7 * len(network) + spill_s * share * weights


def _fit(networks: list[list[Workload]], spill_s: float = _SPILL_S) -> Corrector:
    sums = [sum(map(_alone, network)) for network in networks]
    return Corrector.fit(sums, networks, [_takes(network, spill_s) for network in networks])


def test_a_cache_keeps_all_of_what_fits_and_nothing_of_a_circle_that_is_much_larger() -> None:
    assert [spilled(weights, 8.0) for weights in (0.0, 8.0, 9.0, 10.0, 100.0)] == pytest.approx([0, 0, 0.5, 1, 1])
    assert spilled(1e12, inf) == 0


def test_what_large_networks_take_longer_is_learned_and_says_nothing_of_small_ones() -> None:
    found = _fit(_networks(32, seed=0))
    unseen = _networks(40, seed=1)
    large = [network for network in unseen if weights_of(network) > 1.3 * _CACHE]
    assert len(large) >= 5
    # Where between two of those that were measured the cache ends, none tells.
    told = [network for network in unseen if not 0.7 < weights_of(network) / _CACHE < 1.3]
    assert len(told) > 30
    assert max(abs(found.apply(sum(map(_alone, n)), n) / _takes(n) - 1) for n in told) < 0.1
    assert found.cache_bytes == pytest.approx(_CACHE, rel=0.35)
    # As if nothing was spilled they would be wrong by more than that.
    plain = _fit([network for network in _networks(32, seed=0) if weights_of(network) < _CACHE])
    assert (plain.spill_s, plain.cache_bytes) == (0, inf)
    assert max(_takes(n) / plain.apply(sum(map(_alone, n)), n) for n in large) > 1.3


@pytest.mark.parametrize(("spill_s", "found"), [(8e-12, True), (0.0, False)])
def test_a_few_large_networks_among_noisy_ones_tell_of_a_cache(spill_s: float, found: bool) -> None:
    """Three of 32, some 20 % slower for it: hardly more than the noise of all, and none of the median error."""
    rng = np.random.default_rng(4)
    large = [n for n in _networks(40, seed=3) if weights_of(n) > 1.25 * _CACHE]
    small = [n for n in _networks(50, seed=5) if weights_of(n) < 0.5 * _CACHE]
    networks = [*large[:3], *small[:29]]
    assert len(networks) == 32
    measured = [_takes(network, spill_s) * float(rng.normal(1, 0.03)) for network in networks]
    corrector = Corrector.fit([sum(map(_alone, n)) for n in networks], networks, measured)
    assert np.isfinite(corrector.cache_bytes) == found
    if found:
        assert 0.5 < corrector.spill_s / spill_s < 1.5


def test_where_nothing_is_spilled_no_cache_is_found() -> None:
    found = _fit(_networks(32, seed=2), spill_s=0.0)
    assert (found.spill_s, found.cache_bytes) == (0, inf)


def test_sites_sum_to_a_network_that_spills_and_so_do_calls_that_are_carried_over() -> None:
    corrector = Corrector(1e-6, 1.1, 0.0, error=0.05, networks=9, spill_s=_SPILL_S, cache_bytes=_CACHE)
    layers = [_layer(int(size)) for size in (5e3, 5e4, 3e5, 6e5)]
    times = {w.key(): KernelTime(w, Settled(_alone(w), _alone(w), _alone(w), 12, True)) for w in layers}
    table = TableModel(host(), times, corrector=corrector)
    network = layers * 15
    found = table.predict(network)
    assert weights_of(network) > 1.25 * _CACHE
    wanted = 1.1 * sum(map(_alone, network)) + 1e-6 * len(network) + _SPILL_S * weights_of(network)
    assert found.latency_s == pytest.approx(wanted)
    assert sum(found.site_s.values()) == pytest.approx(wanted)
    networks = [layers * count for count in range(2, 22)]
    carried = TransferModel.fit(host(), table, networks, [0.7 * table.predict(n).latency_s for n in networks])
    assert carried.predict(network).latency_s == pytest.approx(0.7 * wanted, rel=0.02)


def test_cores_fetch_what_one_of_them_wrote_and_little_of_what_each_wrote_itself() -> None:
    def call(threads: int, moved: int) -> Workload:
        return Workload("", "conv2d", {"c": 1}, 1, moved, 32, 1000, threads)

    network = [call(2, 5000), call(1, 3000), call(2, 9000), call(2, 3000), call(1, 2000), call(1, 2000), call(2, 400)]
    assert list(fetched(network)) == [4000, 0, 8000, 500, 0, 0, 0]
    assert list(fetched([])) == []
