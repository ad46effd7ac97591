"""Importer of the public program's flat configuration.

Reads a JSON object of its keys, or the `Hyperparameters:` block of one of its logs, and gives a
`Config`. Every key is either carried over, known to do nothing here, or an error: a knob is never
dropped in silence.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from golf_ray.config import Config
from golf_ray.errors import ConfigError, nearest

PUBLIC_MICRO_BATCHES = 8
"""The public program cuts a step, and a validation batch, into this many parts on any host."""

_DIRECT = {
    "vocab_size": "model.vocab_size",
    "embedding_dim": "model.embedding_dim",
    "model_dim": "model.model_dim",
    "num_layers": "model.num_layers",
    "num_heads": "model.num_heads",
    "num_kv_heads": "model.num_kv_heads",
    "mlp_mult": "model.mlp_mult",
    "rope_base": "model.rope_base",
    "rope_dims": "model.rope_dims",
    "qk_gain_init": "model.qk_gain_init",
    "ln_scale": "model.ln_scale",
    "logit_softcap": "model.logit_softcap",
    "tie_embeddings": "model.tie_embeddings",
    "tied_embed_init_std": "model.tied_embed_init_std",
    "skip_gates_enabled": "model.skip_gates",
    "loop_start": "model.loop_start",
    "loop_end": "model.loop_end",
    "num_loops": "model.num_loops",
    "parallel_start_layer": "model.parallel_start_layer",
    "xsa_last_n": "model.xsa_last_n",
    "train_seq_len": "data.seq_len",
    "seed": "train.seed",
    "train_batch_tokens": "train.batch_tokens",
    "iterations": "train.iterations",
    "gptq_reserve_seconds": "train.reserve_s",
    "warmdown_frac": "train.warmdown_frac",
    "min_lr": "train.min_lr",
    "enable_looping_at": "train.enable_looping_at",
    "ema_decay": "train.ema_decay",
    "grad_clip_norm": "train.clip_norm",
    "matrix_lr": "train.muon_lr",
    "muon_wd": "train.muon_wd",
    "muon_momentum": "train.muon_momentum",
    "muon_momentum_warmup_start": "train.muon_momentum_warmup_start",
    "muon_momentum_warmup_steps": "train.muon_momentum_warmup_steps",
    "muon_backend_steps": "train.muon_newton_schulz_steps",
    "muon_row_normalize": "train.muon_row_normalize",
    "beta1": "train.adam_beta1",
    "beta2": "train.adam_beta2",
    "adam_eps": "train.adam_eps",
    "adam_wd": "train.small_wd",
    "tied_embed_lr": "train.embed_lr",
    "embed_lr": "train.untied_embed_lr",
    "embed_wd": "train.embed_wd",
    "scalar_lr": "train.small_lr",
    "head_lr": "train.head_lr",
    "gptq_calibration_batches": "quantization.calibration_batches",
    "embed_bits": "quantization.embedding_bits",
    "embed_clip_sigmas": "quantization.embedding_clip_sigmas",
    "compressor": "quantization.compressor",
    "ttt_lora_rank": "adaptation.rank",
    "ttt_chunk_size": "adaptation.chunk_size",
    "ttt_eval_seq_len": "adaptation.window",
    "ttt_lora_lr": "adaptation.lr",
    "ttt_beta1": "adaptation.beta1",
    "ttt_beta2": "adaptation.beta2",
    "ttt_weight_decay": "adaptation.weight_decay",
    "ttt_grad_steps": "adaptation.grad_steps",
    "ttt_optimizer": "adaptation.optimizer",
    "ttt_batch_size": "adaptation.group_documents",
    "val_doc_fraction": "adaptation.document_fraction",
    "eval_seq_len": "evaluation.seq_len",
    "eval_stride": "evaluation.stride",
}

_FANNED_OUT = {
    "matrix_bits": ("quantization.mlp_bits", "quantization.attention_bits"),
    "matrix_clip_sigmas": (
        "quantization.mlp_clip_sigmas",
        "quantization.attention_clip_sigmas",
    ),
    "mlp_clip_sigmas": ("quantization.mlp_clip_sigmas",),
    "attn_clip_sigmas": ("quantization.attention_clip_sigmas",),
}

_SITES = {"ttt_k_lora": "k", "ttt_o_lora": "o", "ttt_mlp_lora": "mlp"}

_LANES = {"mean": "mean", "attn": "attention", "attention": "attention", "mlp": "mlp"}

_HANDLED = {
    "max_wallclock_seconds",
    "grad_accum_steps",
    "val_batch_tokens",
    "val_loss_every",
    "parallel_final_lane",
    "rope_yarn",
}

_NO_EFFECT = {
    # Nothing at the record's settings, or a choice that golf_ray makes for itself.
    "muon_beta2",
    "rope_train_seq_len",
    "sliding_window_enabled",
    "train_log_every",
    "ttt_enabled",
    "ttt_eval_batches",
    "warmup_steps",
    # Where files lie and who the process is.
    "artifact_dir",
    "data_dir",
    "datasets_dir",
    "distributed",
    "is_main_process",
    "local_rank",
    "logfile",
    "model_path",
    "quantized_model_path",
    "rank",
    "run_id",
    "tokenizer_path",
    "train_files",
    "val_files",
    "world_size",
    "ttt_output_dir",
    "eval_only_path",
}

KNOWN_KEYS = frozenset(_DIRECT) | set(_FANNED_OUT) | set(_SITES) | _HANDLED | _NO_EFFECT


def config_from_upstream(flat: Mapping[str, Any], base: Config | None = None) -> Config:
    """A `Config` from the public program's keys; keys that are absent keep the record's values.

    Args:
        flat: its keys and values.
        base: what absent keys are taken from; the record by default. Workers and devices are
            never part of a public configuration and come from here.

    Raises:
        ConfigError: a key is unknown (the nearest known one is named), or asks for what golf_ray
            does not compute.
    """
    base = base or Config()
    unknown = [key for key in flat if key not in KNOWN_KEYS]
    if unknown:
        raise ConfigError(
            f"unknown key '{unknown[0]}' in the public configuration",
            nearest(unknown[0], KNOWN_KEYS),
        )
    if flat.get("rope_yarn"):
        raise ConfigError("rope_yarn = true is not supported", "golf_ray never rescales rotary")
    changes: dict[str, Any] = {"name": "upstream", "train.clip_scope": "rank"}
    for key, paths in _FANNED_OUT.items():
        changes.update({path: flat[key] for path in paths if key in flat})
    changes.update({path: flat[key] for key, path in _DIRECT.items() if key in flat})
    changes.update(_batches(flat, base))
    sites = base.adaptation.sites
    off = {site for key, site in _SITES.items() if not flat.get(key, True)}
    changes["adaptation.sites"] = [site for site in sites if site not in off]
    if "max_wallclock_seconds" in flat:
        changes["train.max_wallclock_s"] = flat["max_wallclock_seconds"] or None
    if "val_loss_every" in flat:
        changes["train.val_every_steps"] = flat["val_loss_every"] or None
    if "parallel_final_lane" in flat:
        lane = str(flat["parallel_final_lane"])
        if lane not in _LANES:
            raise ConfigError(f"parallel_final_lane = {lane!r} is unknown", nearest(lane, _LANES))
        changes["model.parallel_final_lane"] = _LANES[lane]
    if "model_dim" in flat and "model.embedding_dim" not in changes:
        changes["model.embedding_dim"] = flat["model_dim"]
    return base.with_overrides(changes)


def _batches(flat: Mapping[str, Any], base: Config) -> dict[str, Any]:
    changes: dict[str, Any] = {"train.micro_batches": PUBLIC_MICRO_BATCHES}
    if "val_batch_tokens" in flat:
        changes["evaluation.batch_tokens"] = int(flat["val_batch_tokens"]) // PUBLIC_MICRO_BATCHES
    seq_len = int(flat.get("train_seq_len", base.data.seq_len))
    tokens = int(flat.get("train_batch_tokens", base.train.batch_tokens)) // PUBLIC_MICRO_BATCHES
    changes["quantization.calibration_batch_tokens"] = max(1, tokens // seq_len) * seq_len
    if "seed" in flat:
        changes["quantization.calibration_seed"] = flat["seed"]
    return changes


def read_upstream(path: Path, base: Config | None = None) -> Config:
    """Read a JSON file of public keys, or a public log with its `Hyperparameters:` block.

    Raises:
        ConfigError: the file is missing, is neither, or holds a key that is not known.
    """
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror})", "check the path") from None
    flat = _read_json(text, path) if text.lstrip().startswith("{") else _read_log(text, path)
    return config_from_upstream(flat, base)


def _read_json(text: str, path: Path) -> dict[str, Any]:
    try:
        flat = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path} is not JSON: {error}", "give a JSON object of keys") from None
    assert isinstance(flat, dict)
    return flat


_LOG_LINE: Callable[[str], re.Match[str] | None] = re.compile(r"^\s+(\w+)\s*:\s*(.*?)\s*$").match


def _read_log(text: str, path: Path) -> dict[str, Any]:
    flat = hyperparameters_in(text)
    if flat is None:
        raise ConfigError(
            f"{path} holds no `Hyperparameters:` block",
            "give a JSON of the public keys or a public log",
        )
    return flat


def hyperparameters_in(text: str) -> dict[str, Any] | None:
    """The keys of a log's `Hyperparameters:` block; None where it has none."""
    lines = text.splitlines()
    starts = [i for i, line in enumerate(lines) if line.strip().lower() == "hyperparameters:"]
    if not starts:
        return None
    flat: dict[str, Any] = {}
    for line in lines[starts[0] + 1 :]:
        match = _LOG_LINE(line)
        if match is None:
            break
        flat[match[1]] = _literal(match[2])
    return flat


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
