"""Low-rank adapters of many documents: where they sit, their memory, and how a forward meets them.

y += (x A^T) B^T with A [rank, in] and B [out, rank], a pair for each document and slot. This module
knows nothing of chunks, scores or optimizers.

Shapes: N documents, P parameters of one document, R rank, I input and O output features, T rows of
a flat buffer, L rows of a document in it.

Invariant: a document's rows meet its own adapter only; no operation mixes documents.
"""

from __future__ import annotations

import itertools
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch
from numpy.lib.npyio import NpzFile
from numpy.typing import NDArray
from torch import Tensor

from golf_ray.adaptation.philox import adapter_as
from golf_ray.config import AdapterSite, ModelConfig
from golf_ray.errors import DataError
from golf_ray.model.hooks import Hooks, Site
from golf_ray.model.layout import layer_plan

SITE_CODES: Final[Mapping[AdapterSite, int]] = {
    "q": 0, "k": 1, "v": 2, "o": 3, "mlp": 4, "head": 5
}  # fmt: skip
"""Part of the adapters' identity: a code is never given to another site."""
SITES_A_LAYER: Final = 8
"""Room for sites in a slot id, so that ids stay when a site is added."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterSlot:
    """One place of the forward that carries an adapter."""

    site: AdapterSite
    layer: int
    """Virtual layer; for the head the number of virtual layers."""
    in_features: int
    out_features: int

    @property
    def id(self) -> int:
        """Stable number of this place, whatever other slots there are: a Philox counter word."""
        return self.layer * SITES_A_LAYER + SITE_CODES[self.site]


def adapter_slots(
    config: ModelConfig, sites: Sequence[AdapterSite] = tuple(SITE_CODES)
) -> tuple[AdapterSlot, ...]:
    """The slots of a model, by virtual layer and then by site; a looped layer has one a pass."""
    dim = config.model_dim
    widths: dict[AdapterSite, int] = {
        "q": dim, "k": config.kv_dim, "v": config.kv_dim, "o": dim, "mlp": dim
    }  # fmt: skip
    layers = layer_plan(config, True)
    slots = [
        AdapterSlot(site=site, layer=step.slot, in_features=dim, out_features=width)
        for step in layers
        for site, width in widths.items()
        if site in sites
    ]
    if "head" in sites:
        slots.append(
            AdapterSlot(
                site="head", layer=len(layers), in_features=dim, out_features=config.vocab_size
            )
        )
    return tuple(slots)


Pairs = dict[tuple[Site, int], tuple[Tensor, Tensor]]
"""(site, layer) -> A [N, R, I] and B [N, O, R]."""

SHARED_INPUT: Final[tuple[AdapterSite, ...]] = ("k", "v", "q", "o")
"""Sites of a layer that have one input, in the order of their A in a document's parameters: a run
of them is one matrix. Keys and values come first, because the last layer needs those of all rows
and the others of few."""


class AdapterLayout:
    """Where the parameters of a document lie: layer by layer the A of `SHARED_INPUT`, their B, then
    A and B of the MLP; last those of the head.

    Args:
        slots: those of `adapter_slots`.
        rank: of every adapter.
    """

    def __init__(self, slots: Sequence[AdapterSlot], rank: int) -> None:
        self.slots = tuple(slots)
        self.rank = rank
        self.places: dict[tuple[Site, int], tuple[int, int]] = {}
        """(site, layer) -> where A and B begin."""
        self.of: dict[tuple[Site, int], AdapterSlot] = {(s.site, s.layer): s for s in slots}
        place = 0
        for layer, found in itertools.groupby(self.slots, key=lambda slot: slot.layer):
            sites = {slot.site: slot for slot in found}
            shared = [sites[site] for site in SHARED_INPUT if site in sites]
            alone = [sites[site] for site in ("mlp", "head") if site in sites]
            for group in (shared, *([slot] for slot in alone)):
                a_places = []
                for slot in group:
                    a_places.append(place)
                    place += rank * slot.in_features
                for slot, a_place in zip(group, a_places, strict=True):
                    self.places[slot.site, layer] = (a_place, place)
                    place += rank * slot.out_features
        self.num_parameters = place

    def views(self, buffer_NP: Tensor) -> Pairs:
        """A and B of some documents as views of their rows of parameters."""
        num, rank = buffer_NP.shape[0], self.rank
        pairs: Pairs = {}
        for key, (a, b) in self.places.items():
            slot = self.of[key]
            I, O = slot.in_features, slot.out_features  # noqa: E741
            pairs[key] = (
                buffer_NP[:, a : a + rank * I].view(num, rank, I),
                buffer_NP[:, b : b + rank * O].view(num, O, rank),
            )
        return pairs

    def leaves(self, p_NP: Tensor) -> Pairs:
        """The same as leaves of autograd."""
        pairs = self.views(p_NP.detach())
        for leaf in itertools.chain.from_iterable(pairs.values()):
            leaf.requires_grad_()
        return pairs

    def gradient(self, leaves: Pairs, loss: Tensor) -> Tensor:
        """The gradient [N, P] of a loss that came of `leaves`."""
        flat = list(itertools.chain.from_iterable(leaves.values()))
        found = torch.autograd.grad(loss, flat, allow_unused=True, materialize_grads=True)
        grad_NP = flat[0].new_empty(flat[0].shape[0], self.num_parameters)
        into = list(itertools.chain.from_iterable(self.views(grad_NP).values()))
        torch._foreach_copy_(into, found)
        return grad_NP


class AdapterBank:
    """A and B of many documents, a row a document in one flat buffer.

    One buffer makes the optimizer a handful of operations over contiguous memory, and a document's
    state one row.
    """

    def __init__(
        self, layout: AdapterLayout, num_rows: int, device: torch.device | str = "cpu"
    ) -> None:
        self.layout = layout
        self.p_NP = torch.zeros(num_rows, layout.num_parameters, device=device)

    def reset(
        self,
        row: int,
        document: int,
        seed: int,
        adapter_init: Mapping[int, Tensor] | None = None,
    ) -> None:
        """Give a row to a document: A of (seed, document, slot), B zero.

        Args:
            document: place in the whole validation set.
            adapter_init: A [R, I] by input width, used for every slot instead of the random one.
        """
        self.p_NP[row].zero_()
        layout = self.layout
        pairs = layout.views(self.p_NP[row : row + 1])
        for width in sorted({slot.in_features for slot in layout.slots}):
            slots = [slot for slot in layout.slots if slot.in_features == width]
            if adapter_init is None:
                ids = [slot.id for slot in slots]
                made = adapter_as(seed, document, ids, layout.rank, width, self.p_NP.device)
            else:
                made = adapter_init[width].expand(len(slots), -1, -1)
            for slot, a_RI in zip(slots, made, strict=True):
                pairs[slot.site, slot.layer][0][0].copy_(a_RI)


class RowLayout:
    """How the rows of a flat buffer fall to documents, in order; none may be empty.

    Equal lengths are a view; others are padded with zero rows to the longest.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device | str = "cpu") -> None:
        assert lengths and min(lengths) > 0, lengths
        self.num_documents = len(lengths)
        self.num_rows = sum(lengths)
        self.longest = max(lengths)
        self._places_T: Tensor | None = None
        if min(lengths) != self.longest:
            places = [
                np.arange(n, dtype=np.int64) + i * self.longest for i, n in enumerate(lengths)
            ]
            self._places_T = torch.from_numpy(np.concatenate(places)).to(device)

    def split(self, x_TI: Tensor) -> Tensor:
        """[T, I] -> [N, L, I]."""
        if self._places_T is not None:
            padded = x_TI.new_zeros(self.num_documents * self.longest, x_TI.shape[1])
            x_TI = padded.index_copy(0, self._places_T, x_TI)
        return x_TI.reshape(self.num_documents, self.longest, -1)

    def join(self, y_NLO: Tensor) -> Tensor:
        """[N, L, O] -> [T, O], the inverse of `split`."""
        y_TO = y_NLO.flatten(0, 1)
        return y_TO if self._places_T is None else y_TO.index_select(0, self._places_T)


class AdapterHooks(Hooks):
    """Adds each document's adapters to its own rows of a flat buffer.

    Args:
        pairs: adapters of the buffer's documents, in their order.
        body: all rows.
        ends: rows of those places where outputs are wanted of few.
    """

    def __init__(self, pairs: Pairs, body: RowLayout, ends: RowLayout) -> None:
        self._pairs = pairs
        self._layouts = {layout.num_rows: layout for layout in (body, ends)}

    def adapts(self, site: Site, slot: int) -> bool:
        return (site, slot) in self._pairs

    def adapt(self, site: Site, slot: int, x_TI: Tensor, y_TO: Tensor) -> Tensor:
        pair = self._pairs.get((site, slot))
        if pair is None:
            return y_TO
        # Adapters are float32; the products are in the arithmetic of the forward.
        a_NRI, b_NOR = (t.to(x_TI.dtype) for t in pair)
        rows = self._layouts[x_TI.shape[0]]
        low_NLR = torch.bmm(rows.split(x_TI), a_NRI.transpose(1, 2))
        return y_TO + rows.join(torch.bmm(low_NLR, b_NOR.transpose(1, 2)))


def read_adapter_init(path: Path, slots: Sequence[AdapterSlot], rank: int) -> dict[int, Tensor]:
    """A from a file instead of from random numbers: the same for every document and slot.

    Args:
        path: an .npz with an array `A_rank{rank}_in{n}` [rank, n] for each input width n of the
            slots; other arrays are not looked at.

    Returns:
        float32 [rank, n] by n.

    Raises:
        DataError: the file cannot be read, or an array is missing, of another shape, or not finite.
    """
    wanted = sorted({slot.in_features for slot in slots})
    try:
        archive = np.load(path, allow_pickle=False)
        if not isinstance(archive, NpzFile):
            raise ValueError("a single array")
        with archive:
            names = list(archive)
            arrays = {n: archive[name] for n in wanted if (name := _a_name(rank, n)) in archive}
    except OSError as error:
        raise DataError(f"adapter file {path} cannot be read ({error.strerror or error})",
                        "check --adapter-init") from None  # fmt: skip
    except (ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"adapter file {path} is no .npz of arrays ({error})",
                        "check --adapter-init") from None  # fmt: skip
    for n in wanted:
        if n not in arrays:
            known = ", ".join(k for k in names if k.startswith("A_rank")) or "no array A_rank*"
            raise DataError(
                f"adapter file {path} has no array {_a_name(rank, n)} (it has {known})",
                "add it, or set adaptation.rank to one that it has",
            )
    return {n: _checked_a(path, arrays[n], rank, n) for n in wanted}


def _a_name(rank: int, in_features: int) -> str:
    return f"A_rank{rank}_in{in_features}"


def _checked_a(path: Path, a: NDArray[np.generic], rank: int, in_features: int) -> Tensor:
    name = _a_name(rank, in_features)
    if a.shape != (rank, in_features) or a.dtype.kind != "f":
        raise DataError(
            f"{name} in {path} is {a.dtype} {list(a.shape)}",
            f"it must be a floating array of shape {[rank, in_features]}",
        )
    values = a.astype(np.float32)
    if not np.isfinite(values).all():
        raise DataError(f"{name} in {path} holds values that are not finite", "make it again")
    return torch.from_numpy(values)
