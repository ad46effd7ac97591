"""Presets: named configurations.

`record` is PR #1530 of openai/parameter-golf; `tiny` is the size at which expected values are
stored; `laptop` trains real text on a CPU in seconds, with every knob of the record alive.
"""

from __future__ import annotations

from golf_ray.config import (
    AdaptationConfig,
    ClusterConfig,
    Config,
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    QuantizationConfig,
    TrainConfig,
)
from golf_ray.errors import ConfigError, nearest

RECORD = Config(name="record")

_CPU = ClusterConfig(
    num_workers=1,
    gpus_per_worker=0.0,
    placement="PACK",
    eval_actors=2,
    hang_timeout_s=60.0,
)

TINY = Config(
    name="tiny",
    model=ModelConfig(
        vocab_size=512,
        embedding_dim=64,
        model_dim=64,
        num_layers=6,
        num_heads=4,
        num_kv_heads=2,
        mlp_mult=3.0,
        rope_dims=8,
        loop_start=2,
        loop_end=3,
        parallel_start_layer=4,
        xsa_last_n=6,
    ),
    data=DataConfig(seq_len=64),
    train=TrainConfig(
        seed=7,
        batch_tokens=2048,
        iterations=10,
        max_wallclock_s=None,
        enable_looping_at=0.4,
        clip_scope="rank",
        muon_momentum_warmup_steps=6,
        precision="float32",
    ),
    quantization=QuantizationConfig(
        float16_max_numel=0, calibration_batches=4, calibration_batch_tokens=256, calibration_seed=7
    ),
    adaptation=AdaptationConfig(rank=4, chunk_size=16, window=64, lr=1e-3, group_documents=4),
    evaluation=EvaluationConfig(seq_len=64, batch_tokens=256, stride=16),
    cluster=_CPU,
)

LAPTOP = Config(
    name="laptop",
    model=ModelConfig(
        vocab_size=1024,
        embedding_dim=64,
        model_dim=64,
        num_layers=5,
        num_heads=4,
        num_kv_heads=2,
        mlp_mult=3.0,
        rope_dims=8,
        loop_start=1,
        loop_end=2,
        num_loops=1,
        parallel_start_layer=3,
        xsa_last_n=5,
    ),
    data=DataConfig(seq_len=256),
    train=TrainConfig(
        batch_tokens=4096,
        micro_batches=2,
        iterations=40,
        max_wallclock_s=None,
        muon_momentum=0.95,
        muon_momentum_warmup_start=0.85,
        muon_momentum_warmup_steps=20,
        ema_decay=0.9,
        val_every_steps=20,
        checkpoint_every_steps=20,
        log_every_steps=5,
    ),
    quantization=QuantizationConfig(
        float16_max_numel=1024, calibration_batches=8, calibration_batch_tokens=2048
    ),
    adaptation=AdaptationConfig(rank=4, window=256, lr=1e-3, group_documents=4),
    evaluation=EvaluationConfig(seq_len=256, batch_tokens=4096),
    cluster=ClusterConfig(
        num_workers=2,
        gpus_per_worker=0.0,
        placement="PACK",
        eval_actors=2,
        hang_timeout_s=60.0,
    ),
)

PRESETS = {config.name: config for config in (RECORD, TINY, LAPTOP)}


def preset(name: str) -> Config:
    """A preset by name.

    Raises:
        ConfigError: there is none of that name.
    """
    if name not in PRESETS:
        raise ConfigError(f"unknown preset '{name}'", nearest(name, PRESETS))
    return PRESETS[name]
