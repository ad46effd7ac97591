"""The frame around the verbs: help, exit status, one-line errors, start-up time."""

from __future__ import annotations

import resource
import subprocess
import sys

import pytest
import typer
from cli_runner import ROOT, TINY, UPSTREAM, golf_ray, golf_ray_process, subprocess_environment

import golf_ray as package
from golf_ray import api
from golf_ray.cli import app
from golf_ray.presets import PRESETS


def verbs() -> list[tuple[str, ...]]:
    """Every verb, also those of groups."""
    found: list[tuple[str, ...]] = [()]

    def walk(command: object, path: tuple[str, ...]) -> None:
        for name, inner in getattr(command, "commands", {}).items():
            found.append((*path, name))
            walk(inner, (*path, name))

    walk(app.command(), ())
    return found


@pytest.mark.parametrize("verb", verbs(), ids=" ".join)
def test_every_verb_has_help_with_examples_in_80_columns(verb: tuple[str, ...]) -> None:
    done = golf_ray(*verb, "--help")
    assert done.status == 0 and not done.err
    assert "Examples:" in done.out and "golf-ray " in done.out.split("Examples:")[1]
    assert "<bool>" not in done.out
    assert max(map(len, done.out.splitlines())) <= 80


@pytest.mark.parametrize(
    "verb", [v for v in verbs() if v and v not in (("data",), ("config",), ("bench",))]
)
def test_every_verb_takes_json_and_debug(verb: tuple[str, ...]) -> None:
    text = golf_ray(*verb, "--help").out
    assert "--json" in text and "--debug" in text


def test_every_example_is_understood() -> None:
    for verb in verbs():
        lines = golf_ray(*verb, "--help").out.split("Examples:")[1].splitlines()
        for line in (line.strip() for line in lines if line.strip()):
            words = line.partition(">")[0].split()[1:]
            command = app.command()
            context = command.make_context("golf-ray", words)
            name, inner, rest = command.resolve_command(context, list(context._protected_args)
                                                        + context.args)  # fmt: skip
            while hasattr(inner, "commands"):
                inner = inner.commands[rest.pop(0)]
            inner.make_context(name, rest)


def test_help_names_all_presets() -> None:
    text = " ".join(golf_ray("config", "show", "--help").out.replace("│", " ").split())
    for name in PRESETS:
        assert name in text


def test_no_verb_shows_help_and_is_wrong_use() -> None:
    done = golf_ray()
    assert done.status == 2 and "Usage: golf-ray" in done.out + done.err


def test_version() -> None:
    done = golf_ray("--version")
    assert done.status == 0 and done.out == f"golf-ray {package.__version__}\n"


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["evil"], "No such command 'evil'"),
        (["eval"], "Missing argument 'CHECKPOINT...'; see 'golf-ray eval --help'"),
        (["eval", "x.pt", "--methd", "ttt"], "No such option: --methd"),
        (["eval", "x.pt", "--method", "tt"], "'tt' is not one of"),
        (["eval", "x.pt", "--workers", "0"], "--workers"),
        (["config", "show", "--set"], "--set"),
    ],
)
def test_wrong_use_is_one_line_and_status_2(argv: list[str], expected: str) -> None:
    done = golf_ray(*argv)
    assert done.status == 2 and not done.out
    assert expected in done.error and "--help'" in done.error


@pytest.mark.parametrize(
    ("error", "status", "expected"),
    [
        (RuntimeError("odd\nthing"), 1, "unexpected RuntimeError: odd thing; run again with"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (typer.Abort(), 130, "interrupted"),
        (OSError(28, "No space left on device", "/x/y"), 1, "No space left on device (/x/y)"),
    ],
)
def test_what_a_verb_raises_becomes_one_line(
    monkeypatch: pytest.MonkeyPatch, error: BaseException, status: int, expected: str
) -> None:
    def broken(path: object) -> None:
        raise error

    monkeypatch.setattr(api, "open_weights", broken)
    done = golf_ray("eval", "x.pt")
    assert done.status == status and expected in done.error and "Traceback" not in done.err


@pytest.mark.parametrize("argv", [("--debug", "eval", "no.pt"), ("eval", "no.pt", "--debug")])
def test_debug_adds_a_traceback(argv: tuple[str, ...]) -> None:
    done = golf_ray(*argv)
    assert done.status == 1
    assert "Traceback (most recent call last)" in done.err
    assert done.err.splitlines()[-1].startswith("golf-ray: error: no.pt ")


def test_main_ends_the_process_with_the_status() -> None:
    from golf_ray.cli import main

    with pytest.raises(SystemExit) as ended:
        main(["config", "show", "--preset", "smoll"])
    assert ended.value.code == 2


def test_a_reader_that_leaves_is_no_traceback() -> None:
    done = subprocess.run(
        f"{sys.executable} -m golf_ray config show --preset tiny | head -n 1",
        shell=True, cwd=ROOT, capture_output=True, text=True, env=subprocess_environment(),
        timeout=60, check=False,
    )  # fmt: skip
    assert done.stdout == "{\n" and "Traceback" not in done.stderr


def test_piped_commands_are_quiet() -> None:
    done = golf_ray_process("eval", TINY / "final_model.pt", *UPSTREAM, "--json")
    assert done.status == 0 and not done.err
    assert done.json["tokens_scored"] == 832


def cpu_seconds(*argv: str) -> float:
    """Least CPU time of a Python command: unlike wall time, what else runs has no part in it."""
    times = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(
            [sys.executable, *argv], check=True, capture_output=True, env=subprocess_environment()
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(times)


def test_starting_is_quick() -> None:
    # The interpreter's own start is no part of the import.
    bare = cpu_seconds("-c", "pass")
    assert cpu_seconds("-c", "import golf_ray") - bare < 0.2
    assert cpu_seconds("-m", "golf_ray", "--help") < 0.5


@pytest.mark.parametrize("argv", [("--help",), ("eval", "--help"), ("config", "presets")])
def test_light_verbs_load_nothing_heavy(argv: tuple[str, ...]) -> None:
    program = (
        "import sys; from golf_ray.cli import run; status = run(sys.argv[1:])\n"
        "heavy = {'torch', 'ray', 'numpy', 'pandas', 'optuna', 'pyarrow'} & set(sys.modules)\n"
        "sys.exit(f'loaded {heavy}' if heavy else status)"
    )
    subprocess.run(
        [sys.executable, "-c", program, *argv], check=True, timeout=60,
        stdout=subprocess.DEVNULL, env=subprocess_environment(),
    )  # fmt: skip
