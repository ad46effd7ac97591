"""How many documents and tokens an engine takes at a time: from free memory, or as configured.

Invariant: the budget changes how long a result takes, and its rounding on a GPU, not what it is.
"""

from __future__ import annotations

from typing import Final

import torch

from golf_ray.adaptation.adapters import AdapterLayout
from golf_ray.adaptation.packing import Budget
from golf_ray.config import AdaptationConfig, ModelConfig
from golf_ray.model.compute import Compute
from golf_ray.model.layout import layer_plan

STEP_TOKENS: Final = {"cpu": 16_384, "cuda": 98_304}
"""Tokens of a step that a device is busy with: more gain nothing."""
RESIDENTS: Final = {"cpu": 64, "cuda": 384}
FREE_SHARE: Final = 0.85
"""Part of the free memory of a GPU that is used: the rest is for what sizes do not tell."""
MOST_BYTES: Final = 80_000_000_000
"""Of a GPU, whatever it has."""
PASSES_SHARE: Final = 0.7
"""Part of it that is for passes at most; the rest is for documents."""
PASSES: Final = 2
"""That memory is kept for: captured ones have a pool of their own beside that of the others."""

HELD_OVER_KEPT: Final = 1.3


def document_bytes(layout: AdapterLayout, adaptation: AdaptationConfig, itemsize: int) -> int:
    """Memory of a document's parameters, moments, shadow and gradient."""
    moments = (adaptation.optimizer == "adam") + (adaptation.beta1 > 0)
    return layout.num_parameters * (4 * (1 + moments) + 2 * itemsize)


def token_bytes(config: ModelConfig, adaptation: AdaptationConfig, itemsize: int) -> int:
    """Memory that a pass takes for a window's token, about: the record's 330 kB are what it keeps
    for its backward, and 430 kB what steps of many shapes were seen to hold (98,304 tokens)."""
    D, F, H = config.model_dim, config.mlp_dim, config.num_heads
    heads = (2 * H + 2 * config.num_kv_heads) * config.head_dim
    low = 5 * adaptation.rank
    layer = 6 * D + D + 2 * config.kv_dim + 2 * heads + F + low
    return round(HELD_OVER_KEPT * itemsize * layer * len(layer_plan(config, True)))


def choose_budget(
    config: ModelConfig,
    adaptation: AdaptationConfig,
    compute: Compute,
    layout: AdapterLayout,
    device: torch.device,
    *,
    num_documents: int,
) -> Budget:
    """A budget for a device as it is now, within what the configuration sets.

    Args:
        num_documents: how many there are; no memory is taken for more.
    """
    residents = min(adaptation.resident_documents or RESIDENTS[device.type], max(1, num_documents))
    step_tokens = adaptation.step_tokens or STEP_TOKENS[device.type]
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        room = min(FREE_SHARE * free, MOST_BYTES)
        itemsize = compute.dtype.itemsize
        of_token = PASSES * token_bytes(config, adaptation, itemsize)
        of_passes = step_tokens * of_token
        if adaptation.step_tokens is None:
            # Short documents need rows.
            share = max(adaptation.window * of_token, int(PASSES_SHARE * room))
            of_passes = min(of_passes, share)
            # Whole windows: where all are long nothing else fills what is left.
            step_tokens = of_passes // of_token // adaptation.window * adaptation.window
        if adaptation.resident_documents is None:
            # What a token is too short of stays free: a token more must not cost a document.
            left = room - of_passes
            of_document = max(1, document_bytes(layout, adaptation, itemsize))
            residents = max(1, min(residents, int(left / of_document)))
    return Budget(residents=residents, step_tokens=step_tokens)
