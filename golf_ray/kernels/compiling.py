"""torch.compile as everything here uses it: without what makes it compute wrong gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., object])

_LEFT_OUT = "triton.mix_order_reduction"
"""Inductor's fusion of a reduction over channels with one over rows (on by default since torch
2.10, in 2.10 and 2.11 at least) forgets to write sums that are parts of one larger tensor: what
factors of one table get as a gradient is whatever the memory held (pytorch/pytorch 193061)."""


def options() -> dict[str, Any]:
    """Inductor's settings that differ from its own."""
    # Takes a second to load, which nobody is to wait for who compiles nothing.
    import torch._inductor.config

    known = hasattr(torch._inductor.config.triton, _LEFT_OUT.rpartition(".")[2])
    return {_LEFT_OUT: False} if known else {}


def compiled(function: Function, *, fullgraph: bool = True) -> Function:
    """A function under torch.compile, each shape compiled for itself.

    What was compiled before in this process is forgotten, and compiled again where it is called:
    one run's code is of no use to the next, and after eight of them torch refuses a ninth.

    Args:
        fullgraph: whether what cannot be part of one graph is an error.
    """
    import torch._functorch.config

    # A saved tensor that is a view of a parameter (a stack of one, say) is taken for one that the
    # backward may write over: torch 2.13, seen on a model of one layer.
    torch._functorch.config.donated_buffer = False
    torch.compiler.reset()
    found: Any = torch.compile(function, fullgraph=fullgraph, dynamic=False, options=options())
    return found  # type: ignore[no-any-return]
