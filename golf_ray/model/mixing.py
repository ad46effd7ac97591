"""What enters each layer: the residual stream as mixes of few tensors, and their coefficients.

Between two layers nothing but per-channel factors acts on the stream: residual scales, the mix with
the embedding, skips with their gates, the lanes' lambdas. So what a layer's norm sees is a linear
combination of the tensors that the layer before left.

With x a layer's input, x0 the embedding, y and b what the layer before left (its stream after
attention, and its MLP's output), k a kept skip:

    x = y + mlp_scale b            what the layer before would have put out
    x <- f x + h k                 where a skip enters: f = sigmoid(g), h = (1 - f) w; ungated 1, w
    u = m0 x + m1 x0               the mix with the embedding
    y = u + attn_scale a           after attention

In lanes l0, l1 with outputs a and b of attention and MLP (r, p the lambdas of the layer before):

    l_k <- r_k l_k + p_0k attn_scale a + p_1k mlp_scale b      skips enter l0, u = m0 l0 + m1 x0

A *recipe* writes that down once for a model, as sums of products of named factors. A forward makes
the coefficients of all layers from it together: for each layer on its own they would be hundreds of
tiny kernels.

Shapes: D model dim, K rows of coefficients, R rows of factors.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from golf_ray.config import ModelConfig
from golf_ray.kernels.residual import Mix
from golf_ray.model.layout import VirtualLayer, layer_plan, num_skips

Lookup = Callable[[str], Tensor]
Factor = tuple[str, int]
"""Kind and number of a row of factors."""
Coefficient = tuple[tuple[Factor, ...], ...]
"""A sum of products; the empty product is 1."""
Combination = Mapping[int, Coefficient]
"""Tensors and their coefficients."""

ONE: Coefficient = ((),)
MOST_TERMS, MOST_FACTORS = 2, 4
"""Of a coefficient, and of a product."""
CONSTANTS = {("zero", 0): 0.0, ("one", 0): 1.0, ("half", 0): 0.5}


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """The mixes at one place, over what the layer before left, then a skip, then the embedding."""

    mixes: tuple[Mix, ...]
    takes_skip: bool = False
    """Whether a kept tensor is among the tensors."""
    takes_embedding: bool = False
    keeps: bool = False
    """Whether the first output is kept for a later skip."""

    @property
    def num_rows(self) -> int:
        """Coefficients that it takes: one a term."""
        return sum(len(mix.terms) for mix in self.mixes)


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """All mixes of a pass, in order, and what their coefficients are."""

    before: tuple[Entry, ...]
    """Before each layer: outputs are the kept tensor if any, then the stream and its norm; in lanes
    lane 0, lane 1, lane 1's norm, and the norm of the mix for attention."""
    after_attention: tuple[Entry | None, ...]
    """Of each layer that is not in lanes: the stream and its norm."""
    last: Entry
    """The final norm."""
    index: tuple[tuple[tuple[int, ...], ...], ...]
    """[K, terms, factors]: rows of `factor_rows`."""

    @property
    def entries(self) -> tuple[Entry, ...]:
        """All, in the order of their coefficients."""
        return (*self.before, *(e for e in self.after_attention if e is not None), self.last)


def coefficients(recipe: Recipe, index_KTF: Tensor, factors_RD: Tensor) -> tuple[Tensor, ...]:
    """Each entry's coefficients, [rows, D], in the entries' order.

    Args:
        index_KTF: the recipe's index.
        factors_RD: `factor_rows` of the model.
    """
    gathered = factors_RD.index_select(0, index_KTF.flatten())
    product, *others = gathered.unflatten(0, index_KTF.shape).unbind(2)
    for other in others:
        product = product * other
    return product.sum(1).split([entry.num_rows for entry in recipe.entries])


def factor_rows(config: ModelConfig, tensor: Lookup) -> Tensor:
    """The rows that coefficients are made of, float32 [R, D], in the order of `_numbers`.

    Args:
        tensor: a small tensor of the state dict by name, in float32.
    """
    L = range(config.num_layers)
    weights = tensor("skip_weights")
    # Made where they are: a copy from the host has no place in a captured graph.
    rows = [weights.new_full((1, config.model_dim), value) for value in CONSTANTS.values()]
    rows += [tensor(f"blocks.{i}.resid_mix") for i in L]
    rows += [tensor(f"blocks.{i}.attn_scale")[None] for i in L]
    rows += [tensor(f"blocks.{i}.mlp_scale")[None] for i in L]
    if config.skip_gates:
        f = torch.sigmoid(tensor("skip_gates"))
        rows += [f, (1 - f) * weights]
    else:
        rows += [torch.ones_like(weights), weights]
    if config.parallel_start_layer is not None:
        for name in ("parallel_resid_lambdas", "parallel_post_lambdas"):
            rows.append(tensor(name).flatten()[:, None].expand(-1, config.model_dim))
    return torch.cat(rows)


def _numbers(config: ModelConfig) -> dict[Factor, int]:
    """The row of each factor."""
    L, J = config.num_layers, num_skips(config)
    names: list[Factor] = list(CONSTANTS)
    for i in range(L):
        names += [("m0", i), ("m1", i)]
    names += [("attn", i) for i in range(L)] + [("mlp", i) for i in range(L)]
    names += [("f", j) for j in range(J)] + [("h", j) for j in range(J)]
    if config.parallel_start_layer is not None:
        names += [("r", n) for n in range(2 * L)] + [("p", n) for n in range(4 * L)]
    return {name: row for row, name in enumerate(names)}


@functools.cache
def recipe(config: ModelConfig, loop: bool) -> Recipe:
    """The recipe of a model's pass."""
    plan = layer_plan(config, loop)
    writer = _Writer(_numbers(config))
    before = tuple(_before(writer, config, plan, s) for s in range(len(plan)))
    after = tuple(
        None
        if step.lanes
        else writer.entry(
            [({0: ONE, 1: _of(("attn", step.layer))}, True, norm_scale(config, step))]
        )
        for step in plan
    )
    lanes = _left_behind(plan[-1])
    final: Combination = lanes[0]
    if len(lanes) == 2:
        shares = {"mean": ("half", "half"), "attention": ("one", "zero"), "mlp": ("zero", "one")}
        first, second = (
            _times(lane, (share, 0))
            for lane, share in zip(lanes, shares[config.parallel_final_lane], strict=True)
        )
        final = _plus(first, second)
    last = writer.entry([(final, False, 1.0)])
    return Recipe(before=before, after_attention=after, last=last, index=tuple(writer.index))


def norm_scale(config: ModelConfig, step: VirtualLayer) -> float:
    """Factor on the normed inputs of a layer."""
    return 1 / math.sqrt(step.layer + 1) if config.ln_scale else 1.0


# Writing a recipe -------------------------------------------------------------------------------


class _Writer:
    """Numbers rows as mixes are written down."""

    def __init__(self, numbers: Mapping[Factor, int]) -> None:
        self._numbers = numbers
        self.index: list[tuple[tuple[int, ...], ...]] = []

    def entry(
        self,
        wanted: Iterable[tuple[Combination, bool, float | None]],
        *,
        takes_skip: bool = False,
        takes_embedding: bool = False,
        keeps: bool = False,
    ) -> Entry:
        """An entry of combinations, each with whether it is an output, and its norm's scale."""
        mixes, row = [], 0
        for combination, keep, scale in wanted:
            terms = []
            for tensor, coefficient in sorted(combination.items()):
                self.index.append(self._row(coefficient))
                terms.append((tensor, row))
                row += 1
            mixes.append(Mix(terms=tuple(terms), keep=keep, scale=scale))
        return Entry(
            mixes=tuple(mixes),
            takes_skip=takes_skip,
            takes_embedding=takes_embedding,
            keeps=keeps,
        )

    def _row(self, coefficient: Coefficient) -> tuple[tuple[int, ...], ...]:
        one, zero = self._numbers["one", 0], self._numbers["zero", 0]
        products = [tuple(self._numbers[factor] for factor in p) for p in coefficient]
        assert len(products) <= MOST_TERMS and max(map(len, products)) <= MOST_FACTORS
        full = [(*p, *[one] * (MOST_FACTORS - len(p))) for p in products]
        nothing = (zero, *[one] * (MOST_FACTORS - 1))
        return (*full, *[nothing] * (MOST_TERMS - len(full)))


def _of(*factors: Factor) -> Coefficient:
    return (factors,)


def _times(combination: Combination, *factors: Factor) -> dict[int, Coefficient]:
    return {
        tensor: tuple((*product, *factors) for product in coefficient)
        for tensor, coefficient in combination.items()
    }


def _plus(one: Combination, other: Combination) -> dict[int, Coefficient]:
    return {t: (*one.get(t, ()), *other.get(t, ())) for t in {**one, **other}}


def _left_behind(step: VirtualLayer) -> tuple[Combination, ...]:
    """What a layer would have put out, of the tensors that it leaves: stream and MLP's output; in
    lanes lane 0, lane 1, attention's and the MLP's output."""
    i = step.layer
    if not step.lanes:
        return ({0: ONE, 1: _of(("mlp", i))},)
    return tuple(
        {
            k: _of(("r", 2 * i + k)),
            2: _of(("p", 4 * i + k), ("attn", i)),
            3: _of(("p", 4 * i + 2 + k), ("mlp", i)),
        }
        for k in range(2)
    )


def _before(writer: _Writer, config: ModelConfig, plan: tuple[VirtualLayer, ...], s: int) -> Entry:
    """The mixes before pass `s`."""
    step, i = plan[s], plan[s].layer
    scale = norm_scale(config, step)
    if s == 0:
        # The stream is the embedding itself.
        return writer.entry([({0: (*_of(("m0", i)), *_of(("m1", i)))}, True, scale)])
    lanes = _left_behind(plan[s - 1])
    left = lanes[0]
    width = 4 if plan[s - 1].lanes else 2
    # A skip that the pass before has just left is no tensor of its own: it adds to the stream.
    kept_now = plan[s - 1].pushes_skip
    joins = step.skip is not None and kept_now
    takes = step.skip is not None and not joins
    entered: Combination = left
    if step.skip is not None:
        entered = _times(left, ("f", step.skip))
        skip = _times(left if joins else {width: ONE}, ("h", step.skip))
        entered = _plus(entered, skip)
    mixed = _plus(_times(entered, ("m0", i)), {width + takes: _of(("m1", i))})
    wanted: list[tuple[Combination, bool, float | None]] = []
    if kept_now and not joins:
        wanted.append((left, True, None))
    if step.lanes:
        second = left if step.splits else lanes[1]
        wanted += [(entered, True, None), (second, True, scale), (mixed, False, scale)]
    else:
        wanted.append((mixed, True, scale))
    return writer.entry(
        wanted, takes_skip=takes, takes_embedding=True, keeps=kept_now and not joins
    )
