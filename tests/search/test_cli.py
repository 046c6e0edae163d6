"""The command line's promises: exit codes, one line for a mistake, nothing but the result on stdout with --json."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from planish.search import cli, commands
from planish.search.cli import main
from planish.search.command_text import command_line
from planish.search.commands import Output, overrides
from planish.search.config import load_spec
from planish.search.errors import UserError
from planish.search.front import Entry, front_document
from planish.search.objective import Objective
from planish.search.rundir import RunDirectory
from planish.search.spec_defaults import KEYS
from planish.search.text_table import text_of, text_table
from planish.search.trial import State, Trial
from planish.spaces import Candidate


@pytest.fixture
def run(tmp_path: Path) -> Path:
    metrics = {"accuracy": 0.9, "latency_s": {"cpu": {"value": 1.0, "ci95": None}}}
    entry = Entry(Trial(0, Candidate({"a": 0}), State.COMPLETE, metrics, None, 0), measured=True)
    objectives = (Objective("accuracy", "maximize"), Objective("latency[cpu]", "minimize"))
    with RunDirectory.create(tmp_path / "r", load_spec(None, {"model": "m", "data": "d"}), {}) as opened:
        opened.append(entry.trial)
        opened.write_front(front_document(objectives, [], entry, []))
    return tmp_path / "r"


def _planish(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "planish.search", *arguments], capture_output=True, text=True, cwd=cwd, check=False
    )


def _replace(monkeypatch: pytest.MonkeyPatch, name: str, handler: Callable[[argparse.Namespace], object]) -> None:
    def command(arguments: argparse.Namespace, text: str) -> Output:
        return Output(handler(arguments), "done")

    monkeypatch.setitem(commands.COMMANDS, name, command)


def test_help_lists_every_command_and_loads_nothing_heavy() -> None:
    code = (
        "import sys\nfrom planish.search.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'numpy', 'ray', 'optuna', 'tvm', 'sklearn', 'torch_pruning', 'psutil', 'PIL'}\n"
        "print(sorted(heavy & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"
    for command in commands.COMMANDS:
        assert f"\n    {command} " in done.stdout


@pytest.mark.parametrize("command", commands.COMMANDS)
def test_every_command_has_json_and_help(command: str) -> None:
    done = _planish(command, "--help")
    assert done.returncode == 0
    assert "--json" in done.stdout
    assert done.stderr == ""


def test_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    from importlib.metadata import version

    with pytest.raises(SystemExit) as done:
        main(["--version"])
    assert done.value.code == 0
    assert capsys.readouterr().out == f"planish {version('planish')}\n"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "COMMAND"),
        (["serach"], "invalid choice: 'serach'"),
        (["search", "--bugdet", "3"], "unknown flag --bugdet; did you mean '--budget'?"),
        (["status"], "RUN"),
        (["status", "nowhere"], "nowhere holds no run"),
        (["report", "nowhere"], "nowhere holds no run"),
        (["search", "none.toml"], "cannot read the specification none.toml"),
        (["search", "wrong.toml"], "wrong.toml has the unknown key 'modle'; did you mean 'model'?"),
        (["search"], "the command line lacks 'model'"),
        (["search", "--model", "m", "--data", "d"], "--out"),
        (["search", "--model", "m", "--data", "d", "--budget", "latency<2ms"], "latency<=2ms"),
        (["search", "--model", "m", "--data", "d", "--seed", "x"], "--seed"),
        (["search", "--model", "m", "--data", "d", "--set", "trials"], "KEY=VALUE"),
        (["search", "--model", "m", "--data", "d", "--set", "serach.trials=3"], "'serach.trials'"),
        (["export", "r"], "--out"),
        (["export", "r", "--out", "x", "--pick", "a", "--trial", "3"], "not allowed with"),
        (["status", "../r\nx"], "holds no run"),
    ],
)
def test_a_mistake_ends_with_2_and_one_line_on_stderr(tmp_path: Path, arguments: list[str], told: str) -> None:
    (tmp_path / "wrong.toml").write_text('modle = "m"\n')
    done = _planish(*arguments, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("planish: ")
    assert done.stderr.count("\n") == 1
    assert told in done.stderr


def test_status_and_report_answer_in_text_and_in_json(run: Path) -> None:
    done = _planish("status", str(run))
    assert done.returncode == 0
    assert "1 complete" in done.stdout
    done = _planish("status", str(run), "--json")
    assert (done.returncode, json.loads(done.stdout)["trials"]) == (0, {"complete": 1})
    done = _planish("report", str(run), "--json")
    assert (done.returncode, json.loads(done.stdout)) == (0, {"report": str(run / "report.html")})
    assert (run / "report.html").is_file()


def test_with_json_stdout_holds_the_result_alone_whatever_libraries_and_children_print(run: Path) -> None:
    code = (
        "import os, subprocess, sys\nfrom planish.search import cli, commands\n"
        "def noisy(arguments, command):\n"
        "    print('from python')\n    os.write(1, b'from C\\n')\n    subprocess.run(['echo', 'from a child'])\n"
        "    return commands.Output({'a': float('nan')}, '')\n"
        "commands.COMMANDS['devices'] = noisy\nsys.exit(cli.main(['devices', '--json']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, json.loads(done.stdout)) == (0, {"a": None})
    assert all(text in done.stderr for text in ("from python", "from C", "from a child"))


def _raise(error: BaseException) -> Callable[[argparse.Namespace], object]:
    def handler(arguments: argparse.Namespace) -> object:
        raise error

    return handler


def test_a_fault_of_planish_ends_with_1_and_names_a_log_with_the_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _replace(monkeypatch, "devices", _raise(KeyError("secret")))
    assert main(["devices"]) == 1
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert "KeyError: 'secret'" in told
    log = Path(told.rpartition("traceback in ")[2].strip().removesuffix(")"))
    assert "Traceback" in log.read_text()
    log.unlink()


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    _replace(monkeypatch, "devices", _raise(KeyError("secret")))
    assert main(["devices", "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_a_value_error_about_what_the_user_gave_is_a_mistake_and_one_of_a_library_is_a_fault(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def ours(arguments: argparse.Namespace) -> object:
        from planish.spaces import SearchSpace

        return SearchSpace.from_json({})

    def library(arguments: argparse.Namespace) -> object:
        return int("no number")

    _replace(monkeypatch, "devices", ours)
    assert main(["devices"]) == 2
    assert "a space needs the keys" in capsys.readouterr().err
    _replace(monkeypatch, "devices", library)
    assert main(["devices"]) == 1
    Path(capsys.readouterr().err.rpartition("traceback in ")[2].strip().removesuffix(")")).unlink()


def test_ctrl_c_ends_with_130_and_says_how_to_carry_on(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _replace(monkeypatch, "resume", _raise(KeyboardInterrupt()))
    assert main(["resume", str(run)]) == 130
    assert capsys.readouterr().err == f"planish: stopped; carry on with: planish resume {run}\n"
    assert main(["resume", str(run.parent / "nothing")]) == 130
    assert capsys.readouterr().err == "planish: stopped\n"


def test_a_reader_that_has_gone_is_no_error(run: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "planish.search", "status", str(run)],
        stdout=writing,
        stderr=subprocess.PIPE,
        check=False,
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, b"")


def test_every_key_of_the_top_level_is_a_flag_and_set_reaches_the_others() -> None:
    given = ["--set", "search.trials=64", "--set", "distill.rungs=[1, 2]", "--set", "sampler=tpe"]
    for key, entry in KEYS.items():
        if "." not in key:
            given += [f"--{key}", "3" if entry.kind == "integer" else "accuracy,size" if key == "objectives" else "x"]
    found = overrides(cli.parser().parse_args(["search", *given]))
    assert {key for key in KEYS if "." not in key} <= set(found)
    assert (found["search.trials"], found["distill.rungs"], found["sampler"]) == (64, [1, 2], "tpe")
    assert (found["seed"], found["device"], found["objectives"]) == (3, ["x"], ["accuracy", "size"])


def test_a_flag_given_twice_makes_a_list() -> None:
    arguments = cli.parser().parse_args(["search", "--device", "cpu", "--device", "cuda", "--budget", "size<=1KB"])
    assert overrides(arguments) == {"device": ["cpu", "cuda"], "budget": ["size<=1KB"]}


def test_a_recorded_command_holds_no_folder_of_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    given = [
        "search",
        f"{tmp_path}/runs/a.toml",
        "--weights=/data/w.pt",
        "--out",
        "/scratch/me/r",
        "--budget",
        "size<=1KB",
    ]
    assert command_line(given) == "planish search runs/a.toml --weights=w.pt --out r --budget 'size<=1KB'"


def test_tables_align_numbers_to_the_right_and_texts_to_the_left() -> None:
    assert text_table(["name", "n"], [["a", 5], ["long", 10], ["b", None]]).splitlines() == [
        "name   n",
        "a      5",
        "long  10",
        "b      -",
    ]


def test_a_result_is_worded_with_nested_tables_and_without_what_is_unknown() -> None:
    text = text_of(
        {"parity_ok": True, "missing": None, "latency_s": {"cpu": 0.00123}, "layers": [{"a": 1}, {"b": "x"}]}
    )
    assert text.splitlines() == [
        "parity ok: yes",
        "latency s:",
        "  cpu: 0.00123",
        "layers:",
        "  a  b",
        "  1  -",
        "  -  x",
    ]


def test_errors_are_user_errors_whatever_their_text_holds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _replace(monkeypatch, "devices", _raise(UserError("two\nlines of {braces} and %s")))
    assert main(["devices"]) == 2
    assert capsys.readouterr().err == "planish: two lines of {braces} and %s\n"


@pytest.mark.parametrize(
    "arguments", [["status", "LONG"], ["report", "LONG"], ["bench", "LONG"], ["search", "--model", "digits-resnet",
    "--data", "digits32", "--weights", "LONG", "--out", "run"], ["search", "LONG.toml", "--out", "run"]],
)  # fmt: skip
def test_a_path_that_the_system_does_not_take_is_a_mistake(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([argument.replace("LONG", "x" * 300) for argument in arguments]) == 2
    told = capsys.readouterr().err
    assert len(told.splitlines()) == 1
    assert "x" * 300 in told


def test_a_specification_that_is_nested_without_end_is_a_mistake(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "deep.toml").write_text("model = " + "[" * 5000 + "]" * 5000)
    assert main(["search", str(tmp_path / "deep.toml"), "--out", str(tmp_path / "run")]) == 2
    assert "is not TOML: it is nested too deep" in capsys.readouterr().err


def test_an_unknown_table_is_told_with_what_is_near(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["search", "--model", "digits-resnet", "--set", "serach.trials=3", "--out", "run"]) == 2
    assert "search.trials" in capsys.readouterr().err
