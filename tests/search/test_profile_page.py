"""The page of a profile: everything is in it, nothing in it runs, and every text is escaped."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pytest

from planish.search.errors import UserError
from planish.search.profile_page import layers_svg, profile_html, write_profile_page

EVIL = "<script>alert(1)</script>"
PROFILE: dict[str, object] = {
    "model": EVIL,
    "devices": {
        "cpu": {
            "title": EVIL,
            "latency_s": 3e-4,
            "layers": [
                {"site": "conv1", "time_s": 2e-4, "roofline_share": 0.5},
                {"site": EVIL, "time_s": 1e-4, "roofline_share": 2.0},
                {"site": "dropped", "time_s": None, "roofline_share": None},
            ],
            "other_time_s": 5e-5,
            "reachable": {"latency_s": [1e-5, 3e-4]},
            "gains": [
                {"choice": "conv1:bits", "option": 8, "latency_ratio": 0.7, "size_ratio": 0.5, "pays": True, "why": ""},
                {"choice": EVIL, "option": 16, "latency_ratio": 1.0, "size_ratio": 0.9, "pays": False, "why": "so: x"},
            ],
            "latency_model": {
                "held_out": {"within_10": 0.96, "spearman": None},
                "notes": [f"few kernels were quiet {EVIL}"],
                "failed": {"kernel of conv9": EVIL},
            },
        }
    },
    "left_out": {"bn": EVIL},
}


def test_every_text_is_escaped_and_everything_is_there() -> None:
    page = profile_html(PROFILE)
    assert "<script" not in page
    shown = ("conv1", "0.700x", "0.96", "conv1:bits", "&lt;script&gt;", "300.0 us", "everything else")
    for text in (*shown, "few kernels were quiet", "kernel of conv9"):
        assert text in page


def test_bars_are_in_proportion_and_stay_inside() -> None:
    layers = [{"site": "a", "time_s": 4e-6, "roofline_share": 0.25}, {"site": "b", "time_s": 1e-6, "roofline_share": 3}]
    drawing = ElementTree.fromstring(layers_svg(layers, 2e-6))
    bars = [float(bar.attrib["width"]) for bar in drawing.iter("{http://www.w3.org/2000/svg}rect")]
    times, bounds = bars[::2], bars[1::2]
    assert times == pytest.approx([times[0], times[0] / 4, times[0] / 2], abs=0.1)
    assert bounds == pytest.approx([times[0] / 4, times[1], 0], abs=0.1)
    width = float(drawing.attrib["viewBox"].split()[2])
    assert all(length < width for length in times)


def test_an_empty_profile_is_a_page(tmp_path: Path) -> None:
    write_profile_page({"model": "m", "devices": {"cpu": {}}, "left_out": {}}, tmp_path / "page.html")
    assert "m" in (tmp_path / "page.html").read_text()


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--html"):
        write_profile_page(PROFILE, tmp_path / "missing" / "page.html")
