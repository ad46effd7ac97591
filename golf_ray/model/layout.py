"""The order in which layers run: encoder and decoder, extra passes, skips and lanes.

Pure functions of the configuration; nothing here knows a tensor. A *virtual* layer is one pass
over a physical layer: a looped layer has several, each with adapters of its own.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from golf_ray.config import ModelConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class VirtualLayer:
    """One pass over one layer."""

    slot: int
    """Place in the order, from 0."""
    layer: int
    """Physical layer."""
    pushes_skip: bool
    """An encoder pass: its output is kept for the decoder."""
    skip: int | None
    """Row of `skip_weights` under which a kept output enters before this pass."""
    lanes: bool
    """Runs as two parallel lanes."""
    splits: bool
    """The first pass in lanes: both lanes start here as copies."""


def layer_order(config: ModelConfig, loop: bool) -> tuple[list[int], list[int]]:
    """Physical layers of the encoder and of the decoder, in order."""
    order = list(range(config.num_layers))
    if not (loop and config.num_loops):
        half = config.num_layers // 2
        return order[:half], order[half:]
    looped = order[config.loop_start : config.loop_end + 1]
    order = (
        order[: config.loop_start] + looped * (config.num_loops + 1) + order[config.loop_end + 1 :]
    )
    half = len(order) // 2
    return order[:half], order[half:]


def num_skips(config: ModelConfig) -> int:
    """Rows of `skip_weights`: the shorter of encoder and decoder in the looped order."""
    encoder, decoder = layer_order(config, loop=True)
    return min(len(encoder), len(decoder))


@functools.cache
def layer_plan(config: ModelConfig, loop: bool) -> tuple[VirtualLayer, ...]:
    """Every pass in order, with what enters it."""
    encoder, decoder = layer_order(config, loop)
    plan = [
        VirtualLayer(slot=slot, layer=layer, pushes_skip=True, skip=None, lanes=False, splits=False)
        for slot, layer in enumerate(encoder)
    ]
    kept, lanes = len(encoder), False
    start = config.parallel_start_layer
    for step, layer in enumerate(decoder):
        splits = not lanes and start is not None and layer >= start
        lanes = lanes or splits
        skip = step if step < num_skips(config) and kept > 0 else None
        kept -= skip is not None
        plan.append(
            VirtualLayer(
                slot=len(encoder) + step,
                layer=layer,
                pushes_skip=False,
                skip=skip,
                lanes=lanes,
                splits=splits,
            )
        )
    return tuple(plan)


def looped_layers(config: ModelConfig) -> frozenset[int]:
    """Physical layers that are passed more than once."""
    if not config.num_loops:
        return frozenset()
    return frozenset(range(config.loop_start, config.loop_end + 1))
