"""The one forward: training, calibration, evaluation and adaptation all go through it.

Shapes: T tokens, D model dim, E embedding dim, H query heads, G key and value heads, d head dim,
R rotary dims, V vocabulary. Not here: losses over a batch, optimizers, anything of Ray.

Invariant: a token's output depends on no later token and on no other segment.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from golf_ray.config import ModelConfig
from golf_ray.model.attention import attend
from golf_ray.model.hooks import Hooks
from golf_ray.model.layout import VirtualLayer, layer_plan
from golf_ray.model.parameters import initial_state, tensor_specs
from golf_ray.model.parts import Pass, overriding, resolve_parts
from golf_ray.model.segments import Segments

NO_HOOKS = Hooks()


def rms_norm(x: Tensor) -> Tensor:
    """x / sqrt(mean(x^2) + eps) over the last dimension, torch's default eps, no weight."""
    return F.rms_norm(x, (x.shape[-1],))


def rotary_tables(positions_T: Tensor, rope_dims: int, base: float) -> tuple[Tensor, Tensor]:
    """cos and sin [T, R / 2] of the angles pos * base^(-2t / R), in float32."""
    t = torch.arange(0, rope_dims, 2, dtype=torch.float32, device=positions_T.device)
    angles = positions_T.float()[:, None] * base ** (-t / rope_dims)
    return angles.cos(), angles.sin()


def rotate(x_THd: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
    """Rotate the first R dims of each head: halves (a, b) -> (a cos + b sin, b cos - a sin)."""
    half = cos_TR.shape[-1]
    if half == 0:
        return x_THd
    cos, sin = cos_TR[:, None].to(x_THd.dtype), sin_TR[:, None].to(x_THd.dtype)
    a, b, rest = x_THd.split((half, half, x_THd.shape[-1] - 2 * half), dim=-1)
    return torch.cat((a * cos + b * sin, b * cos - a * sin, rest), dim=-1)


def remove_own_value(y_THd: Tensor, v_TGd: Tensor) -> Tensor:
    """XSA: the heads' outputs without their component along the token's own value."""
    unit = F.normalize(v_TGd, dim=-1).repeat_interleave(y_THd.shape[1] // v_TGd.shape[1], dim=1)
    return y_THd - (y_THd * unit).sum(-1, keepdim=True) * unit


def softcap(z: Tensor, cap: float) -> Tensor:
    """cap * tanh(z / cap) in float32."""
    return cap * torch.tanh(z.float() / cap)


class GolfModel(nn.Module):
    """Weights under their public names, and the forward over them.

    Args:
        config: the model's shape.
        compute_dtype: arithmetic of the forward; weights are cast to it where they are used.
    """

    def __init__(self, config: ModelConfig, *, compute_dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config = config
        self.compute_dtype = compute_dtype
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
        return self._tensors[name].to(self.compute_dtype)

    # The passes -------------------------------------------------------------------------------

    def hidden(
        self, tokens_T: Tensor, segments: Segments, *, loop: bool, hooks: Hooks | None = None
    ) -> Tensor:
        """The final normed hidden states [T, D].

        Args:
            tokens_T: int64 [T] input ids.
            segments: what may attend to what.
            loop: whether the looped layers are passed more than once.
            hooks: adapters or taps.
        """
        hooks = hooks or NO_HOOKS
        run = self._pass(tokens_T, segments, hooks)
        banks = self._matrices()
        rotary = rotary_tables(segments.positions_T, self.config.rope_dims, self.config.rope_base)
        x0 = self._embed(tokens_T, run)
        lanes: list[Tensor] = [x0]
        kept: list[Tensor] = []
        for step in layer_plan(self.config, loop):
            if step.splits:
                lanes = [lanes[0], lanes[0]]
            if step.skip is not None:
                lanes[0] = self._enter_skip(lanes[0], kept.pop(), step.skip)
            if step.lanes:
                lanes = self._lane_layer(lanes, x0, step, banks, rotary, run, hooks)
            else:
                lanes = [self._layer(lanes[0], x0, step, banks, rotary, run, hooks)]
            if step.pushes_skip:
                kept.append(lanes[0])
        return self._norm(self._join(lanes), run)

    def logits(self, x_TD: Tensor, hooks: Hooks | None = None) -> Tensor:
        """Softcapped logits [T, V] in float32 of final normed hidden states."""
        hooks = hooks or NO_HOOKS
        config = self.config
        x_TE = x_TD
        if config.embedding_dim != config.model_dim:
            x_TE = self._linear("head_proj.weight", x_TD, self.weight("head_proj.weight"), hooks)
        head = "tok_emb.weight" if config.tie_embeddings else "lm_head.weight"
        z_TV = self._linear(head, x_TE, self.weight(head), hooks)
        z_TV = hooks.adapt("head", len(layer_plan(config, True)), x_TD, z_TV)
        return softcap(z_TV, config.logit_softcap)

    def token_losses(self, x_TD: Tensor, targets_T: Tensor, hooks: Hooks | None = None) -> Tensor:
        """Cross entropy in nats of each target, float32 [T]."""
        return F.cross_entropy(self.logits(x_TD, hooks), targets_T, reduction="none")

    def mean_loss(
        self, tokens_T: Tensor, targets_T: Tensor, segments: Segments, *, loop: bool
    ) -> Tensor:
        """Mean cross entropy in nats of a batch, float32."""
        x_TD = self.hidden(tokens_T, segments, loop=loop)
        return F.cross_entropy(self.logits(x_TD), targets_T)

    # Pieces of a pass -------------------------------------------------------------------------

    def _pass(self, tokens_T: Tensor, segments: Segments, hooks: Hooks) -> Pass:
        def linear(name: str, x_TI: Tensor) -> Tensor:
            return self._linear(name, x_TI, self.weight(name), hooks)

        return Pass(self.config, tokens_T, segments, self.weight, linear)

    def _matrices(self) -> dict[str, tuple[Tensor, ...]]:
        # One cast and one unbind a bank: the backward of a slice would fill a bank of zeros.
        names = ("qo_bank", "kv_bank", "mlp_up_bank", "mlp_down_bank")
        return {name: self.weight(name).unbind(0) for name in names}

    def _linear(self, name: str, x_TI: Tensor, w_OI: Tensor, hooks: Hooks) -> Tensor:
        hooks.matrix_input(name, x_TI)
        return F.linear(x_TI, w_OI)

    def _norm(self, x_TD: Tensor, run: Pass) -> Tensor:
        others = overriding(self.parts, "norm")
        assert len(others) <= 1, "two parts replace the norm"
        return others[0].norm(x_TD, run) if others else rms_norm(x_TD)

    def _embed(self, tokens_T: Tensor, run: Pass) -> Tensor:
        x = rms_norm(F.embedding(tokens_T, self._tensors["tok_emb.weight"]).to(self.compute_dtype))
        if self.config.embedding_dim != self.config.model_dim:
            x = run.linear("embed_proj.weight", x)
        for part in overriding(self.parts, "embedding"):
            x = part.embedding(x, run)
        return x

    def _enter_skip(self, x_TD: Tensor, kept_TD: Tensor, row: int) -> Tensor:
        skip = self.weight("skip_weights")[row] * kept_TD
        if not self.config.skip_gates:
            return x_TD + skip
        return torch.lerp(skip, x_TD, torch.sigmoid(self.weight("skip_gates")[row]))

    def _normed(self, x_TD: Tensor, layer: int, run: Pass) -> Tensor:
        x_TD = self._norm(x_TD, run)
        return x_TD / math.sqrt(layer + 1) if self.config.ln_scale else x_TD

    def _mixed(self, x_TD: Tensor, x0_TD: Tensor, layer: int) -> Tensor:
        m0, m1 = self.weight(f"blocks.{layer}.resid_mix").unbind(0)
        return m0 * x_TD + m1 * x0_TD

    def _layer(
        self,
        x_TD: Tensor,
        x0_TD: Tensor,
        step: VirtualLayer,
        banks: dict[str, tuple[Tensor, ...]],
        rotary: tuple[Tensor, Tensor],
        run: Pass,
        hooks: Hooks,
    ) -> Tensor:
        i = step.layer
        u = self._mixed(x_TD, x0_TD, i)
        attention = self._attention(self._normed(u, i, run), step, banks, rotary, run, hooks)
        y = u + self.weight(f"blocks.{i}.attn_scale") * attention
        mlp = self._mlp(self._normed(y, i, run), step, banks, run, hooks)
        return y + self.weight(f"blocks.{i}.mlp_scale") * mlp

    def _lane_layer(
        self,
        lanes: list[Tensor],
        x0_TD: Tensor,
        step: VirtualLayer,
        banks: dict[str, tuple[Tensor, ...]],
        rotary: tuple[Tensor, Tensor],
        run: Pass,
        hooks: Hooks,
    ) -> list[Tensor]:
        i = step.layer
        n = self._normed(self._mixed(lanes[0], x0_TD, i), i, run)
        a = self._attention(n, step, banks, rotary, run, hooks)
        b = self._mlp(self._normed(lanes[1], i, run), step, banks, run, hooks)
        a = self.weight(f"blocks.{i}.attn_scale") * a
        b = self.weight(f"blocks.{i}.mlp_scale") * b
        r_K = self.weight("parallel_resid_lambdas")[i]
        p_JK = self.weight("parallel_post_lambdas")[i]
        return [r_K[k] * lanes[k] + p_JK[0, k] * a + p_JK[1, k] * b for k in range(2)]

    def _attention(
        self,
        n_TD: Tensor,
        step: VirtualLayer,
        banks: dict[str, tuple[Tensor, ...]],
        rotary: tuple[Tensor, Tensor],
        run: Pass,
        hooks: Hooks,
    ) -> Tensor:
        config, i, slot, L = self.config, step.layer, step.slot, self.config.num_layers
        qo, kv = banks["qo_bank"], banks["kv_bank"]
        name = f"blocks.{i}.attn."
        q = hooks.adapt("q", slot, n_TD, self._linear(name + "c_q.weight", n_TD, qo[i], hooks))
        k = hooks.adapt("k", slot, n_TD, self._linear(name + "c_k.weight", n_TD, kv[i], hooks))
        v = hooks.adapt("v", slot, n_TD, self._linear(name + "c_v.weight", n_TD, kv[L + i], hooks))
        q_THd, k_TGd, v_TGd = (t.unflatten(-1, (-1, config.head_dim)) for t in (q, k, v))
        q_THd, k_TGd = rotate(rms_norm(q_THd), *rotary), rotate(rms_norm(k_TGd), *rotary)
        q_THd = q_THd * self.weight(name + "q_gain")[:, None]
        y_THd = attend(q_THd, k_TGd, v_TGd, run.segments)
        if i >= L - config.xsa_last_n:
            y_THd = remove_own_value(y_THd, v_TGd)
        for part in overriding(self.parts, "attention_output"):
            y_THd = part.attention_output(y_THd, n_TD, i, run)
        y = self._linear(name + "proj.weight", y_THd.flatten(1), qo[L + i], hooks)
        return hooks.adapt("o", slot, n_TD, y)

    def _mlp(
        self,
        n_TD: Tensor,
        step: VirtualLayer,
        banks: dict[str, tuple[Tensor, ...]],
        run: Pass,
        hooks: Hooks,
    ) -> Tensor:
        i = step.layer
        up, down = banks["mlp_up_bank"][i], banks["mlp_down_bank"][i]
        h = F.leaky_relu(self._linear(f"blocks.{i}.mlp.fc.weight", n_TD, up, hooks), 0.5).square()
        y = self._linear(f"blocks.{i}.mlp.proj.weight", h, down, hooks)
        y = hooks.adapt("mlp", step.slot, n_TD, y)
        for part in overriding(self.parts, "mlp_output"):
            y = part.mlp_output(y, n_TD, i, run)
        return y

    def _join(self, lanes: list[Tensor]) -> Tensor:
        if len(lanes) == 1:
            return lanes[0]
        final = self.config.parallel_final_lane
        if final == "mean":
            return (lanes[0] + lanes[1]) / 2
        return lanes[0] if final == "attention" else lanes[1]
