"""The end of a sweep: artifacts of the best trials, and their scores on everything.

A search ranks trials on a sample of documents and by predicted sizes; what is quoted is measured.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from golf_ray.config import Config
from golf_ray.results.limits import foretold_over, is_within, may_be_within
from golf_ray.sweeps import keys
from golf_ray.sweeps.spans import noted
from golf_ray.sweeps.store import StageOutput, StageStore
from golf_ray.sweeps.table import read_records
from golf_ray.sweeps.trial import record_name
from trainers.storage import Storage

if TYPE_CHECKING:
    from golf_ray.sweeps.plan import SweepPlan
    from golf_ray.sweeps.rooms import Rooms


def ranked(records: Sequence[dict[str, Any]], objective: str) -> list[dict[str, Any]]:
    """Trials that may be the best, the best first: done, and within the limits, also as measured
    where they were."""
    good = [r for r in records if r["status"] == "done" and is_within(r)]
    return sorted(good, key=lambda r: (r["values"][objective], r["trial"]))


def candidates(
    records: Sequence[dict[str, Any]], objective: str, places: int
) -> list[dict[str, Any]]:
    """Trials in the order in which they are measured until so many are within the limits: those
    that are by what is known; then, as many times at most, those that may be, the nearest first."""
    unsure = sorted(filter(may_be_within, records), key=lambda r: r["constraints"]["bytes"])
    tried = sum(not (r.get("final") or {}).get("fits", True) for r in records if foretold_over(r))
    return [*ranked(records, objective), *unsure[: max(0, places - tried)]]


def finish(plan: SweepPlan, broker: Any, tell: Callable[[str], None]) -> None:
    """Write artifacts of the best trials and score those on all documents; what is done is not
    done again. One whose artifact is over the limit after all gives its place to the next; where
    too few are within the limits by what was foretold, the nearest to them are measured too.

    Raises:
        GolfRayError: an artifact cannot be written or scored.
    """
    import ray
    from ray.exceptions import RayTaskError

    places = plan.finalists
    for record in candidates(read_records(plan.trials_folder), plan.objectives[0], places):
        if not places:
            return
        if "final" not in record:
            tell(f"trial {record['trial']}: writing its artifact, and scoring it on everything")
            task = ray.remote(_finish_on_cluster).options(num_cpus=0)
            try:
                record = ray.get(task.remote(plan, record, broker))
            except RayTaskError as error:
                # Its own words are one line; Ray's are a traceback.
                raise error.cause from None
        places -= bool(record["final"]["fits"])


def _finish_on_cluster(plan: SweepPlan, record: dict[str, Any], broker: Any) -> dict[str, Any]:
    import ray

    from golf_ray.sweeps.broker import BrokerClient
    from golf_ray.sweeps.rooms import ClusterRooms

    number = record["trial"]
    # What an earlier process of this task held, which was lost.
    ray.get(broker.forget.remote(number))
    # Its own trial is over, so its number is free.
    rooms = ClusterRooms(BrokerClient(broker, number))
    store = StageStore(plan.stages_folder, who=f"{plan.name}/trial {number}")
    try:
        record["final"] = final_of(plan, record, store, rooms)
    finally:
        # What it held is told also where it came to nothing.
        data = json.dumps(record, indent=2) + "\n"
        plan.trials_folder.write_bytes(record_name(number), data.encode())
    return record


def final_of(
    plan: SweepPlan, record: dict[str, Any], store: StageStore, rooms: Rooms
) -> dict[str, Any]:
    """What is measured of a finished trial: its artifacts' sizes, and its score on all documents.

    Raises:
        GolfRayError: an artifact cannot be written or scored.
    """
    from golf_ray.quantization.sizes import sizes_of
    from golf_ray.sweeps import stages

    sampled = Config.from_dict(record["config"])
    whole = dataclasses.replace(
        sampled, adaptation=dataclasses.replace(sampled.adaptation, sample_documents=None)
    )
    artifacts, sizes, scores, evaluations = [], [], [], []
    for name in record["codes"]:
        made, scored = _of_codes(plan, whole, name, store, rooms, record["spans"])
        artifacts.append(f"{made.name}/{stages.ARTIFACT_FILE}")
        sizes.append(sizes_of(made.result["model_bytes"], whole))
        scores.append(scored.result["val_bpb"])
        evaluations.append(scored.name)
    largest = max(sizes, key=lambda size: size.total_bytes)
    return {
        "artifacts": artifacts,
        "model_bytes": largest.model_bytes,
        "predicted_model_bytes": record["predicted_model_bytes"],
        "total_bytes": largest.total_bytes,
        "fits": largest.fits,
        "ttt_bpb": sum(scores) / len(scores),
        "evaluations": evaluations,
    }


def _of_codes(
    plan: SweepPlan,
    config: Config,
    name: str,
    store: StageStore,
    rooms: Rooms,
    spans: list[dict[str, Any]],
) -> tuple[StageOutput, StageOutput]:
    """Artifact and score of codes by the name of their folder; what they held goes into `spans`."""
    from golf_ray.sweeps import stages

    codes = store.root.child(name).uri_of(stages.CODES_FILE)
    fingerprint = name.rpartition("-")[2]

    def compress(folder: Storage) -> dict[str, Any]:
        result: dict[str, Any] = {}
        with noted(spans, "compress", config, rooms, result):
            result.update(rooms.light("compress", config=config, codes=codes, folder=folder.uri))
        return result

    def score(folder: Storage) -> dict[str, Any]:
        result: dict[str, Any] = {}
        with noted(spans, "evaluate", config, rooms, result), rooms.pool(config) as watch:
            result.update(stages.evaluate_on_pool(config, codes, folder, **watch))
        return result

    documents = keys.documents_of(config, plan.data)
    return (
        store.obtain("compress", keys.artifact_key(config, fingerprint), compress),
        store.obtain("evaluate", keys.evaluation_key(config, fingerprint, documents), score),
    )
