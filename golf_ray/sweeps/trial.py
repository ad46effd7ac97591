"""One trial: train, quantise, evaluate, each stage only if its output is not there yet.

The trial's record is written as it happens: after each stage the file in the sweep's folder says
what is known, and a trial that failed says why. Runs inside a Ray Tune trial; knows nothing of the
search.

Invariant: a record whose status is final (`done`, `over_limit`, `pruned`, `failed`) is never
changed by the trial again; any other trial may be run again from its beginning, and finds its
stages.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from golf_ray import fingerprint
from golf_ray.config import Config
from golf_ray.errors import GolfRayError, TrainingPruned
from golf_ray.provenance import provenance
from golf_ray.results.records import parse_record
from golf_ray.results.schema import FINAL, SCHEMA
from golf_ray.results.timeline import gpu_seconds
from golf_ray.sweeps import keys
from golf_ray.sweeps.rooms import Rooms, SweepStopped
from golf_ray.sweeps.sizing import SURE, predicted_from_records
from golf_ray.sweeps.space import stage_of
from golf_ray.sweeps.spans import noted
from golf_ray.sweeps.store import StageOutput, StageStore
from trainers.storage import Storage, parse_lines


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialSpec:
    """What a trial is, before it runs."""

    number: int
    """Place in the sweep, from 1."""
    knobs: Mapping[str, Any]
    """The searched fields' values."""
    base: Config
    """The configuration that the knobs change."""
    data: str
    """Fingerprint of shards and tokenizer."""
    objectives: tuple[str, ...] = ("ttt_bpb",)
    checkpoints: tuple[tuple[str, str], ...] = ()
    """Stored checkpoints to use in place of a training, each with its fingerprint."""
    group: int = 0
    """Trials of one group share a training."""
    prune: bool = False
    """Whether a training that stands worse on the way than others did is ended."""

    @property
    def config(self) -> Config:
        """The whole configuration, knobs included."""
        return self.base.with_overrides(dict(self.knobs))

    def config_of(self, *stages: str) -> Config:
        """The configuration with the knobs of some stages only: what comes out of a stage must not
        depend on which of the trials that share it was first."""
        mine = {knob: value for knob, value in self.knobs.items() if stage_of(knob) in stages}
        return self.base.with_overrides(mine)


class TrialRecord:
    """A trial's file, rewritten whole at every change.

    Args:
        storage: the folder of records.
        spec: of the trial.
    """

    def __init__(self, storage: Storage, spec: TrialSpec) -> None:
        config = spec.config
        whole = config.to_dict()
        self._storage = storage
        self.data: dict[str, Any] = {
            "schema": SCHEMA,
            "trial": spec.number,
            "group": spec.group,
            "status": "running",
            "stage": "train" if not spec.checkpoints else "calibrate",
            "reason": None,
            "began_unix_s": time.time(),
            "knobs": dict(spec.knobs),
            "seed": config.train.seed,
            "values": {},
            "constraints": {},
            "phases_s": {},
            "spans": [],
            "limit_bytes": config.quantization.limit_bytes,
            "data": spec.data,
            "checkpoints": [path for path, _ in spec.checkpoints] or None,
            **provenance(),
            "config_fingerprint": fingerprint.of_value(whole),
            "config": whole,
        }
        before = read_record(storage, spec.number)
        if before is not None:
            self.data["attempts"] = before.get("attempts", 1) + 1
            # What was computed before it was interrupted kept GPUs busy all the same.
            self.data["spans"] = before["spans"]
        self.write()

    def update(self, **values: Any) -> None:
        """Take values in and write."""
        self.data.update(values)
        self.write()

    def phases(self, **seconds: float) -> None:
        """Add seconds to phases; written with the next update."""
        phases = self.data["phases_s"]
        for name, value in seconds.items():
            phases[name] = phases.get(name, 0.0) + value

    def write(self) -> None:
        """Write the file, whole."""
        data = json.dumps(_plain(self.data), indent=2) + "\n"
        self._storage.write_bytes(record_name(self.data["trial"]), data.encode())


def record_name(number: int) -> str:
    """A trial's file in the folder of records."""
    return f"{number:05d}.json"


def read_record(storage: Storage, number: int) -> dict[str, Any] | None:
    """A trial's record, if it has one.

    Raises:
        StorageError: it is damaged, or a newer golf_ray wrote it.
    """
    name = record_name(number)
    data = storage.read_bytes(name)
    return None if data is None else parse_record(data, storage, name)


def outcome_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """What the search is told of a trial's end."""
    return {name: record.get(name) for name in ("status", "reason", "values", "constraints")}


def run_trial(spec: TrialSpec, store: StageStore, records: Storage, rooms: Rooms) -> dict[str, Any]:
    """Run what is missing of a trial's stages and score it.

    Returns:
        the record's data: a stage that fails makes a record that says so, and no error.
    """
    record = TrialRecord(records, spec)
    trial = _Trial(spec=spec, store=store, record=record, rooms=rooms)
    try:
        status, reason = trial.run()
    except TrainingPruned as error:
        status, reason = "pruned", error.problem
    except SweepStopped:
        status, reason = "interrupted", "the sweep was stopped"
    except Exception as error:
        status, reason = "failed", reason_of(error)
    if status in FINAL and status != "failed":
        # What an unforeseen error broke off has stages without a time.
        trial.account()
    record.update(
        status=status,
        reason=reason,
        stage=record.data["stage"] if status in ("failed", "interrupted") else None,
        ended_unix_s=time.time() if status in FINAL else None,
    )
    return record.data


def reason_of(error: BaseException) -> str:
    """An error in one line."""
    if isinstance(error, GolfRayError):
        return str(error)
    line = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: {line}"


@dataclass(kw_only=True)
class _Trial:
    spec: TrialSpec
    store: StageStore
    record: TrialRecord
    rooms: Rooms
    began_s: float = field(default_factory=time.monotonic)

    def run(self) -> tuple[str, str | None]:
        """All stages; status and reason."""
        spec = self.spec
        if not spec.checkpoints:
            refused = self._refuse()
            if refused is not None:
                return "over_limit", refused
            weights = [self._train()]
        else:
            weights = list(spec.checkpoints)
        quantized = [self._quantize(place, name) for place, name in weights]
        over = self._size(quantized)
        if over is not None:
            return "over_limit", over
        if "ttt_bpb" in spec.objectives:
            self._evaluate(quantized)
        values = {name: self.record.data.get(name) for name in spec.objectives}
        self.record.data["values"] = values
        bad = [name for name, value in values.items() if not _finite(value)]
        if bad:
            return "failed", f"{bad[0]} is not finite: {values[bad[0]]}"
        return "done", None

    def account(self) -> None:
        """Where the trial's time went that no stage took."""
        wall_s = time.monotonic() - self.began_s
        data = self.record.data
        staged_s = sum(data.get(f"{stage}_s") or 0.0 for stage in ("train", "quantize", "evaluate"))
        staged_s += data.get("calibrate_s") or 0.0
        waited_s = self.rooms.waited_s + data["phases_s"].get("shared_wait", 0.0)
        self.record.data.update(
            wall_s=wall_s, waited_s=waited_s, control_s=max(0.0, wall_s - staged_s - waited_s)
        )

    # Stages -------------------------------------------------------------------------------------

    def _refuse(self) -> str | None:
        """Why training would be in vain, where a size is known to be over the limit beforehand."""
        key = keys.training_key(self.spec.config_of("train"), self.spec.data)
        if self.store.find("train", key) is not None:
            return None
        config = self.spec.config
        size = predicted_from_records(config, self.record._storage)
        if size is None:
            return None
        total, limit = size + config.quantization.code_bytes, config.quantization.limit_bytes
        if total <= limit * (1 + SURE):
            return None
        self.record.update(
            predicted_model_bytes=size,
            total_bytes=total,
            fits=False,
            constraints={"bytes": total / limit - 1},
            trained=False,
        )
        return f"not trained: {total:,} bytes are predicted, {total - limit:,} over the limit"

    def _train(self) -> tuple[str, str]:
        from golf_ray.sweeps import stages

        config = self.spec.config_of("train")
        key = keys.training_key(config, self.spec.data)
        self.record.update(training=self.store.folder("train", key).name)

        def compute(folder: Storage) -> dict[str, Any]:
            with self.rooms.training(config) as placed:
                return stages.train_stage(config, folder, placed, self._bars(config))

        num_before = len(self.record.data["spans"])
        try:
            output, mine = self._obtain("train", key, compute)
        except GolfRayError:
            self._tell_failed_training(self.record.data["spans"][num_before:])
            raise
        found = output.result
        self.record.phases(**{name: found[f"{name}_s"] for name in ("start", "compile", "elapsed")})
        self.record.update(
            trained=mine,
            train_s=found["wall_s"] if mine else 0.0,
            train_gpu_s=self._gpu_s(found["wall_s"], found["num_workers"]) if mine else 0.0,
            tokens_per_s=found["tokens_per_s"],
            tokens_per_s_looping=found["tokens_per_s_looping"],
            peak_memory_bytes=found["peak_memory_bytes"],
            compute=found["compute"],
            steps=found["steps"],
            tokens=found["tokens"],
            train_loss_nats=found["train_loss_nats"],
            val_bpb=found["val_bpb"],
            val_tokens_scored=found.get("val_tokens"),
            val_bytes_scored=found.get("val_bytes"),
            restarts=found["restarts"],
            num_workers=found["num_workers"],
            device=found.get("device"),
            **{f"{name}_s": found[f"{name}_s"] for name in ("start", "compile", "elapsed")},
        )
        return stages.final_model(output.storage), output.fingerprint

    def _tell_failed_training(self, spans: Sequence[Mapping[str, Any]]) -> None:
        """What a training came to and cost that did not come to its end.

        Args:
            spans: none where somebody else made it.
        """
        folder = self.store.root.child(self.record.data["training"]).child("run")
        intervals = parse_lines(folder.read_bytes("intervals.jsonl") or b"")
        last = intervals[-1] if intervals else {}
        self.record.data.update(
            trained=bool(spans),
            train_s=math.fsum(s["ended_unix_s"] - s["began_unix_s"] for s in spans),
            train_gpu_s=gpu_seconds(spans),
            steps=last.get("step"),
            **{name: last.get(name) for name in ("tokens", "train_loss_nats", "elapsed_s")},
        )

    def _bars(self, config: Config) -> dict[int, float]:
        """The bpb on the way above which the training is ended; none where nothing is pruned."""
        from golf_ray.sweeps.pruning import sweep_bars
        from golf_ray.sweeps.table import read_records

        if not self.spec.prune:
            return {}
        records = read_records(self.record._storage)
        return sweep_bars(self.store.root, records, config.train.iterations)

    def _quantize(self, weights: str, name: str) -> StageOutput:
        from golf_ray.sweeps import stages

        spec = self.spec
        config = spec.config_of("train", "quantize")
        calibration = keys.calibration_key(config, name, spec.data)
        self.record.update(stage="calibrate")
        hessians, mine = self._obtain(
            "calibrate",
            calibration,
            lambda folder: self.rooms.light(
                "calibrate", config=config, weights=weights, folder=folder.uri
            ),
        )
        self.record.update(stage="quantize")
        self._add("calibrate_s", hessians.result["calibrate_s"] if mine else 0.0)
        key = keys.quantization_key(
            config, hessians.fingerprint, keys.documents_of(config, spec.data)
        )
        output, mine = self._obtain(
            "quantize",
            key,
            lambda folder: self.rooms.light(
                "quantize",
                config=config,
                weights=weights,
                hessians=hessians.storage.uri_of(stages.HESSIANS_FILE),
                folder=folder.uri,
            ),
        )
        self._add("quantize_s", output.result["wall_s"] if mine else 0.0)
        self.record.phases(**{n: output.result[f"{n}_s"] for n in ("codes", "sizing", "packed")})
        if self.record.data.get("device") is None:
            self.record.data["device"] = output.result.get("device")
        self.record.update(stage="evaluate")
        return output

    def _size(self, quantized: Sequence[StageOutput]) -> str | None:
        """Take the sizes and scores of codes into the record; why they are over the limit."""
        quantization = self.spec.config.quantization
        largest = max(quantized, key=lambda output: int(output.result["model_bytes"])).result
        total = largest["model_bytes"] + quantization.code_bytes
        over = total / quantization.limit_bytes - 1
        self.record.data["constraints"]["bytes"] = over
        self.record.update(
            int6_bpb=_mean([output.result["int6_bpb"] for output in quantized]),
            int6_tokens_scored=largest.get("int6_tokens_scored"),
            int6_bytes_scored=largest.get("int6_bytes_scored"),
            model_bytes=largest["model_bytes"],
            predicted_model_bytes=largest["predicted_model_bytes"],
            bytes_exact=largest["exact"],
            code_bytes=quantization.code_bytes,
            total_bytes=total,
            fits=over <= 0,
            codes=[output.name for output in quantized],
        )
        if over <= 0 or (over <= SURE and not largest["exact"]):
            return None
        how = "" if largest["exact"] else " as predicted from the entropy of the codes"
        excess = total - quantization.limit_bytes
        return f"{total:,} bytes, {excess:,} over the limit{how}"

    def _evaluate(self, quantized: Sequence[StageOutput]) -> None:
        results = [self._evaluated(output) for output in quantized]
        first = results[0]
        errors = [r["estimate"]["standard_error_bpb"] for r in results if "estimate" in r]
        if "limit" in first:
            limit = first["limit"]
            seconds = max(r["limit"]["predicted_s"] for r in results)
            self.record.data["constraints"]["seconds"] = seconds / limit["limit_s"] - 1
        self.record.update(
            ttt_bpb=_mean([r["val_bpb"] for r in results]),
            ttt_loss_nats=_mean([r["val_loss_nats"] for r in results]),
            ttt_standard_error_bpb=math.hypot(*errors) / len(errors) if errors else None,
            tokens_scored=first["tokens_scored"],
            bytes_scored=first["bytes_scored"],
            documents_scored=first["documents_scored"],
            weights=first["weights"],
        )

    def _evaluated(self, quantized: StageOutput) -> dict[str, Any]:
        from golf_ray.sweeps import stages

        config = self.spec.config
        documents = keys.documents_of(config, self.spec.data)
        key = keys.evaluation_key(config, quantized.fingerprint, documents)
        codes = quantized.storage.uri_of(stages.CODES_FILE)

        def compute(folder: Storage) -> dict[str, Any]:
            if config.adaptation.sample_documents is not None:
                return self.rooms.light("evaluate", config=config, codes=codes, folder=folder.uri)
            with self.rooms.pool(config) as watch:
                return stages.evaluate_on_pool(config, codes, folder, **watch)

        output, mine = self._obtain("evaluate", key, compute)
        self.record.data.setdefault("evaluations", []).append(output.name)
        wall_s = output.result["wall_s"] if mine else 0.0
        self._add("evaluate_s", wall_s)
        actors = output.result.get("actor_seconds") if mine else None
        self._add("evaluate_gpu_s", self._gpu_s(wall_s if actors is None else actors, 1))
        self.record.phases(ttt=output.result["wall_s"])
        return output.result

    # Helpers ------------------------------------------------------------------------------------

    def _obtain(self, stage: keys.Stage, key: Mapping[str, Any], compute: Any) -> Any:
        """An output, and whether it was made for this trial (now, or before it was interrupted)."""
        began_s = time.monotonic()
        worked_s = 0.0

        def timed(folder: Storage) -> dict[str, Any]:
            nonlocal worked_s
            started_s = time.monotonic()
            if self.record.data.pop("waits_for", None) is not None:
                # Who was waited for is gone without it.
                self.record.phases(shared_wait=started_s - began_s)
                self.record.write()
            result: dict[str, Any] = {}
            spans = self.record.data["spans"]
            with noted(spans, stage, self.spec.config, self.rooms, result):
                try:
                    result.update(compute(folder))
                finally:
                    worked_s = time.monotonic() - started_s
            return result

        output = self.store.obtain(
            stage, key, timed, on_wait=lambda who: self.record.update(waits_for=who)
        )
        if not worked_s:
            self.record.phases(shared_wait=time.monotonic() - began_s)
        self.record.data.pop("waits_for", None)
        return output, output.made_by == self.store.who

    def _add(self, name: str, seconds: float) -> None:
        self.record.data[name] = self.record.data.get(name, 0.0) + seconds

    def _gpu_s(self, seconds: float, workers: int) -> float:
        return seconds * workers * self.spec.base.cluster.gpus_per_worker


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None


def _finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _plain(value: Any) -> Any:
    """JSON has no numbers that are not finite."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value  # type: ignore[arg-type]
