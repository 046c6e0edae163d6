"""A workload's key: the same for the same work, in any process, whatever the site."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planish.hwmodels.workload import Workload

WORK = Workload("layer1.conv", "conv2d", {"c": 16, "o": 32, "h": 8, "w": 8, "kh": 3, "kw": 3}, 294912, 9216, 8)


def test_the_key_forgets_the_site_and_the_order_of_the_shapes() -> None:
    other = replace(WORK, site="layer9", shapes=dict(reversed(list(WORK.shapes.items()))))
    assert other.key() == WORK.key()


@pytest.mark.parametrize(
    "change",
    [{"op": "linear"}, {"bits": 32}, {"shapes": {**WORK.shapes, "h": 9}}, {"shapes": {**WORK.shapes, "stride": 1}}],
    ids=str,
)
def test_the_key_tells_different_work_apart(change: dict[str, object]) -> None:
    assert replace(WORK, **change).key() != WORK.key()  # type: ignore[arg-type]


@given(st.dictionaries(st.text(max_size=8), st.integers(0, 9), max_size=4), st.text(max_size=8))
def test_every_key_is_16_hexadecimal_digits(shapes: dict[str, int], op: str) -> None:
    key = Workload("", op, shapes, 0, 0).key()
    assert len(key) == 16
    assert set(key) <= set("0123456789abcdef")


def test_another_process_with_another_hash_seed_gives_the_same_key() -> None:
    code = f"from planish.hwmodels.workload import Workload; print({WORK!r}.key())"
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
        assert done.stdout.strip() == WORK.key()
