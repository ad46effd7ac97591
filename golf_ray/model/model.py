"""The one forward: training, calibration, evaluation and adaptation all go through it.

Shapes: T tokens, D model dim, E embedding dim, H query heads, G key and value heads, d head dim,
R rotary dims, V vocabulary. Not here: losses over a batch, optimizers, anything of Ray.

Invariant: a token's output depends on no later token and on no other segment.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from golf_ray.config import ModelConfig
from golf_ray.kernels.embedding import embed, embed_fused
from golf_ray.kernels.heads import (
    attention_fused,
    prepare,
    remove_own_value,
    rotary_tables,
    split_heads,
)
from golf_ray.kernels.loss import (
    cross_entropy,
    cross_entropy_fused,
    head_losses,
    head_losses_fused,
    softcap,
)
from golf_ray.kernels.mlp import mlp, mlp_fused
from golf_ray.kernels.residual import Mix, fan_out, mix, mix_fused
from golf_ray.kernels.wide import widened
from golf_ray.model.attention import attend
from golf_ray.model.compute import Compute
from golf_ray.model.hooks import Hooks
from golf_ray.model.layout import VirtualLayer, layer_plan
from golf_ray.model.mixing import Entry, coefficients, factor_rows, recipe
from golf_ray.model.parameters import initial_state, tensor_specs
from golf_ray.model.parts import Pass, overriding, resolve_parts
from golf_ray.model.segments import Segments, TailRows

NO_HOOKS = Hooks()
INDEX_BUFFERS = {False: "mixing_index", True: "mixing_index_looping"}
"""Buffers that hold the recipes' indices, which move with the model and are part of no state."""
BANKS = ("qo_bank", "kv_bank", "mlp_up_bank", "mlp_down_bank")


@dataclasses.dataclass(frozen=True, slots=True)
class Matrices:
    """A layer's matrices in the forward's arithmetic, one entry a physical layer."""

    qkv: tuple[Tensor, ...]
    """[(H + 2 G) d, D]: query, key and value, one product."""
    out: tuple[Tensor, ...]
    up: tuple[Tensor, ...]
    down: tuple[Tensor, ...]


class GolfModel(nn.Module):
    """Weights under their public names, and the forward over them.

    Args:
        config: the model's shape.
        compute: arithmetic, attention and kernels of the forward.
    """

    def __init__(self, config: ModelConfig, *, compute: Compute | None = None) -> None:
        super().__init__()
        self.config = config
        self.compute = compute or Compute()
        self._plans = {loop: layer_plan(config, loop) for loop in (False, True)}
        self._recipes = {loop: recipe(config, loop) for loop in (False, True)}
        for loop, name in INDEX_BUFFERS.items():
            self.register_buffer(name, torch.tensor(self._recipes[loop].index), persistent=False)
        self._cast: tuple[object, Matrices] | None = None
        self.parts = resolve_parts(config.parts)
        self._tensors: dict[str, nn.Parameter] = {}
        for spec in tensor_specs(config):
            parameter = nn.Parameter(torch.empty(spec.shape))
            self._register(spec.name, parameter)
            self._tensors[spec.name] = parameter

    def _register(self, name: str, parameter: nn.Parameter) -> None:
        # Public names are paths ("blocks.0.attn.q_gain"): plain modules make the path.
        *path, leaf = name.split(".")
        module: nn.Module = self
        for step in path:
            if step not in module._modules:
                module.add_module(step, nn.Module())
            module = module.get_submodule(step)
        module.register_parameter(leaf, parameter)

    def _apply(self, fn: Any, recurse: bool = True) -> GolfModel:
        # `.to(device)` may replace parameters: the index by name follows.
        super()._apply(fn, recurse)
        self._tensors = dict(self.named_parameters())
        return self

    def init_weights(self, seed: int) -> GolfModel:
        """Set the initial weights of a seed."""
        self.load_state_dict(initial_state(self.config, seed))
        return self

    def tensors(self) -> Mapping[str, nn.Parameter]:
        """All parameters by public name, in the state dict's order of `tensor_specs`."""
        return self._tensors

    def weight(self, name: str) -> Tensor:
        """A tensor by public name in the forward's arithmetic."""
        return self._tensors[name].to(self.compute.dtype)

    # The passes -------------------------------------------------------------------------------

    def hidden(
        self,
        tokens_T: Tensor,
        segments: Segments,
        *,
        loop: bool,
        hooks: Hooks | None = None,
        tail: TailRows | None = None,
    ) -> Tensor:
        """The final normed hidden states [T, D].

        Args:
            tokens_T: int64 [T] input ids.
            segments: what may attend to what.
            loop: whether the looped layers are passed more than once.
            hooks: adapters or taps.
            tail: the rows wanted, [S, D] then: of all other rows the last layer computes nothing
                but keys and values.
        """
        hooks = hooks or NO_HOOKS
        # Parts see whole buffers.
        pruned = tail if not self.parts else None
        run = self._pass(tokens_T, segments, hooks)
        matrices = self._matrices()
        rotary = rotary_tables(segments.positions_T, self.config.rope_dims, self.config.rope_base)
        plan, steps = self._plans[loop], self._recipes[loop]
        factors = factor_rows(self.config, self._small)
        index = self.get_buffer(INDEX_BUFFERS[loop])
        tables = list(coefficients(steps, index, factors))
        of_attention = tables[len(plan) :]
        x0 = self._for_all(self._embed(tokens_T, run), len(plan))
        # What the last layer left, of which the stream is a mix: first the embedding itself.
        stream: list[Tensor] = [x0.pop()]
        kept: list[Tensor] = []
        for step, entry, after, table in zip(
            plan, steps.before, steps.after_attention, tables[: len(plan)], strict=True
        ):
            entering = [kept.pop()] if entry.takes_skip else []
            embedding = [x0.pop()] if entry.takes_embedding else []
            mixed = self._mix([*stream, *entering, *embedding], entry, table, run)
            if entry.keeps:
                kept.append(mixed.pop(0))
            *others, attention_input = mixed
            attention, last_rows = self._attention, pruned if step is plan[-1] else None
            if last_rows is not None:
                attention = partial(self._attention_of_tail, last_rows)
                others = [last_rows.of(x) for x in others]
            a = attention(attention_input, step, matrices, rotary, run, hooks)
            if after is None:
                lane0, lane1, mlp_input = others
                stream = [lane0, lane1, a, self._mlp(mlp_input, step, matrices, run, hooks)]
            else:
                (u,) = others
                y, mlp_input = self._mix([u, a], after, of_attention.pop(0), run)
                stream = [y, self._mlp(mlp_input, step, matrices, run, hooks)]
        (x,) = self._mix(stream, steps.last, tables[-1], run)
        return x if tail is None or pruned is not None else tail.of(x)

    def logits(self, x_TD: Tensor, hooks: Hooks | None = None) -> Tensor:
        """Softcapped logits [T, V] in float32 of final normed hidden states."""
        return softcap(self._raw_logits(x_TD, hooks or NO_HOOKS), self.config.logit_softcap)

    def token_losses(self, x_TD: Tensor, targets_T: Tensor, hooks: Hooks | None = None) -> Tensor:
        """Cross entropy in nats of each target, float32 [T]."""
        hooks, cap = hooks or NO_HOOKS, self.config.logit_softcap
        fused = self.compute.kernels == "triton"
        if not hooks.adapts("head", self._head_slot):
            x_TE = self._head_input(x_TD, hooks)
            name = self._head_name
            hooks.matrix_input(name, x_TE)
            of_head = head_losses_fused if fused else head_losses
            return of_head(x_TE, self.weight(name), targets_T, cap)
        losses = cross_entropy_fused if fused else cross_entropy
        return losses(self._raw_logits(x_TD, hooks), targets_T, cap)

    def mean_loss(
        self, tokens_T: Tensor, targets_T: Tensor, segments: Segments, *, loop: bool
    ) -> Tensor:
        """Mean cross entropy in nats of a batch, float32."""
        return self.token_losses(self.hidden(tokens_T, segments, loop=loop), targets_T).mean()

    # Pieces of a pass -------------------------------------------------------------------------

    def _pass(self, tokens_T: Tensor, segments: Segments, hooks: Hooks) -> Pass:
        def linear(name: str, x_TI: Tensor) -> Tensor:
            return self._linear(name, x_TI, self.weight(name), hooks)

        return Pass(self.config, tokens_T, segments, self.weight, linear)

    def _small(self, name: str) -> Tensor:
        """A small tensor at full precision: what mixes are made with, and gains."""
        return widened(self._tensors[name])

    def _matrices(self) -> Matrices:
        """All layers' matrices; kept from pass to pass while they are frozen and unchanged."""
        banks = [self._tensors[name] for name in BANKS]
        if torch.is_grad_enabled() and any(bank.requires_grad for bank in banks):
            return self._cast_matrices()
        key = (self.compute.dtype, *((bank.data_ptr(), bank._version) for bank in banks))
        if self._cast is None or self._cast[0] != key:
            with torch.no_grad():
                self._cast = (key, self._cast_matrices())
        return self._cast[1]

    def _cast_matrices(self) -> Matrices:
        # One cast and one unbind a bank: the backward of a slice would fill a bank of zeros.
        L = self.config.num_layers
        qo, kv, up, down = (self.weight(name) for name in BANKS)
        qkv = torch.cat((qo[:L], kv[:L], kv[L:]), 1)
        return Matrices(qkv.unbind(0), qo[L:].unbind(0), up.unbind(0), down.unbind(0))

    def _linear(self, name: str, x_TI: Tensor, w_OI: Tensor, hooks: Hooks) -> Tensor:
        hooks.matrix_input(name, x_TI)
        return nn.functional.linear(x_TI, w_OI)

    def _mix(
        self, tensors: Sequence[Tensor], entry: Entry, coefs_KD: Tensor, run: Pass
    ) -> list[Tensor]:
        combine = mix_fused if self.compute.kernels == "triton" else mix
        others = overriding(self.parts, "norm")
        if not others:
            return combine(tensors, coefs_KD, entry.mixes)
        assert len(others) == 1, "two parts replace the norm"
        plain = [Mix(terms=m.terms) for m in entry.mixes]
        outputs = []
        for m, x in zip(entry.mixes, combine(tensors, coefs_KD, plain), strict=True):
            outputs += [x] if m.keep else []
            outputs += [others[0].norm(x, run) * m.scale] if m.scale is not None else []
        return outputs

    def _for_all(self, x_TD: Tensor, count: int) -> list[Tensor]:
        """The embedding, once for each layer that takes it."""
        if self.compute.kernels == "triton" and not torch.compiler.is_compiling():
            return fan_out(x_TD, count)
        return [x_TD] * count

    def _embed(self, tokens_T: Tensor, run: Pass) -> Tensor:
        look_up = embed_fused if self.compute.kernels == "triton" else embed
        x = look_up(self._tensors["tok_emb.weight"], tokens_T, self.compute.dtype)
        if self.config.embedding_dim != self.config.model_dim:
            x = run.linear("embed_proj.weight", x)
        for part in overriding(self.parts, "embedding"):
            x = part.embedding(x, run)
        return x

    def _attention(
        self,
        n_TD: Tensor,
        step: VirtualLayer,
        matrices: Matrices,
        rotary: tuple[Tensor, Tensor],
        run: Pass,
        hooks: Hooks,
    ) -> Tensor:
        config, i = self.config, step.layer
        name = f"blocks.{i}.attn."
        qkv = self._queries_keys_values(n_TD, step, matrices.qkv[i], hooks)
        own_value = i < config.num_layers - config.xsa_last_n
        if self.compute.kernels == "triton" and self.compute.attention == "fa3":
            y_THd = attention_fused(
                qkv,
                self._small(name + "q_gain"),
                *rotary,
                run.segments.cu_seqlens,
                run.segments.max_seqlen,
                num_kv_heads=config.num_kv_heads,
                head_dim=config.head_dim,
                own_value=own_value,
            )
        else:
            q_THd, k_TGd, v_TGd = split_heads(qkv, config.num_kv_heads, config.head_dim)
            q_THd, k_TGd = prepare(q_THd, k_TGd, self._small(name + "q_gain"), *rotary)
            y_THd = attend(q_THd, k_TGd, v_TGd, run.segments, self.compute.attention)
            if not own_value:
                y_THd = remove_own_value(y_THd, v_TGd)
        for part in overriding(self.parts, "attention_output"):
            y_THd = part.attention_output(y_THd, n_TD, i, run)
        heads = y_THd.flatten(1)
        hooks.matrix_input(name + "proj.weight", heads)
        return hooks.linear(("o",), step.slot, heads, matrices.out[i], (config.model_dim,), n_TD)

    def _queries_keys_values(
        self, n_TD: Tensor, step: VirtualLayer, w_WD: Tensor, hooks: Hooks
    ) -> Tensor:
        """The merged projection [T, W], adapters on its parts included."""
        for letter in "qkv":
            hooks.matrix_input(f"blocks.{step.layer}.attn.c_{letter}.weight", n_TD)
        widths = (self.config.model_dim, self.config.kv_dim, self.config.kv_dim)
        return hooks.linear(("q", "k", "v"), step.slot, n_TD, w_WD, widths)

    def _attention_of_tail(
        self,
        tail: TailRows,
        n_TD: Tensor,
        step: VirtualLayer,
        matrices: Matrices,
        rotary: tuple[Tensor, Tensor],
        run: Pass,
        hooks: Hooks,
    ) -> Tensor:
        """`_attention` for the wanted rows [S, D]: keys and values of all, the rest of those."""
        config, i, slot = self.config, step.layer, step.slot
        D, kv, d = config.model_dim, config.kv_dim, config.head_dim
        w_WD = matrices.qkv[i]
        n_SD = tail.of(n_TD)
        q = hooks.linear(("q",), slot, n_SD, w_WD[:D], (D,)).unflatten(1, (-1, d))
        k, v = (
            t.unflatten(1, (-1, d))
            for t in hooks.linear(("k", "v"), slot, n_TD, w_WD[D:], (kv, kv)).split(kv, dim=1)
        )
        gain = self._small(f"blocks.{i}.attn.q_gain")
        cos, sin = rotary
        q, k = prepare(q, k, gain, cos, sin, (tail.of(cos), tail.of(sin)))
        y_SHd = attend(q, k, v, run.segments, self.compute.attention, tail)
        if i >= config.num_layers - config.xsa_last_n:
            y_SHd = remove_own_value(y_SHd, tail.of(v))
        return hooks.linear(("o",), slot, y_SHd.flatten(1), matrices.out[i], (D,), n_SD)

    def _mlp(
        self, n_TD: Tensor, step: VirtualLayer, matrices: Matrices, run: Pass, hooks: Hooks
    ) -> Tensor:
        i = step.layer
        product = mlp_fused if self.compute.kernels == "triton" else mlp
        hooks.matrix_input(f"blocks.{i}.mlp.fc.weight", n_TD)
        y, h_TF = hooks.mlp(step.slot, n_TD, matrices.up[i], matrices.down[i], product)
        hooks.matrix_input(f"blocks.{i}.mlp.proj.weight", h_TF)
        for part in overriding(self.parts, "mlp_output"):
            y = part.mlp_output(y, n_TD, i, run)
        return y

    # The head ---------------------------------------------------------------------------------

    @property
    def _head_name(self) -> str:
        return "tok_emb.weight" if self.config.tie_embeddings else "lm_head.weight"

    @property
    def _head_slot(self) -> int:
        return len(self._plans[True])

    def _head_input(self, x_TD: Tensor, hooks: Hooks) -> Tensor:
        if self.config.embedding_dim == self.config.model_dim:
            return x_TD
        return self._linear("head_proj.weight", x_TD, self.weight("head_proj.weight"), hooks)

    def _raw_logits(self, x_TD: Tensor, hooks: Hooks) -> Tensor:
        name = self._head_name
        x_TE = self._head_input(x_TD, hooks)
        hooks.matrix_input(name, x_TE)
        w_VE, widths = self.weight(name), (self.config.vocab_size,)
        source = None if x_TE is x_TD else x_TD
        return hooks.linear(("head",), self._head_slot, x_TE, w_VE, widths, source)
