"""golf_ray: train, quantise and score tiny language models as stages of one Ray application.

The Python interface has the shape of the command line's verbs: `golf_ray.train`,
`golf_ray.quantize`, `golf_ray.evaluate`, `golf_ray.audit`, `golf_ray.sweep`, over a
`golf_ray.Config`; `golf_ray.load_results` reads what any of them left.

Invariant: importing this package loads neither torch nor Ray; a name is loaded when it is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from golf_ray.api import audit, evaluate, evaluate_many, open_weights, quantize, train
    from golf_ray.config import Config
    from golf_ray.errors import GolfRayError
    from golf_ray.presets import preset
    from golf_ray.results.reading import load_results
    from golf_ray.sweeps.making import sweep

    __version__: str

__all__ = [
    "Config",
    "GolfRayError",
    "__version__",
    "audit",
    "evaluate",
    "evaluate_many",
    "load_results",
    "open_weights",
    "preset",
    "quantize",
    "sweep",
    "train",
]

_HOMES = {
    "Config": "golf_ray.config",
    "GolfRayError": "golf_ray.errors",
    "audit": "golf_ray.api",
    "evaluate": "golf_ray.api",
    "evaluate_many": "golf_ray.api",
    "load_results": "golf_ray.results.reading",
    "open_weights": "golf_ray.api",
    "preset": "golf_ray.presets",
    "quantize": "golf_ray.api",
    "sweep": "golf_ray.sweeps.making",
    "train": "golf_ray.api",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return _version()
    if name not in _HOMES:
        raise AttributeError(f"module 'golf_ray' has no attribute '{name}'")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _version() -> str:
    from importlib import metadata

    try:
        return metadata.version("golf-ray")
    except metadata.PackageNotFoundError:
        # Run from a source folder that is not installed.
        return "0+unknown"
