"""How verbs become a typer application: groups, help texts, examples.

Invariant: every verb's help ends with examples.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import typer
from typer.core import TyperGroup

SETTINGS = {"help_option_names": ["-h", "--help"]}

NO_VALUE = ""
"""What a switch takes; without it help shows a type."""


VERBS = (
    "quickstart", "data", "train", "quantize", "eval", "audit", "sweep", "confirm", "status",
    "show", "export", "compare", "report", "submit", "bench", "config", "doctor",
)  # fmt: skip
"""Order of the verbs in help, that of the work; others come last."""


class Verbs(TyperGroup):
    """Lists verbs in the order of the work, whether they have verbs of their own or not."""

    def list_commands(self, ctx: Any) -> list[str]:
        """All names in order."""
        names = super().list_commands(ctx)
        return sorted(names, key=lambda name: VERBS.index(name) if name in VERBS else len(VERBS))


def examples(*lines: str) -> str:
    """The end of a verb's help: commands to copy, each on its line."""
    return "\n".join(("Examples:", *(f"  {line}" for line in lines)))


def make_group(help_text: str, epilog: str | None = None) -> typer.Typer:
    """A verb that has verbs of its own."""
    return typer.Typer(
        help=help_text,
        epilog=epilog,
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode="rich",
        context_settings=SETTINGS,
    )


def add_verb(app: typer.Typer, name: str, verb: Callable[..., Any], epilog: str) -> None:
    """Add a function as a verb, with its docstring as help."""
    app.command(name, help=paragraphs(verb), epilog=epilog, context_settings=SETTINGS)(verb)


def paragraphs(verb: Callable[..., Any]) -> str:
    """A verb's docstring with each paragraph in one piece, for the terminal to break."""
    parts = inspect.cleandoc(verb.__doc__ or "").split("\n\n")
    return "\n\n".join(" ".join(part.split()) for part in parts)
