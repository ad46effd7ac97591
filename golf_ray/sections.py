"""The sections of a configuration, one a stage: every knob with its unit, bounds and default.

Defaults are those of PR #1530 of openai/parameter-golf. A section checks its own bounds when it
is made; what several sections must agree on is checked by `golf_ray.config.Config`.
"""

from __future__ import annotations

import typing
from dataclasses import dataclass
from typing import Literal

from golf_ray.fields import require, require_at_least, require_between, require_positive


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """The model's shape: everything that decides which tensors there are and what they compute."""

    vocab_size: int = 8192
    """Token ids run from 0 to vocab_size - 1."""
    embedding_dim: int = 512
    """Width E of the embedding; a projection to model_dim follows where they differ."""
    model_dim: int = 512
    """Width D of the residual stream."""
    num_layers: int = 11
    """Physical layers L; looped layers are passed more than once."""
    num_heads: int = 8
    """Query heads H; model_dim / num_heads is the head dimension."""
    num_kv_heads: int = 4
    """Key and value heads G (grouped-query attention)."""
    mlp_mult: float = 4.0
    """MLP hidden width as a multiple of model_dim."""
    rope_base: float = 10000.0
    """Base of the rotary angles."""
    rope_dims: int = 16
    """First dimensions of each head that are rotated; the rest carry no position."""
    qk_gain_init: float = 5.0
    """Initial per-head gain on the queries."""
    ln_scale: bool = True
    """Scale each normed layer input by 1 / sqrt(layer + 1)."""
    logit_softcap: float = 30.0
    """Cap c of c * tanh(z / c) on the logits."""
    tie_embeddings: bool = True
    """Use the embedding as output head."""
    tied_embed_init_std: float = 0.005
    """Standard deviation of the embedding at initialisation."""
    skip_gates: bool = True
    """Gate the U-Net skips by a sigmoid; otherwise they are added."""
    loop_start: int = 3
    """First looped layer."""
    loop_end: int = 5
    """Last looped layer, included."""
    num_loops: int = 2
    """Extra passes over the looped layers; 0 for none."""
    parallel_start_layer: int | None = 8
    """First layer that a decoder step runs in two lanes; null for none."""
    parallel_final_lane: Literal["mean", "attention", "mlp"] = "mean"
    """What becomes the output of the lanes."""
    xsa_last_n: int = 11
    """Number of last layers whose attention output loses its component along the own value."""
    parts: tuple[str, ...] = ()
    """Further parts of the family: a built-in name, `module:PART` or `file.py:PART`."""

    def __post_init__(self) -> None:
        require_positive(
            "model",
            self,
            "vocab_size",
            "embedding_dim",
            "model_dim",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "mlp_mult",
            "rope_base",
            "logit_softcap",
            "tied_embed_init_std",
        )
        require_at_least(
            "model", self, 0, "num_loops", "rope_dims", "parallel_start_layer", "loop_start"
        )
        require_between("model", self, 0, self.num_layers, "xsa_last_n")
        require(
            self.model_dim % self.num_heads == 0,
            "model.num_heads",
            self.num_heads,
            f"a divisor of model.model_dim = {self.model_dim}",
        )
        require(
            self.num_heads % self.num_kv_heads == 0,
            "model.num_kv_heads",
            self.num_kv_heads,
            f"a divisor of model.num_heads = {self.num_heads}",
        )
        require(
            self.rope_dims % 2 == 0 and self.rope_dims <= self.head_dim,
            "model.rope_dims",
            self.rope_dims,
            f"even and at most the head dim {self.head_dim}",
        )
        require(
            self.mlp_dim == self.mlp_mult * self.model_dim,
            "model.mlp_mult",
            self.mlp_mult,
            f"such that mlp_mult * {self.model_dim} is whole",
        )
        if self.num_loops:
            require(
                self.loop_start <= self.loop_end < self.num_layers,
                "model.loop_end",
                self.loop_end,
                f"from model.loop_start = {self.loop_start} to {self.num_layers - 1}",
            )
        require(
            self.tie_embeddings or self.embedding_dim <= self.model_dim,
            "model.embedding_dim",
            self.embedding_dim,
            "at most model.model_dim where the head is not tied",
        )

    @property
    def head_dim(self) -> int:
        """Width d of one head."""
        return self.model_dim // self.num_heads

    @property
    def kv_dim(self) -> int:
        """Width G * d of the keys, and of the values."""
        return self.num_kv_heads * self.head_dim

    @property
    def mlp_dim(self) -> int:
        """Width F of the MLP's hidden layer."""
        return int(self.mlp_mult * self.model_dim)


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Where the tokens are, in the published layout, and how long a segment may be."""

    dir: str = "data"
    """Folder that holds `datasets/` and `tokenizers/`."""
    dataset: str | None = None
    """Folder below `datasets/`; null for `fineweb10B_sp{vocab_size}`."""
    tokenizer: str | None = None
    """File below `tokenizers/`; null for `fineweb_{vocab_size}_bpe.model`."""
    seq_len: int = 2048
    """Longest segment S in tokens: longer documents are cut every S tokens."""

    def __post_init__(self) -> None:
        require_positive("data", self, "seq_len")


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionConfig:
    """Which implementation computes attention."""

    backend: Literal["auto", "fa3", "varlen", "sdpa"] = "auto"
    """`fa3` FlashAttention-3, `varlen` torch's variable-length attention, `sdpa` a call a segment;
    `auto` takes the fastest that this machine has, a name is an error where it is absent."""


@dataclass(frozen=True, kw_only=True, slots=True)
class KernelConfig:
    """How the forward's other operations are computed; a matter of speed and of last bits."""

    backend: Literal["auto", "torch", "triton"] = "auto"
    """`triton` for the fused kernels, `torch` for torch's own operations; `auto` takes the fused
    ones where a GPU computes in bfloat16 or float16."""
    compile: bool = False
    """Let torch.compile fuse what is left of a training's forward and backward."""
    graphs: bool = True
    """On a GPU replay a micro-batch's kernels as a CUDA graph, where attention is `fa3` and the
    kernels are the fused ones."""
    cache: str | None = None
    """Folder or URI where compiled code is kept for other runs and hosts; null for none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """Training: batches, optimizers, schedules and when to look."""

    seed: int = 1337
    """Seed of the initial weights."""
    batch_tokens: int = 786_432
    """Tokens of one optimizer step over all workers."""
    micro_batches: int = 8
    """Micro-batches of one step; a divisor of it may be the number of workers."""
    iterations: int = 20_000
    """Optimizer steps at most; the schedule's length where there is no wall-clock cap."""
    max_wallclock_s: float | None = 600.0
    """Wall-clock cap of the training in seconds, the reserve included; null for none."""
    reserve_s: float = 13.0
    """Seconds of the cap kept free for calibration."""
    warmdown_frac: float = 0.72
    """Last part of the run over which the learning rates fall linearly."""
    min_lr: float = 0.0
    """Floor of the learning-rate multiplier."""
    enable_looping_at: float = 0.35
    """Part of the run after which the looped layers are looped."""
    ema_decay: float = 0.9965
    """Decay of the weights' moving average, which is the result."""
    clip_norm: float = 0.3
    """Global gradient-norm clip; 0 turns it off."""
    clip_scope: Literal["micro_batch", "rank", "global"] = "micro_batch"
    """What is clipped: each micro-batch, each rank's mean (public form) or the reduced gradient."""
    muon_lr: float = 0.022
    """Learning rate of the matrices."""
    muon_wd: float = 0.095
    """Decoupled weight decay of the matrices."""
    muon_momentum: float = 0.97
    """Nesterov momentum of the matrices after its warm-up."""
    muon_momentum_warmup_start: float = 0.92
    """Momentum at step 0."""
    muon_momentum_warmup_steps: int = 1500
    """Steps over which the momentum rises linearly."""
    muon_newton_schulz_steps: int = 5
    """Newton-Schulz iterations."""
    muon_newton_schulz_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Arithmetic of the momentum buffers and of the iterations."""
    muon_row_normalize: bool = True
    """Divide each row of the update by its L2 norm before the iterations."""
    adam_beta1: float = 0.9
    """First-moment decay of the AdamW groups."""
    adam_beta2: float = 0.95
    """Second-moment decay of the AdamW groups."""
    adam_eps: float = 1e-8
    """Denominator offset of the AdamW groups."""
    embed_lr: float = 0.03
    """Learning rate of the tied embedding."""
    untied_embed_lr: float = 0.6
    """Learning rate of the embedding where the head is not tied."""
    embed_wd: float = 0.085
    """Decoupled weight decay of the embedding."""
    small_lr: float = 0.02
    """Learning rate of all small tensors: scales, mixes, gains, gates."""
    small_wd: float = 0.02
    """Decoupled weight decay of the small tensors."""
    head_lr: float = 0.008
    """Learning rate of an untied head."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Arithmetic of the forward; auto is bfloat16 on a GPU and float32 on a CPU."""
    val_every_steps: int | None = None
    """Steps between packed evaluations of the raw weights; null for none."""
    checkpoint_every_steps: int | None = None
    """Steps between checkpoints; null for one at the end only."""
    log_every_steps: int = 50
    """Steps between interval records."""
    min_tokens_per_s: float | None = None
    """Speed over all workers under which the run ends as on too slow a host; null for none."""
    speed_check_steps: int = 20
    """First steps over which that speed is measured, the very first left out."""

    def __post_init__(self) -> None:
        require_positive(
            "train",
            self,
            "batch_tokens",
            "micro_batches",
            "iterations",
            "max_wallclock_s",
            "muon_newton_schulz_steps",
            "val_every_steps",
            "checkpoint_every_steps",
            "log_every_steps",
            "min_tokens_per_s",
        )
        require_at_least("train", self, 2, "speed_check_steps")
        require_at_least(
            "train",
            self,
            0,
            "seed",
            "reserve_s",
            "clip_norm",
            "muon_lr",
            "muon_wd",
            "embed_lr",
            "embed_wd",
            "small_lr",
            "small_wd",
            "head_lr",
            "adam_eps",
            "untied_embed_lr",
            "muon_momentum_warmup_steps",
        )
        require_between(
            "train",
            self,
            0,
            1,
            "warmdown_frac",
            "min_lr",
            "enable_looping_at",
            "ema_decay",
            "muon_momentum",
            "muon_momentum_warmup_start",
            "adam_beta1",
            "adam_beta2",
        )
        require(
            self.batch_tokens % self.micro_batches == 0,
            "train.micro_batches",
            self.micro_batches,
            f"a divisor of train.batch_tokens = {self.batch_tokens}",
        )
        if self.max_wallclock_s is not None:
            require(
                self.reserve_s < self.max_wallclock_s,
                "train.reserve_s",
                self.reserve_s,
                f"less than train.max_wallclock_s = {self.max_wallclock_s}",
            )

    @property
    def micro_batch_tokens(self) -> int:
        """Tokens n of one micro-batch of one worker."""
        return self.batch_tokens // self.micro_batches


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantizationConfig:
    """GPTQ, the artifact's container and its size limit."""

    mlp_bits: int = 6
    """Bits of a code of the MLP matrices."""
    mlp_clip_sigmas: float = 12.85
    """Clip of the MLP matrices in standard deviations of a row."""
    attention_bits: int = 6
    """Bits of a code of the query, key, value and output matrices."""
    attention_clip_sigmas: float = 12.85
    """Clip of the attention matrices in standard deviations of a row."""
    embedding_bits: int = 8
    """Bits of a code of the embedding (and of an untied head)."""
    embedding_clip_sigmas: float = 20.0
    """Clip of the embedding in standard deviations of a row."""
    looped_bits: int | None = None
    """Bits for the matrices of looped layers; null for those of their group."""
    looped_clip_sigmas: float | None = None
    """Clip for the matrices of looped layers; null for that of their group."""
    float16_max_numel: int = 65_536
    """Tensors of at most this many elements are stored as float16 instead of being quantised."""
    damping: float = 0.01
    """Added to the Hessian's diagonal, as a part of its mean."""
    block_columns: int = 128
    """Columns of one GPTQ block."""
    calibration_batches: int = 64
    """Batches of the Hessians' calibration plan."""
    calibration_batch_tokens: int = 98_304
    """Tokens of one calibration batch, a multiple of data.seq_len."""
    calibration_seed: int = 1337
    """Seed of the calibration plan."""
    compressor: Literal["brotli", "lzma"] = "brotli"
    """Compressor of the container."""
    code_bytes: int = 27_310
    """Bytes of the submission's code, counted into the total; `--code FILE` measures it."""
    limit_bytes: int = 16_000_000
    """Limit of code bytes + model bytes."""

    def __post_init__(self) -> None:
        bits = ("mlp_bits", "attention_bits", "embedding_bits", "looped_bits")
        require_between("quantization", self, 2, 8, *bits)
        require_positive(
            "quantization",
            self,
            "mlp_clip_sigmas",
            "attention_clip_sigmas",
            "limit_bytes",
            "embedding_clip_sigmas",
            "looped_clip_sigmas",
            "block_columns",
            "calibration_batches",
            "calibration_batch_tokens",
        )
        require_at_least(
            "quantization",
            self,
            0,
            "float16_max_numel",
            "damping",
            "code_bytes",
            "calibration_seed",
        )


AdapterSite = Literal["q", "k", "v", "o", "mlp", "head"]
ADAPTER_SITES: tuple[AdapterSite, ...] = typing.get_args(AdapterSite)


@dataclass(frozen=True, kw_only=True, slots=True)
class AdaptationConfig:
    """Doc-independent LoRA test-time training (TTT)."""

    rank: int = 96
    """Rank of every adapter; on a GPU multiples of 32 are fastest."""
    sites: tuple[AdapterSite, ...] = ADAPTER_SITES
    """Where adapters sit: q, k, v, o and mlp of every virtual layer, and the head."""
    chunk_size: int = 32
    """Predictions scored, then learned from, at a time."""
    window: int = 2048
    """Predictions at most that one forward sees, the chunk included."""
    lr: float = 1e-4
    """Learning rate."""
    beta1: float = 0.0
    """First-moment decay of adam, momentum of sgd."""
    beta2: float = 0.999
    """Second-moment decay of adam."""
    eps: float = 1e-10
    """Denominator offset of adam."""
    weight_decay: float = 0.5
    """Decoupled weight decay, on A and B."""
    optimizer: Literal["adam", "sgd"] = "adam"
    """Optimizer of the adapters."""
    grad_steps: int = 1
    """Gradient steps a chunk."""
    seed: int = 0
    """Seed of A, which is a function of (seed, document, slot)."""
    document_fraction: float = 1.0
    """Part of the documents to score, drawn with the seed."""
    sample_documents: int | None = None
    """Documents to score at most, drawn by length with the seed; None scores all."""
    group_documents: int = 64
    """Documents planned together; no effect on the result beyond rounding."""
    resident_documents: int | None = None
    """Documents at most that are at work at a time; None for as many as memory holds."""
    step_tokens: int | None = None
    """Tokens of all windows of a step; None for as many as memory holds."""

    def __post_init__(self) -> None:
        require_positive(
            "adaptation",
            self,
            "rank",
            "chunk_size",
            "window",
            "grad_steps",
            "group_documents",
            "resident_documents",
            "step_tokens",
            "document_fraction",
        )
        require_at_least("adaptation", self, 0, "lr", "eps", "weight_decay", "seed")
        # Of one document there is no standard error.
        require_at_least("adaptation", self, 2, "sample_documents")
        require(
            self.sample_documents is None or self.document_fraction == 1,
            "adaptation.sample_documents",
            self.sample_documents,
            f"unset, or adaptation.document_fraction 1 in place of {self.document_fraction}",
        )
        require_between("adaptation", self, 0, 1, "beta1", "beta2", "document_fraction")
        for name in ("beta1", "beta2"):
            # Bias correction divides by 1 - beta^t.
            value = getattr(self, name)
            require(value < 1, f"adaptation.{name}", value, "less than 1")
        require(
            self.chunk_size <= self.window,
            "adaptation.chunk_size",
            self.chunk_size,
            f"at most adaptation.window = {self.window}",
        )
        require(
            len(set(self.sites)) == len(self.sites),
            "adaptation.sites",
            self.sites,
            "without repetition",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationConfig:
    """Evaluation: how it is done without adaptation, and what it may take."""

    seq_len: int = 2048
    """Longest segment S in tokens."""
    batch_tokens: int = 65_536
    """Tokens of one packed batch, a multiple of seq_len; part of the result's identity."""
    stride: int = 64
    """Tokens between the starts of sliding windows."""
    threads: int = 1
    """CPU threads of one evaluating process; on a CPU part of the result's last bits."""
    limit_s: float = 600.0
    """Seconds that eight GPUs may take for an evaluation; one that would take longer is told so."""

    def __post_init__(self) -> None:
        require_positive(
            "evaluation", self, "seq_len", "batch_tokens", "stride", "threads", "limit_s"
        )
        require(
            self.batch_tokens % self.seq_len == 0,
            "evaluation.batch_tokens",
            self.batch_tokens,
            f"a multiple of evaluation.seq_len = {self.seq_len}",
        )
        require_between("evaluation", self, 1, self.seq_len, "stride")


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterConfig:
    """What the stages ask of Ray."""

    num_workers: int = 8
    """Workers of one training; a divisor of train.micro_batches."""
    gpus_per_worker: float = 1.0
    """GPUs of each worker and each evaluating actor; 0 for a CPU."""
    cpus_per_worker: float = 1.0
    """CPUs of each worker and each evaluating actor."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where tensors live; auto is cuda where gpus_per_worker > 0."""
    placement: Literal["PACK", "STRICT_PACK", "SPREAD", "STRICT_SPREAD"] = "STRICT_PACK"
    """Ray placement strategy of the training workers; STRICT_PACK keeps them on one node."""
    eval_actors: int = 8
    """Actors of one evaluation."""
    max_failures: int = 2
    """Restarts of a training whose worker died or hung."""
    hang_timeout_s: float = 300.0
    """Seconds without progress of a worker after which it counts as hung."""
    start_timeout_s: float = 120.0
    """Seconds that workers may take to be placed and started."""

    @property
    def tensor_device(self) -> Literal["cpu", "cuda"]:
        """Where tensors live, with `auto` resolved."""
        if self.device == "auto":
            return "cuda" if self.gpus_per_worker > 0 else "cpu"
        return self.device

    def __post_init__(self) -> None:
        require_positive(
            "cluster",
            self,
            "num_workers",
            "eval_actors",
            "hang_timeout_s",
            "start_timeout_s",
            "cpus_per_worker",
        )
        require_at_least("cluster", self, 0, "gpus_per_worker", "max_failures")
