"""Evaluation as one call: weights, validation stream, method; in this process or on Ray.

Several checkpoints under several settings are one call too: they share a pool of actors, and what
becomes of one says nothing of the others.
"""

from __future__ import annotations

import dataclasses
import itertools
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from golf_ray.api.machine import connected, cpu_threads, pick_device
from golf_ray.api.quantizing import Phase, Quantization, default_artifact, quantize
from golf_ray.api.weights import StoredWeights, config_for, open_weights, opened
from golf_ray.config import Config
from golf_ray.errors import EvaluationFailed, UsageError

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray
    from torch import Tensor

    from evaluators.ledger import Ledger
    from evaluators.packed import Progress
    from evaluators.pool import PoolEvent, PoolReport
    from evaluators.result import EvaluationResult
    from evaluators.watch import OnStatus
    from golf_ray.adaptation.engine import AdapterInit
    from golf_ray.data.tokenizer import ByteTables
    from golf_ray.quantization.sizes import Sizes

    OnEvent = Callable[[PoolEvent], None]

Method = Literal["packed", "sliding", "ttt"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """A score, and what it is the score of."""

    checkpoint: Path
    """The file that was given."""
    result: EvaluationResult
    device: str
    workers: int | None
    """Actors that shared the work; None for this process."""
    sizes: Sizes | None = None
    """Of the artifact, where one was scored."""
    quantization: Quantization | None = None
    """Where the artifact was made on the way."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the configuration that were varied, by path."""

    def to_dict(self, *, per_document: bool = False) -> dict[str, Any]:
        """Plain data for JSON."""
        data: dict[str, Any] = {"checkpoint": str(self.checkpoint)}
        if self.settings:
            data["settings"] = dict(self.settings)
        data.update(self.result.to_dict(per_document=per_document))
        data.update({"device": self.device, "workers": self.workers})
        if self.sizes is not None:
            data.update(self.sizes.to_dict())
        if self.quantization is not None:
            data["quantization"] = self.quantization.to_dict()
        return data


@dataclass(frozen=True, kw_only=True, slots=True)
class FailedEvaluation:
    """One of several evaluations that has no score."""

    checkpoint: Path
    settings: Mapping[str, Any]
    weights: Literal["full", "int6"]
    error: EvaluationFailed

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        data: dict[str, Any] = {"checkpoint": str(self.checkpoint)}
        if self.settings:
            data["settings"] = dict(self.settings)
        return {**data, "weights": self.weights, "error": str(self.error)}


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluations:
    """What became of several evaluations, and of the pool that they shared."""

    outcomes: tuple[Evaluation | FailedEvaluation, ...]
    """Checkpoint by checkpoint, and for each setting by setting."""
    report: PoolReport | None
    """None in this process, and where everything was in ledgers already."""

    @property
    def failed(self) -> tuple[FailedEvaluation, ...]:
        """Those without a score."""
        return tuple(one for one in self.outcomes if isinstance(one, FailedEvaluation))

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "evaluations": [one.to_dict() for one in self.outcomes],
            "pool": None if self.report is None else self.report.to_dict(),
        }


def evaluate(
    checkpoint: str | Path | StoredWeights,
    config: Config | None = None,
    *,
    method: Method = "packed",
    quantize_first: bool = False,
    artifact: str | Path | None = None,
    adapter_init: str | Path | None = None,
    workers: int | None = None,
    address: str | None = None,
    force: bool = False,
    progress: Progress | None = None,
    quantize_progress: Phase | None = None,
    on_status: OnStatus | None = None,
    on_event: OnEvent | None = None,
    on_report: Callable[[PoolReport], None] | None = None,
    tell: Callable[[str], None] | None = None,
    ledger: str | Path | None = None,
) -> Evaluation:
    """Score a checkpoint or an artifact on the validation stream of its configuration.

    Args:
        config: None for the one that the checkpoint carries.
        method: `packed`, `sliding`, or `ttt` for test-time training.
        quantize_first: make the artifact and score that.
        artifact: keep the artifact there.
        adapter_init: an .npz with the adapters' A, for `ttt`.
        workers: Ray actors to share the work; None computes in this process.
        address: of a running Ray cluster, for workers.
        force: allow a model configuration other than the carried one.
        progress: told, in this process, of every batch, or document of `ttt`.
        quantize_progress: told how quantisation goes on.
        on_status: told, with workers, of every result.
        on_event: told of actors that are lost, and of what is done about it.
        on_report: told how the actors' work went.
        tell: told how many documents `ttt` takes at a time in this process, and of a lack of
            memory; and what a ledger holds.
        ledger: folder or URI where `ttt` keeps what is scored: with the same one again it does
            only what is missing.

    Raises:
        GolfRayError: something given cannot be used, or not everything could be scored.
    """
    weights = opened(checkpoint)
    config = config_for(weights, config, force=force)
    run = _Run(
        method=method, workers=workers, address=address, adapters=adapter_init, progress=progress,
        on_status=on_status, on_event=on_event, on_report=on_report, tell=tell,
    )  # fmt: skip
    _check_fits(run, ledger)
    # What cannot be scored is found out before minutes of quantisation.
    task = run.task(weights, config, {})
    if not quantize_first:
        return _only(run, task, ledger)
    with tempfile.TemporaryDirectory(prefix="golf-ray-") as folder:
        kept = None if artifact is None else Path(artifact)
        target = kept or Path(folder) / default_artifact(weights.path).name
        made = quantize(weights, config, out=target, force=force, progress=quantize_progress)
        scored = _only(run, dataclasses.replace(task, weights=open_weights(target)), ledger)
    made = dataclasses.replace(made, artifact=kept)
    return dataclasses.replace(scored, checkpoint=weights.path, quantization=made)


def evaluate_many(
    checkpoints: Sequence[str | Path | StoredWeights],
    config: Config | Sequence[Config] | None = None,
    *,
    vary: Mapping[str, Sequence[Any]] | None = None,
    method: Method = "ttt",
    adapter_init: str | Path | None = None,
    workers: int | None = None,
    address: str | None = None,
    force: bool = False,
    progress: Progress | None = None,
    on_status: OnStatus | None = None,
    on_event: OnEvent | None = None,
    tell: Callable[[str], None] | None = None,
    ledger: str | Path | None = None,
) -> Evaluations:
    """Score checkpoints under settings, every one under every combination, with one pool.

    Args:
        config: one for all, one for each, or None for those that the checkpoints carry.
        vary: values by path of a field, such as {"adaptation.chunk_size": [32, 48]}.
        ledger: folder or URI in which each evaluation has a ledger of its own.
        method, adapter_init, workers, address, force, progress, on_status, on_event, tell: as for
            `evaluate`.

    Raises:
        GolfRayError: something given cannot be used. What cannot be scored to the end is among
            the outcomes instead.
    """
    reports: list[PoolReport] = []
    run = _Run(
        method=method, workers=workers, address=address, adapters=adapter_init, progress=progress,
        on_status=on_status, on_event=on_event, on_report=reports.append, tell=tell,
    )  # fmt: skip
    _check_fits(run, ledger)
    tasks = []
    for place, checkpoint in enumerate(checkpoints):
        weights = opened(checkpoint)
        given = config if config is None or isinstance(config, Config) else config[place]
        base = config_for(weights, given, force=force)
        for settings in combinations(vary or {}):
            changed = config_for(weights, base.with_overrides(settings), force=force)
            tasks.append(run.task(weights.without_tensors(), changed, settings))
    if not tasks:
        raise UsageError("no checkpoint was given", "name one or more")
    outcomes = run.outcomes(tasks, ledger)
    return Evaluations(outcomes=tuple(outcomes), report=reports[0] if reports else None)


def combinations(vary: Mapping[str, Sequence[Any]]) -> Iterator[dict[str, Any]]:
    """Every combination of values, the last field varying fastest.

    Raises:
        UsageError: a field has no value, or one twice.
    """
    for name, values in vary.items():
        if not values or len({str(value) for value in values}) < len(values):
            raise UsageError(
                f"{name} is to vary over {', '.join(map(str, values)) or 'nothing'}",
                "give it one or more values, each once",
            )
    for chosen in itertools.product(*vary.values()):
        yield dict(zip(vary, chosen, strict=True))


def validation_stream(config: Config) -> tuple[NDArray[np.uint16], ByteTables]:
    """All validation tokens [T] of a configuration, and the bytes of each token id.

    Raises:
        DataError: shards or tokenizer are missing, damaged, or of another vocabulary.
    """
    from golf_ray.data.shards import find_shards, load_tokens
    from golf_ray.data.tokenizer import byte_tables, find_tokenizer

    vocab_size = config.model.vocab_size
    tables = byte_tables(find_tokenizer(config.data, vocab_size), vocab_size)
    return load_tokens(find_shards(config.data, vocab_size, "val"), vocab_size), tables


def digests_of_data(tokens: NDArray[np.uint16], tables: ByteTables) -> dict[str, str]:
    """What a ledger's header says of the text that it holds scores of."""
    from evaluators.ledger import digest_of

    return {
        "tokens": digest_of(tokens),
        "tokenizer": digest_of(tables.base_bytes, tables.has_leading_space, tables.is_boundary),
    }


def identity_of(
    weights: StoredWeights, config: Config, digest: str | None = None
) -> dict[str, Any]:
    """What a ledger's header says of the weights whose scores it holds.

    Args:
        digest: the fingerprint of their file, where it is known.
    """
    from golf_ray import fingerprint

    return {
        "weights": digest or fingerprint.of_file(weights.path),
        "weights_kind": weights.kind,
        "model": dataclasses.asdict(config.model),
    }


def ledger_identity(
    config: Config,
    of: Mapping[str, Any],
    device: torch.device,
    adapters: str | Path | None = None,
) -> dict[str, Any]:
    """What the scores of an evaluation with test-time training follow from: a ledger's header.

    Args:
        of: `identity_of` the weights, and `digests_of_data`.
        adapters: an .npz with the adapters' A.
    """
    from golf_ray import __version__, fingerprint
    from golf_ray.adaptation.engine import WITHOUT_EFFECT
    from golf_ray.model.compute import compute_dtype

    settings = dataclasses.asdict(config.adaptation)
    return {
        "golf_ray": __version__,
        **of,
        "adaptation": {k: v for k, v in settings.items() if k not in WITHOUT_EFFECT},
        "adapters": None if adapters is None else fingerprint.of_file(Path(adapters)),
        "arithmetic": str(compute_dtype(config, device)),
    }


@dataclass(frozen=True, kw_only=True, slots=True)
class _Task:
    """One evaluation."""

    weights: StoredWeights
    config: Config
    settings: Mapping[str, Any]
    tokens: NDArray[np.uint16]
    tables: ByteTables
    adapters: AdapterInit | None

    @property
    def name(self) -> str:
        """For people."""
        varied = " ".join(f"{path.split('.')[-1]}={value}" for path, value in self.settings.items())
        return f"{self.weights.path} {varied}".rstrip()


@dataclass(frozen=True, kw_only=True, slots=True)
class _Run:
    """How tasks are to be done."""

    method: Method
    workers: int | None
    address: str | None
    adapters: str | Path | None
    progress: Progress | None
    on_status: OnStatus | None
    on_event: OnEvent | None
    on_report: Callable[[PoolReport], None] | None
    tell: Callable[[str], None] | None
    streams: dict[tuple[Any, int], tuple[NDArray[np.uint16], ByteTables]] = field(
        default_factory=dict
    )
    """Validation streams that are read."""

    def task(self, weights: StoredWeights, config: Config, settings: Mapping[str, Any]) -> _Task:
        """A task, with all that it reads but the weights."""
        key = config.data, config.model.vocab_size
        if key not in self.streams:
            self.streams[key] = validation_stream(config)
        tokens, tables = self.streams[key]
        adapters = None if self.adapters is None else _read_adapters(Path(self.adapters), config)
        return _Task(
            weights=weights,
            config=config,
            settings=settings,
            tokens=tokens,
            tables=tables,
            adapters=adapters,
        )

    def outcomes(
        self, tasks: Sequence[_Task], folder: str | Path | None
    ) -> list[Evaluation | FailedEvaluation]:
        """Of each task what it says, or why it says nothing.

        Args:
            folder: where ledgers are kept.
        """
        # Opened before anything starts: one may be another evaluation's.
        kept: list[Ledger | None] = [None] * len(tasks)
        if folder is not None:
            kept = list(self._ledgers(tasks, str(folder)))
        pairs = list(zip(tasks, kept, strict=True))
        found = self._here(pairs) if self.workers is None else self._on_ray(pairs)
        return [self._outcome(task, one) for task, one in zip(tasks, found, strict=True)]

    def _outcome(
        self, task: _Task, found: EvaluationResult | EvaluationFailed
    ) -> Evaluation | FailedEvaluation:
        from golf_ray.quantization.sizes import sizes_of

        weights = task.weights
        if isinstance(found, EvaluationFailed):
            return FailedEvaluation(
                checkpoint=weights.path, settings=task.settings, weights=weights.kind, error=found
            )
        size = weights.model_bytes
        return Evaluation(
            checkpoint=weights.path,
            result=found,
            device=self._device(task.config),
            workers=self.workers,
            sizes=None if size is None else sizes_of(size, task.config),
            settings=task.settings,
        )

    def _device(self, config: Config) -> str:
        if self.workers is None:
            return pick_device(config).type
        return config.cluster.tensor_device

    def _ledgers(self, tasks: Sequence[_Task], folder: str) -> Iterator[Ledger]:
        """The tasks' ledgers; a text and a file are read through once for all settings."""
        from golf_ray import fingerprint

        files: dict[Path, str] = {}
        texts: dict[int, dict[str, str]] = {}
        for task in tasks:
            path, text = task.weights.path, id(task.tokens)
            if path not in files:
                files[path] = fingerprint.of_file(path)
            if text not in texts:
                texts[text] = digests_of_data(task.tokens, task.tables)
            of = {**identity_of(task.weights, task.config, files[path]), **texts[text]}
            yield self._ledger(task, of, folder, alone=len(tasks) == 1)

    def _ledger(self, task: _Task, of: Mapping[str, Any], folder: str, *, alone: bool) -> Ledger:
        """The task's ledger, under what its scores follow from.

        Args:
            of: identity of weights and text.
        """
        import torch

        from evaluators.ledger import Ledger, ledger_folder

        device = torch.device(self._device(task.config))
        identity = ledger_identity(task.config, of, device, self.adapters)
        ledger = Ledger(ledger_folder(folder, identity, alone=alone), identity)
        if self.tell is not None:
            for line in ledger.troubles:
                self.tell(line)
            if ledger.scores:
                self.tell(f"{len(ledger.scores):,} documents are in {ledger.uri} already")
        return ledger

    def _here(
        self, tasks: Sequence[tuple[_Task, Ledger | None]]
    ) -> list[EvaluationResult | EvaluationFailed]:
        found: list[EvaluationResult | EvaluationFailed] = []
        for task, ledger in tasks:
            try:
                found.append(self._one_here(task, ledger))
            except EvaluationFailed as error:
                found.append(error)
        return found

    def _one_here(self, task: _Task, ledger: Ledger | None) -> EvaluationResult:
        from evaluators.result import evaluate as evaluate_here
        from golf_ray.model.checkpoint import build_model
        from golf_ray.model.compute import choose_compute

        config, device = task.config, pick_device(task.config)
        with cpu_threads(config.evaluation.threads):
            return evaluate_here(
                build_model(
                    config.model,
                    _state_of(task.weights, config)(),
                    device=device,
                    compute=choose_compute(config, device),
                ),
                config,
                self.method,
                tokens=task.tokens,
                tables=task.tables,
                weights=task.weights.kind,
                adapter_init=task.adapters,
                progress=self.progress,
                tell=self.tell,
                ledger=ledger,
            )

    def _on_ray(
        self, tasks: Sequence[tuple[_Task, Ledger | None]]
    ) -> list[EvaluationResult | EvaluationFailed]:
        from evaluators.jobs import Job
        from evaluators.ray_evaluation import evaluate_jobs_on_ray
        from golf_ray.resources import evaluation_bundles

        config = tasks[0][0].config
        assert self.workers is not None
        if any(task.config.cluster != config.cluster for task, _ in tasks):
            raise UsageError(
                "evaluations that share actors ask for different clusters",
                "give the same --set cluster.* to all of them",
            )
        # One function for all settings of a checkpoint: its weights are shared then.
        states: dict[Path, Callable[[], Mapping[str, Tensor]]] = {}
        jobs = [
            Job(
                name=task.name,
                state=states.setdefault(task.weights.path, _state_of(task.weights, task.config)),
                weights=task.weights.kind,
                config=task.config,
                method=self.method,
                tokens=task.tokens,
                tables=task.tables,
                adapter_init=task.adapters,
                ledger=ledger,
            )
            for task, ledger in tasks
        ]
        bundles = evaluation_bundles(config, self.workers)
        with connected(self.address, bundles, "PACK", "evaluation"):
            return evaluate_jobs_on_ray(
                jobs,
                num_actors=self.workers,
                on_status=self.on_status,
                on_event=self.on_event,
                on_report=self.on_report,
            )


def _only(run: _Run, task: _Task, ledger: str | Path | None) -> Evaluation:
    [outcome] = run.outcomes([task], ledger)
    if isinstance(outcome, FailedEvaluation):
        raise outcome.error
    return outcome


def _check_fits(run: _Run, ledger: str | Path | None) -> None:
    """See that what is asked for is the method's."""
    if run.adapters is not None and run.method != "ttt":
        raise UsageError(f"adapters have no part in '{run.method}' evaluation", "use --method ttt")
    if ledger is not None and run.method != "ttt":
        raise UsageError(f"'{run.method}' evaluation keeps no ledger", "use --method ttt")


def _state_of(weights: StoredWeights, config: Config) -> Callable[[], Mapping[str, Tensor]]:
    """Gives the banked state dict, read anew where its tensors are not held."""

    def state() -> Mapping[str, Tensor]:
        whole = weights if weights.tensors else open_weights(weights.path)
        return whole.state(config.model)

    return state


def _read_adapters(path: Path, config: Config) -> AdapterInit:
    from golf_ray.adaptation.adapters import adapter_slots, read_adapter_init

    slots = adapter_slots(config.model, config.adaptation.sites)
    return read_adapter_init(path, slots, config.adaptation.rank)
