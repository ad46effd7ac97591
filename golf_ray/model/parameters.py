"""Every tensor of a model: public names, shapes, initial values, and who trains and stores it.

The state dict holds *banks*: all query and output matrices in one tensor, and so on. The artifact
holds the matrices one by one, under their *unbanked* names. `matrix_specs` maps one to the other.

Invariant: `bank(unbank(state)) == state` for every state dict that fits the configuration.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch
from torch import Tensor

from golf_ray.config import ModelConfig
from golf_ray.errors import CheckpointError, nearest
from golf_ray.model.layout import num_skips
from golf_ray.model.parts import resolve_parts
from golf_ray.model.specs import (
    MatrixGroup,
    MatrixSpec,
    TensorSpec,
    constant,
    halves,
    normal,
    orthogonal,
)


def _small(name: str, *shape: int, value: float) -> TensorSpec:
    return TensorSpec(name=name, shape=shape, optimizer="small", init=constant(value))


@functools.cache
def tensor_specs(config: ModelConfig) -> tuple[TensorSpec, ...]:
    """All tensors in the public order, those of further parts last."""
    L, D, E, V = config.num_layers, config.model_dim, config.embedding_dim, config.vocab_size
    zero = constant(0.0)
    banks = [
        ("qo_bank", (2 * L, D, D), halves(orthogonal(), zero)),
        ("kv_bank", (2 * L, config.kv_dim, D), orthogonal()),
        ("mlp_up_bank", (L, config.mlp_dim, D), orthogonal()),
        ("mlp_down_bank", (L, D, config.mlp_dim), zero),
    ]
    specs = [TensorSpec(name=n, shape=s, optimizer="muon", init=i) for n, s, i in banks]
    skips = num_skips(config)
    specs.append(_small("skip_weights", skips, D, value=1.0))
    if config.skip_gates:
        specs.append(_small("skip_gates", skips, D, value=0.0))
    if config.parallel_start_layer is not None:
        specs.append(_small("parallel_post_lambdas", L, 2, 2, value=1.0))
        specs.append(_small("parallel_resid_lambdas", L, 2, value=1.1))
    std = config.tied_embed_init_std if config.tie_embeddings else 1.0
    specs.append(
        TensorSpec(name="tok_emb.weight", shape=(V, E), optimizer="embedding", init=normal(std))
    )
    if E != D:
        for name, shape in (("embed_proj.weight", (D, E)), ("head_proj.weight", (E, D))):
            specs.append(TensorSpec(name=name, shape=shape, optimizer="none", init=orthogonal()))
    if not config.tie_embeddings:
        specs.append(TensorSpec(name="lm_head.weight", shape=(V, E), optimizer="head", init=zero))
    for i in range(L):
        specs.append(_small(f"blocks.{i}.attn_scale", D, value=1.0))
        specs.append(_small(f"blocks.{i}.mlp_scale", D, value=1.0))
        specs.append(
            TensorSpec(
                name=f"blocks.{i}.resid_mix",
                shape=(2, D),
                optimizer="small",
                init=halves(constant(1.0), zero),
            )
        )
        specs.append(_small(f"blocks.{i}.attn.q_gain", config.num_heads, value=config.qk_gain_init))
    for part in resolve_parts(config.parts):
        specs.extend(part.tensors(config))
    names = [spec.name for spec in specs]
    assert len(set(names)) == len(names), "a part declares a tensor that is there already"
    return tuple(specs)


@functools.cache
def matrix_specs(config: ModelConfig) -> tuple[MatrixSpec, ...]:
    """All matrices that may be quantised, in the artifact's order, those of parts last."""
    L, D, E, V = config.num_layers, config.model_dim, config.embedding_dim, config.vocab_size
    K, M = config.kv_dim, config.mlp_dim
    specs = []

    def add(
        suffix: str, tensor: str, index: int, group: MatrixGroup, layer: int, *shape: int
    ) -> None:
        specs.append(
            MatrixSpec(
                name=f"blocks.{layer}.{suffix}.weight",
                tensor=tensor,
                index=index,
                group=group,
                layer=layer,
                shape=(shape[0], shape[1]),
            )
        )

    for i in range(L):
        add("attn.c_q", "qo_bank", i, "attention", i, D, D)
        add("attn.proj", "qo_bank", L + i, "attention", i, D, D)
    for i in range(L):
        add("attn.c_k", "kv_bank", i, "attention", i, K, D)
        add("attn.c_v", "kv_bank", L + i, "attention", i, K, D)
    for i in range(L):
        add("mlp.fc", "mlp_up_bank", i, "mlp", i, M, D)
    for i in range(L):
        add("mlp.proj", "mlp_down_bank", i, "mlp", i, D, M)

    def whole(name: str, group: MatrixGroup, rows: int, columns: int, multiplies: bool) -> None:
        specs.append(
            MatrixSpec(
                name=name,
                tensor=name,
                index=None,
                group=group,
                layer=None,
                shape=(rows, columns),
                multiplies=multiplies,
            )
        )

    whole("tok_emb.weight", "embedding", V, E, config.tie_embeddings)
    if E != D:
        whole("embed_proj.weight", "mlp", D, E, True)
        whole("head_proj.weight", "mlp", E, D, True)
    if not config.tie_embeddings:
        whole("lm_head.weight", "embedding", V, E, True)
    for part in resolve_parts(config.parts):
        specs.extend(part.matrices(config))
    return tuple(specs)


@functools.cache
def unbanked_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of an unbanked state, in the artifact's order: matrices where their bank
    stands in the state dict, then the rest in the state dict's order."""
    by_tensor: dict[str, list[MatrixSpec]] = {}
    for matrix in matrix_specs(config):
        by_tensor.setdefault(matrix.tensor, []).append(matrix)
    shapes: dict[str, tuple[int, ...]] = {}
    for spec in tensor_specs(config):
        for matrix in by_tensor.get(spec.name, []):
            shapes[matrix.name] = matrix.shape
        shapes.setdefault(spec.name, spec.shape) if spec.name not in by_tensor else None
    return shapes


def unbank(config: ModelConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict with its banks taken apart, under the artifact's names (views)."""
    slices = {m.name: (m.tensor, m.index) for m in matrix_specs(config)}
    unbanked = {}
    for name in unbanked_shapes(config):
        tensor, index = slices.get(name, (name, None))
        unbanked[name] = state[tensor] if index is None else state[tensor][index]
    return unbanked


def bank(config: ModelConfig, unbanked: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `unbank`."""
    slices: dict[str, dict[int, str]] = {}
    for m in matrix_specs(config):
        if m.index is not None:
            slices.setdefault(m.tensor, {})[m.index] = m.name
    state = {}
    for spec in tensor_specs(config):
        if spec.name in slices:
            names = slices[spec.name]
            state[spec.name] = torch.stack([unbanked[names[i]] for i in range(len(names))])
        else:
            state[spec.name] = unbanked[spec.name]
    return state


def check_tensors(
    found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], what: str
) -> None:
    """Compare names and shapes.

    Raises:
        CheckpointError: a tensor is unknown, missing, or of another shape (both are named).
    """
    unknown = [name for name in found if name not in expected]
    if unknown:
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise CheckpointError(
            f"{what} holds a tensor that this configuration does not know: "
            f"'{unknown[0]}' {list(found[unknown[0]])}{more}",
            nearest(unknown[0], expected)
            if len(expected) < 9
            else "evaluate it under the configuration that it was trained with",
        )
    missing = [name for name in expected if name not in found]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(
            f"{what} lacks the tensor '{missing[0]}' {list(expected[missing[0]])}{more}",
            "evaluate it under the configuration that it was trained with",
        )
    for name, shape in expected.items():
        if tuple(found[name]) != tuple(shape):
            raise CheckpointError(
                f"{what}: '{name}' has shape {list(found[name])}, the configuration asks for "
                f"{list(shape)}",
                "evaluate it under the configuration that it was trained with",
            )


def initial_state(config: ModelConfig, seed: int) -> dict[str, Tensor]:
    """Initial weights in float32 on the CPU, a function of (configuration, seed) alone."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for spec in tensor_specs(config):
        tensor = torch.empty(spec.shape, dtype=torch.float32)
        spec.init(tensor, generator)
        state[spec.name] = tensor
    return state
