"""Real text that every machine with Python has: the standard library's documentation and source.

Used where a first run must not need a download. Each module gives several documents: its own
documentation string, and for each of its top-level functions and classes the documentation
strings in it as one document and the code without them as another, so that no text comes twice.
Tests and installed packages are left out.

Invariant: on one Python installation the documents and their order are always the same.
"""

from __future__ import annotations

import ast
import hashlib
import os
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

from golf_ray.errors import DataError

MIN_DOCUMENT_CHARS: Final = 100
"""Shorter ones are left out: one line of documentation, an import block."""

_LEFT_OUT: Final = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "lib2to3", "__pycache__"}
)
_DEFINITIONS = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def python_library_text(limit_bytes: int) -> Iterator[tuple[str, str]]:
    """Documents of the standard library as (name, text) until `limit_bytes` UTF-8 bytes are out.

    Modules come in the order of a hash of their names, so that a small part is a fair mixture.

    Raises:
        DataError: this Python has its library in no readable folder.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    modules = sorted(_modules(root), key=lambda name: hashlib.sha256(name.encode()).digest())
    if not modules:
        raise DataError(
            f"Python's standard library has no source files in {root}",
            "give a folder of text to 'golf-ray data build'",
        )
    used_bytes = 0
    for name in modules:
        for part, text in _documents(root / name):
            size_bytes = len(text.encode())
            if used_bytes + size_bytes > limit_bytes:
                return
            used_bytes += size_bytes
            yield f"{name}:{part}", text


def _modules(root: Path) -> Iterator[str]:
    for parent, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in _LEFT_OUT]
        for file in files:
            if file.endswith(".py"):
                yield (Path(parent) / file).relative_to(root).as_posix()


def _documents(path: Path) -> Iterator[tuple[str, str]]:
    try:
        source = path.read_text(encoding="utf-8")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
    except (SyntaxError, ValueError, OSError):
        # Templates and files in older encodings lie among the modules.
        return
    # Not splitlines(), which also breaks where Python counts no new line (form feeds).
    lines = source.split("\n")
    taken: set[int] = set()
    prose = [("module", _docstrings([tree], taken))]
    definitions = [node for node in tree.body if isinstance(node, _DEFINITIONS)]
    prose += [(node.name, _docstrings(ast.walk(node), taken)) for node in definitions]
    for name, text in prose:
        if len(text) >= MIN_DOCUMENT_CHARS:
            yield f"{name}:documentation", text
    for node in definitions:
        span = range(node.lineno, (node.end_lineno or node.lineno) + 1)
        code = "\n".join(lines[i - 1] for i in span if i not in taken)
        if len(code) >= MIN_DOCUMENT_CHARS:
            yield f"{node.name}:code", code


def _docstrings(nodes: Iterable[ast.AST], taken: set[int]) -> str:
    """The documentation strings of some nodes; the lines they stand on are added to `taken`."""
    found = []
    for node in nodes:
        if isinstance(node, (ast.Module, *_DEFINITIONS)) and (text := ast.get_docstring(node)):
            first = node.body[0]
            taken.update(range(first.lineno, (first.end_lineno or first.lineno) + 1))
            found.append(text)
    return "\n\n".join(found)
