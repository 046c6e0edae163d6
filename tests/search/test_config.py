"""Specifications: presets fill what is not given, every default is written out, every mistake is named."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planish.search.config import Spec, default_out, load_spec
from planish.search.errors import UserError
from planish.search.spec_defaults import FAMILIES, KEYS, PRESET_VALUES, PRESETS
from planish.search.toml_text import read_toml, write_toml
from planish.spaces import Kind

LEAST = 'model = "m"\ndata = "digits32"\n'


def _load(tmp_path: Path, text: str) -> Spec:
    path = tmp_path / "mine.toml"
    path.write_text(text, encoding="utf-8")
    return load_spec(path)


@pytest.mark.parametrize(
    ("preset", "trials", "rungs", "survivors"),
    [
        ("quick", 32, (2, 6), (22, 18)),
        ("default", 96, (1, 3, 10), (24, 12, 8)),
        ("thorough", 320, (1, 3, 10, 30), (48, 24, 12, 8)),
    ],
)
def test_preset_fills_what_is_not_given(
    tmp_path: Path, preset: str, trials: int, rungs: tuple[int, ...], survivors: tuple[int, ...]
) -> None:
    spec = _load(tmp_path, f'{LEAST}preset = "{preset}"\n')
    assert (spec.search.trials, spec.distill.rungs, spec.distill.survivors) == (trials, rungs, survivors)


def test_what_is_given_goes_before_the_preset() -> None:
    spec = load_spec(None, {"model": "m", "data": "d", "preset": "quick", "distill.rungs": [5, 9, 11]})
    assert spec.distill.rungs == (5, 9, 11)
    assert spec.distill.survivors == (22, 18, 18)
    assert spec.search.trials == 32


def test_few_trials_shrink_what_the_preset_filled_in() -> None:
    spec = load_spec(None, {"model": "m", "data": "d", "search.trials": 5})
    assert (spec.search.batch, spec.distill.survivors) == (5, (5, 5, 5))


def test_flags_go_before_the_file(tmp_path: Path) -> None:
    (tmp_path / "s.toml").write_text(LEAST + "seed = 1\n[search]\ntrials = 30\n")
    spec = load_spec(tmp_path / "s.toml", {"seed": 2, "search.trials": 40})
    assert (spec.seed, spec.search.trials) == (2, 40)


def test_a_text_stands_for_a_list_of_one(tmp_path: Path) -> None:
    spec = _load(tmp_path, LEAST + 'device = "cpu"\nbudget = "latency<=0.5x"\n')
    assert (spec.device, spec.budget) == (("cpu",), ("latency<=0.5x",))
    assert spec == _load(tmp_path, LEAST + 'device = ["cpu"]\nbudget = ["latency<=0.5x"]\n')


@pytest.mark.parametrize("preset", PRESETS)
def test_the_resolved_specification_holds_every_key_and_reads_back_as_itself(tmp_path: Path, preset: str) -> None:
    spec = _load(tmp_path, f'{LEAST}preset = "{preset}"\nbudget = ["latency<=0.5x", "size<=300KB"]\n')
    text = spec.resolved_toml()
    assert _load(tmp_path, text) == spec
    document = read_toml(text)
    for key in KEYS:
        table, dot, name = key.partition(".")
        assert (name in document[table]) if dot else (key in document)


def test_every_key_has_a_default_or_a_value_in_every_preset() -> None:
    for key, entry in KEYS.items():
        assert entry.required or entry.default is not None or all(key in PRESET_VALUES[preset] for preset in PRESETS)


@pytest.mark.parametrize(("limit", "images", "passes"), [(0, 500, 6), (100, 500, 1.2), (900, 500, 6)])
def test_the_longest_training_sees_every_image_so_often(tmp_path: Path, limit: int, images: int, passes: float) -> None:
    text = f"[distill]\nrungs = [2, 6]\nsurvivors = [2, 1]\ntrain_limit = {limit}\n"
    assert _load(tmp_path, LEAST + text).distill.passes(images) == pytest.approx(passes)


def test_families_are_those_of_the_space() -> None:
    assert tuple(kind.value for kind in Kind) == FAMILIES


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("sampeler = 'tpe'", "unknown key 'sampeler'; did you mean 'sampler'?"),
        ("[search]\ntrails = 3", "unknown key 'search.trails'; did you mean 'search.trials'?"),
        ("[serach]\ntrials = 3", r"unknown table \[serach\]; did you mean 'search'?"),
        ("seed = '3'", "seed = '3' must be a whole number"),
        ("seed = 1.5", "seed = 1.5 must be a whole number"),
        ("seed = true", "seed = True must be a whole number"),
        ("seed = -1", "seed = -1 is out of range; allowed is 0 to"),
        ("preset = 'fast'", "preset = 'fast': 'fast' is not allowed; .*default, quick, thorough"),
        ("sampler = 'nsga'", "did you mean 'nsga"),
        ("budget = 'latencyy<=2ms'", "did you mean 'latency'"),
        ("budget = [3]", "must be a text or a list of texts"),
        ("budget = ['size<=1KB', 'size<=1KB']", "repeats an entry"),
        ("device = []", "names no device"),
        ("device = ''", "names no device"),
        ("search = 3", "unknown key 'search'"),
        ("objectives = ['accuracy']", "at least one cost"),
        ("objectives = ['latency', 'size']", "accuracy"),
        ("objectives = ['accuracy', 'speed']", "'speed' is not allowed"),
        ("[search]\ntrials = 0", "search.trials = 0 is out of range"),
        ("[distill]\nrungs = []", "at least one"),
        ("[distill]\nrungs = [3, 3]\nsurvivors = [4, 2]", "must rise"),
        ("[distill]\nrungs = [1, 3]\nsurvivors = [2, 4]", "must not rise"),
        ("[distill]\nrungs = [1]\nsurvivors = [200]", "96 trials"),
        ("[distill]\nrungs = [1, 2]\nsurvivors = [2]", "one entry per rung"),
        ("[distill]\nsurvivors = [2]", "one entry per rung"),
        ("[distill]\nalpha = 1.5", "distill.alpha = 1.5 is out of range; allowed is 0 to 1"),
        ("[distill]\nalpha = nan", "out of range"),
        ("[space]\nfamilies = ['prunee']", "did you mean 'prune'"),
        ("[space]\nfamilies = []", "space.families is empty"),
        ("weights = 'nowhere.pt'", "weights names the file 'nowhere.pt', which is not in"),
        ("seed = ", "is not TOML"),
        ('address = "a\\u0000b"', "cannot be printed"),
    ],
)
def test_a_mistake_is_told_in_one_line_with_the_file_and_what_is_allowed(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(UserError, match=told) as error:
        _load(tmp_path, LEAST + text if text.startswith("[") else f"{text}\n{LEAST}")
    assert "\n" not in str(error.value)
    assert "mine.toml" in str(error.value) or "weights" in text


@pytest.mark.parametrize(("text", "key"), [('model = "m"', "data"), ('data = "d"', "model"), ("", "model")])
def test_a_missing_key_is_told_with_what_it_takes(tmp_path: Path, text: str, key: str) -> None:
    with pytest.raises(UserError, match=f"lacks '{key}': .*file.py:factory"):
        _load(tmp_path, text)


def test_a_missing_file_and_a_file_of_bytes_are_user_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file"):
        load_spec(tmp_path / "none.toml")
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="is not TOML"):
        load_spec(tmp_path / "bytes.toml")


def test_paths_are_found_in_the_current_folder_first_then_beside_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    for folder in (here, there):
        folder.mkdir()
        (folder / "both.pt").touch()
    (there / "net.py").touch()
    (there / "images").mkdir()
    (there / "board.toml").touch()
    monkeypatch.chdir(here)
    text = (
        'model = "net.py:make"\nweights = "both.pt"\ndata = "images:images?size=64"\ndevice = ["cpu", "board.toml"]\n'
    )
    (there / "s.toml").write_text(text)
    spec = load_spec(there / "s.toml")
    assert spec.model == f"{there / 'net.py'}:make"
    assert spec.weights == str(here / "both.pt")
    assert spec.data == f"images:{there / 'images'}?size=64"
    assert spec.device == ("cpu", str(there / "board.toml"))
    assert spec.labels() == ("cpu", "board")
    assert [target.metric for target in spec.targets()] == ["accuracy", "latency[cpu]", "latency[board]"]


@pytest.mark.parametrize(
    ("name", "value"),
    [("model", "package.module:make"), ("model", "hf:bert"), ("data", "digits32"), ("data", "cifar10:nowhere")],
)
def test_what_is_no_file_stays_as_it_is(name: str, value: str) -> None:
    assert getattr(load_spec(None, {"model": "m", "data": "d", name: value}), name) == value


def test_default_folder_is_beside_a_specification_in_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert default_out(tmp_path / "runs" / "digits.toml") == tmp_path / "runs" / "digits"
    assert default_out(tmp_path / "specs" / "digits.toml") == Path("runs/digits")
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path / "runs")
    assert default_out(Path("digits.toml")).resolve() == tmp_path / "runs" / "digits"


_SCALAR = st.one_of(
    st.booleans(),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(allow_nan=False),
    st.text(st.characters(exclude_categories=["Cs"])),
)


@pytest.mark.parametrize("text", ["\x7f", "\\", '"', "\n", "\t\b\x00\x1f", "ä\u2028\U0001f600", "'"])
def test_every_character_survives_toml(text: str) -> None:
    assert read_toml(write_toml({"key": text})) == {"key": text}


@given(st.dictionaries(st.from_regex(r"[a-z_]{1,8}(\.[a-z_]{1,8})?", fullmatch=True), st.lists(_SCALAR) | _SCALAR))
def test_written_toml_reads_back(values: dict[str, object]) -> None:
    tables = {key.partition(".")[0] for key in values if "." in key}
    values = {key: value for key, value in values.items() if key not in tables}
    expected: dict[str, object] = {}
    for key, value in values.items():
        table, dot, name = key.partition(".")
        if dot:
            inner = expected.setdefault(table, {})
            assert isinstance(inner, dict)
            inner[name] = value
        else:
            expected[key] = value
    assert read_toml(write_toml(values)) == expected


def test_the_home_of_a_user_who_is_not_here_is_a_path_like_any_other(tmp_path: Path) -> None:
    (tmp_path / "s.toml").write_text('model = "m"\ndata = "d"\nweights = "~nobody-here/w.pt"\n', encoding="utf-8")
    with pytest.raises(UserError, match=r"weights names the file '~nobody-here/w\.pt'"):
        load_spec(tmp_path / "s.toml")


def test_devices_whose_compiled_models_would_share_a_folder_are_refused() -> None:
    with pytest.raises(UserError, match=r"would share a folder of compiled models; rename one of the files"):
        load_spec(None, {"model": "m", "data": "d", "device": ["dev-a.toml", "dev_a.toml"]})
    with pytest.raises(UserError, match="would share a folder"):
        load_spec(None, {"model": "m", "data": "d", "device": ["cpu?threads=2", "cpu-threads-2.toml"]})
