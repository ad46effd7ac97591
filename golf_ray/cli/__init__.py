"""The command line: `golf-ray VERB`.

What happens around every verb is here: arguments in, exit status out, errors as one line. A verb
is a function in a module of its own that loads what it needs when it runs, so that help is there
at once. Computing is not done here but in `golf_ray.api`.

Invariant: what goes wrong ends in one line on standard error and a status that is not 0: 1 for a
failure, 2 for wrong use, 130 for Ctrl-C. A traceback is shown with `--debug` only.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from golf_ray.errors import GolfRayError

INTERRUPTED = 128 + signal.SIGINT


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run a command and end the process with its exit status.

    Args:
        argv: the arguments after the program's name; the process's own by default.
    """
    sys.exit(run(sys.argv[1:] if argv is None else argv))


def run(argv: Sequence[str]) -> int:
    """Run a command and return its exit status; errors are printed."""
    debug = "--debug" in argv
    # Ray would start a cluster by itself for a thread of Tune's that outlives the connection.
    os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")
    try:
        with warnings.catch_warnings():
            if not debug and not sys.warnoptions:
                # Those of libraries are for who writes code, and an error is one line.
                warnings.simplefilter("ignore")
            return _invoke(list(argv))
    except GolfRayError as error:
        return _failed(str(error), error.exit_status, debug)
    except KeyboardInterrupt as stop:
        return _failed("; ".join(["interrupted", *map(str, stop.args)]), INTERRUPTED, debug)
    except BrokenPipeError:
        # The reader of a pipe has seen enough, as `head` does.
        _silence_stdout()
        return 1
    except OSError as error:
        return _failed(_os_error(error), 1, debug)
    except Exception as error:
        what = " ".join(f"{type(error).__name__}: {error}".split())
        return _failed(f"unexpected {what}; run again with --debug for a traceback", 1, debug)


def _invoke(argv: list[str]) -> int:
    import typer

    from golf_ray.cli.app import command

    # The class that every error of parsing has; typer brings it from one place or another.
    parsing_error: Any = typer.BadParameter.__mro__[2]
    verb = command()
    try:
        with verb.make_context("golf-ray", argv) as context:
            verb.invoke(context)
        sys.stdout.flush()
    except typer.Exit as done:
        sys.stdout.flush()
        return int(done.exit_code)
    except typer.Abort:
        raise KeyboardInterrupt from None
    except parsing_error as error:
        return _wrong_use(error)
    return 0


def _wrong_use(error: BaseException) -> int:
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else "golf-ray"
    text: Callable[[], str] = getattr(error, "format_message", error.__str__)
    message = " ".join(text().split()).rstrip(".")
    if not message:
        # Nothing was asked for, and the help has been printed.
        return 2
    return _failed(f"{message}; see '{path} --help'", 2, debug=False)


def _os_error(error: OSError) -> str:
    where = f" ({error.filename})" if error.filename else ""
    return f"{error.strerror or error}{where}; check the disk, the path and its permissions"


def _failed(line: str, status: int, debug: bool) -> int:
    if debug:
        import traceback

        traceback.print_exc()
    with contextlib.suppress(BrokenPipeError):
        print(f"golf-ray: error: {line}", file=sys.stderr, flush=True)
    return status


def _silence_stdout() -> None:
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
