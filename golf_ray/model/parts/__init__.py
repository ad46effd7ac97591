"""Parts of the family beyond the base model: gates, smears, other norms, one file each.

A part is a subclass of `Part` that declares its tensors and overrides the places of the forward
where it enters. It then works in training, calibration, quantisation, evaluation and adaptation,
because all of them go through the one forward. `ModelConfig.parts` names parts:

- `name` for a module of this package that holds `PART`;
- `package.module:NAME` for an importable object;
- `path/to/file.py:NAME` for an object in a file.

The last two run code of the user's own; `is_builtin` tells them apart, so that a configuration
that came out of a foreign file can be refused before anything of it runs.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import pkgutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from golf_ray.config import ModelConfig
from golf_ray.errors import ConfigError, nearest
from golf_ray.model.segments import Segments
from golf_ray.model.specs import MatrixSpec, TensorSpec


@dataclass(frozen=True, slots=True)
class Pass:
    """What a part sees of the pass it takes part in."""

    config: ModelConfig
    tokens_T: Tensor
    """int64 [T] input ids."""
    segments: Segments
    weight: Callable[[str], Tensor]
    """A tensor of the state dict by name, in the arithmetic of the pass."""
    linear: Callable[[str, Tensor], Tensor]
    """`linear(name, x_TI)`: x W^T for a matrix of the part, seen by Hessian taps."""

    def previous(self, x_TD: Tensor) -> Tensor:
        """Each token's predecessor inside its segment; zeros at a segment's start."""
        shifted = x_TD.roll(1, 0)
        starts = self.segments.cu_seqlens[:-1].long()
        # Padded borders repeat T, which is no row: they fold onto row 0, a start anyway.
        starts = starts.where(starts < x_TD.shape[0], 0)
        keep = x_TD.new_ones(x_TD.shape[0], 1).index_fill(0, starts, 0.0)
        return shifted * keep


class Part:
    """A part that does nothing. Shapes: T tokens, D model dim, H heads, d head dim.

    The methods that a subclass does not override are never called.
    """

    def tensors(self, config: ModelConfig) -> tuple[TensorSpec, ...]:
        """Tensors that it adds to the state dict."""
        return ()

    def matrices(self, config: ModelConfig) -> tuple[MatrixSpec, ...]:
        """Those of its tensors that are to be quantised; it must use them through `Pass.linear`."""
        return ()

    def embedding(self, x_TD: Tensor, run: Pass) -> Tensor:
        """Changes the embedded tokens, before they become x0."""
        return x_TD

    def norm(self, x_TD: Tensor, run: Pass) -> Tensor:
        """Replaces the norm of the residual stream."""
        return x_TD

    def attention_output(self, y_THd: Tensor, n_TD: Tensor, layer: int, run: Pass) -> Tensor:
        """Changes the heads' outputs before the output matrix; n is the normed attention input."""
        return y_THd

    def mlp_output(self, y_TD: Tensor, n_TD: Tensor, layer: int, run: Pass) -> Tensor:
        """Changes the MLP's output; n is the normed MLP input."""
        return y_TD


def overriding(parts: tuple[Part, ...], place: str) -> tuple[Part, ...]:
    """Those parts that enter at `place`."""
    return tuple(p for p in parts if getattr(type(p), place) is not getattr(Part, place))


def is_builtin(name: str) -> bool:
    """Whether a name of `ModelConfig.parts` runs no code but this package's."""
    return ":" not in name


def resolve_parts(names: tuple[str, ...]) -> tuple[Part, ...]:
    """The parts of a configuration, each made once a process.

    Raises:
        ConfigError: there is no such part, or what is there is no `Part`.
    """
    return tuple(_resolve(name) for name in names)


@functools.cache
def _resolve(name: str) -> Part:
    if is_builtin(name):
        known = [m.name for m in pkgutil.iter_modules(__path__)]
        if name not in known:
            remedy = nearest(name, known) if known else "write module:PART or file.py:PART"
            raise ConfigError(f"unknown part '{name}' in model.parts", remedy)
        found = importlib.import_module(f"{__name__}.{name}").PART
    else:
        place, _, attribute = name.rpartition(":")
        module = _module_of_file(Path(place)) if place.endswith(".py") else _module(place)
        found = getattr(module, attribute, None)
    part = found() if isinstance(found, type) and issubclass(found, Part) else found
    if not isinstance(part, Part):
        raise ConfigError(f"'{name}' in model.parts is no Part", "give a subclass of Part")
    return part


def _module(place: str) -> object:
    try:
        return importlib.import_module(place)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"model.parts: module '{place}' is not found ({error})",
            "install it, or give a file.py:PART",
        ) from None


def _module_of_file(path: Path) -> object:
    if not path.is_file():
        raise ConfigError(f"model.parts: there is no file {path}", "check the path")
    name = f"golf_ray_part_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path.resolve())
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
