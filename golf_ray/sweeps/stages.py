"""The stages of a trial as functions of a configuration and of input files.

Each computes one output into a folder and returns the numbers that the trial's record takes over.
What was computed before is not looked for here: `golf_ray.sweeps.store` does that. The light ones
run one after another in a process that stays for many trials, and keep there what those have in
common: weights, Hessians' factors, the validation stream.
"""

from __future__ import annotations

import dataclasses
import io
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from golf_ray import api
from golf_ray.api.weights import FINAL_FILE, StoredWeights
from golf_ray.config import Config
from golf_ray.records import make_folder
from golf_ray.sweeps.store import local_copy
from trainers.storage import Storage, parse_lines, split_uri

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from evaluators.pool import PoolEvent
    from golf_ray.data.tokenizer import ByteTables
    from golf_ray.metric import Score
    from golf_ray.quantization.container import QuantizedState
    from trainers.run_record import OnProgress

CODES_FILE = "codes.pt"
HESSIANS_FILE = "hessians.pt"
ARTIFACT_FILE = "final_model.int6.ptz"
LEDGER = "ledger"
RUN = "run"
"""A training's own folder below that of its stage."""

EXACT_CODES = 1_000_000
"""Up to so many codes compressing for real takes a second or two, and nothing is predicted."""


def train_stage(
    config: Config, folder: Storage, on_progress: OnProgress, bars: Mapping[int, float]
) -> dict[str, Any]:
    """Train on Ray workers; a run that was interrupted in this folder goes on.

    Args:
        bars: validation bpb by step, above which the training is ended.

    Raises:
        TrainingPruned: it was.
        GolfRayError: the training failed.
    """
    run = folder.child(RUN)
    resume = run.exists("config.json")
    # Whoever makes a stage holds a claim on it.
    done = api.train(
        config, run_dir=run.uri, resume=resume, bars=bars, claimed=True, on_progress=on_progress
    )
    assert done.outcome is not None
    return {
        "wall_s": done.outcome.wall_s,
        "start_s": done.outcome.start_s,
        "compile_s": done.result.compile_s,
        "elapsed_s": done.result.elapsed_s,
        "tokens_per_s": done.result.tokens_per_s,
        "tokens_per_s_looping": done.result.tokens_per_s_looping,
        "peak_memory_bytes": done.result.peak_memory_bytes,
        "compute": dict(done.result.compute),
        "steps": done.result.steps,
        "tokens": done.result.tokens,
        "train_loss_nats": done.result.train_loss_nats,
        "val_bpb": done.val_bpb,
        **_validated(run),
        "num_workers": done.outcome.num_workers,
        "restarts": len(done.outcome.restarts),
        "device": done.result.device_name,
        "host": done.result.provenance.get("host"),
    }


def calibrate_stage(config: Config, weights: str, folder: str) -> dict[str, Any]:
    """Collect a checkpoint's Hessians.

    Args:
        weights: the checkpoint: a path or the URI of a file in a store.
        folder: where the Hessians go.

    Raises:
        GolfRayError: data or weights cannot be used.
    """
    began_s = time.perf_counter()
    with _written(folder, HESSIANS_FILE) as path:
        made = api.calibrate(file_of(weights), config, out=path, force=True)
    return {
        "calibrate_s": time.perf_counter() - began_s,
        "hessians_bytes": made.num_bytes,
        **_here(config),
    }


def quantize_stage(
    config: Config, weights: str, hessians: str, folder: str, scored: bool = True
) -> dict[str, Any]:
    """Quantise with stored Hessians, say how large the artifact will be, and score the codes
    without adaptation: on the documents that the settings of test-time training name.

    Args:
        scored: whether to score at all.

    Raises:
        GolfRayError: it cannot be done.
    """
    from golf_ray.quantization.artifact import count_saturated
    from golf_ray.quantization.container import QuantizedState, encode_artifact

    began_s = time.perf_counter()
    quantizer = _quantizer(weights, hessians, config)
    [codes] = quantizer.codes([config])
    predicted = quantizer.predicted_bytes(codes)
    saturated, num_codes = count_saturated(codes)
    codes = QuantizedState(
        tensors={name: tensor.cpu() for name, tensor in codes.tensors.items()}, kinds=codes.kinds
    )
    sizing_s = time.perf_counter()
    codes_s = sizing_s - began_s
    exact = num_codes <= EXACT_CODES
    compressor = config.quantization.compressor
    model_bytes = predicted
    if exact:
        model_bytes = len(encode_artifact(codes, config=config, compressor=compressor))
    write_codes(folder, codes)
    scoring_s = time.perf_counter()
    score = _packed_score(config, codes) if scored else None
    now_s = time.perf_counter()
    return {
        "model_bytes": model_bytes,
        "predicted_model_bytes": predicted,
        "exact": exact,
        "saturated_codes": saturated,
        "num_codes": num_codes,
        "int6_bpb": None if score is None else score.bpb,
        "int6_tokens_scored": None if score is None else score.tokens,
        "int6_bytes_scored": None if score is None else score.num_bytes,
        "codes_s": codes_s,
        "sizing_s": scoring_s - sizing_s,
        "packed_s": now_s - scoring_s,
        "wall_s": now_s - began_s,
        **_here(config),
    }


def evaluate_stage(config: Config, codes: str, folder: str | None = None) -> dict[str, Any]:
    """Score codes with test-time training in this process.

    Args:
        folder: of the stage, where each document's score is kept as `evaluate_on_pool` does.

    Raises:
        GolfRayError: they cannot be scored whole, or the scores cannot be kept.
    """
    began_s = time.perf_counter()
    weights = stored_codes(codes)
    scored = api.evaluate(weights, config, method="ttt", force=True)
    if folder is not None:
        _keep_scores(config, weights, scored, Storage(folder))
    return {**_scored(scored, began_s), **_here(config)}


def evaluate_on_pool(config: Config, codes: str, folder: Storage, **watch: Any) -> dict[str, Any]:
    """Score codes with test-time training, shared out over actors; what is scored is kept.

    Args:
        folder: of the stage; has the ledger.
        watch: `on_status`, `on_event` of `golf_ray.evaluate`.

    Raises:
        GolfRayError: they cannot be scored whole.
    """
    began_s = time.perf_counter()
    hosts: set[str] = set()
    told = watch.pop("on_event", None)

    def on_event(event: PoolEvent) -> None:
        hosts.add(event.host)
        if told is not None:
            told(event)

    scored = api.evaluate(
        stored_codes(codes),
        config,
        method="ttt",
        workers=config.cluster.eval_actors,
        ledger=folder.uri_of(LEDGER),
        force=True,
        on_event=on_event,
        **watch,
    )
    return {**_scored(scored, began_s), "host": " ".join(sorted(hosts)) or None}


def compress_stage(config: Config, codes: str, folder: str) -> dict[str, Any]:
    """Write the artifact of codes.

    Raises:
        StorageError: it cannot be written.
    """
    from golf_ray.quantization.container import write_artifact

    began_s = time.perf_counter()
    weights = stored_codes(codes)
    with _written(folder, ARTIFACT_FILE) as path:
        size = write_artifact(path, _state(weights), config=config)
    return {"model_bytes": size, "wall_s": time.perf_counter() - began_s}


LIGHT: dict[str, Callable[..., dict[str, Any]]] = {
    "calibrate": calibrate_stage,
    "quantize": quantize_stage,
    "evaluate": evaluate_stage,
    "compress": compress_stage,
}
"""What a light worker can be told to do."""


# Files ------------------------------------------------------------------------------------------


def file_of(place: str) -> Path:
    """A file by its path or by its URI, on this machine."""
    if "://" not in place:
        return Path(place)
    base, query = split_uri(place)
    folder, _, name = base.rpartition("/")
    return local_copy(Storage(folder + query), name)


def write_codes(folder: str, codes: QuantizedState) -> None:
    """Keep codes as they are: packing them for real takes a minute."""
    import torch

    # To a file of a name torch would write the name, too.
    buffer = io.BytesIO()
    torch.save({"w": dict(codes.tensors), "m": dict(codes.kinds)}, buffer)
    Storage(folder).write_bytes(CODES_FILE, buffer.getvalue())


def stored_codes(place: str) -> StoredWeights:
    """Codes as `write_codes` left them.

    Raises:
        CheckpointError: the file holds something else.
    """
    from golf_ray.errors import CheckpointError
    from golf_ray.model.loading import load_tensors
    from golf_ray.quantization.container import check_state

    path = file_of(place)
    found = load_tensors(path, str(path))
    if not isinstance(found, dict) or found.keys() != {"w", "m"}:
        raise CheckpointError(f"{path} holds no codes", "remove its folder, to compute it again")
    check_state(found["w"], found["m"], str(path))
    return StoredWeights(
        path=path, kind="int6", config=None, model_bytes=None, tensors=found["w"], kinds=found["m"]
    )


class _written:
    """A path to write a stage's file to, which goes to the stage's folder when the block ends."""

    def __init__(self, folder: str, name: str) -> None:
        import tempfile

        self._storage, self._name = Storage(folder), name
        local = self._storage.local
        self._temporary = None if local is not None else tempfile.TemporaryDirectory()
        place = local if local is not None else Path(self._temporary.name)  # type: ignore[union-attr]
        self.path = make_folder(place) / name

    def __enter__(self) -> Path:
        return self.path

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._temporary is None:
            return
        try:
            if kind is None:
                self._storage.write_file(self._name, self.path)
        finally:
            self._temporary.cleanup()


# Kept between trials ----------------------------------------------------------------------------

_KEPT: dict[tuple[str, ...], Any] = {}
"""The last of each kind: a worker turns to another checkpoint seldom, and memory is short."""


def _keep(kind: str, of: str, make: Callable[[], Any]) -> Any:
    if (kind, of) not in _KEPT:
        for key in [key for key in _KEPT if key[0] == kind]:
            del _KEPT[key]
        _KEPT[kind, of] = make()
    return _KEPT[kind, of]


def _quantizer(weights: str, hessians: str, config: Config) -> api.Quantizer:
    model = dataclasses.asdict(config.model)
    return _keep(
        "quantizer",
        f"{weights} {hessians} {model} {config.cluster.tensor_device}",
        lambda: api.Quantizer(file_of(weights), config, hessians=file_of(hessians), force=True),
    )


def _packed_score(config: Config, codes: QuantizedState) -> Score:
    """Of the quantised weights on the documents that are scored, in flat batches."""
    import numpy as np

    from evaluators.packed import score_packed
    from evaluators.ttt import choose_documents
    from golf_ray.model.checkpoint import build_model
    from golf_ray.model.compute import choose_compute
    from golf_ray.quantization.artifact import restore_state

    tokens, tables = _stream(config)
    adaptation = config.adaptation
    if adaptation.sample_documents is not None or adaptation.document_fraction < 1:
        chosen = choose_documents(tokens, adaptation)
        tokens = np.concatenate([tokens[d.start : d.end] for d in chosen])
    device = api.pick_device(config)
    with api.cpu_threads(config.evaluation.threads):
        state = restore_state(codes.tensors, codes.kinds, config.model, "the codes")
        model = build_model(
            config.model, state, device=device, compute=choose_compute(config, device)
        )
        return score_packed(model, tokens, tables, config.evaluation)


def _stream(config: Config) -> tuple[NDArray[np.uint16], ByteTables]:
    return _keep("stream", _text_of(config), lambda: api.validation_stream(config))


def _text_of(config: Config) -> str:
    return f"{dataclasses.astuple(config.data)} {config.model.vocab_size}"


def _keep_scores(
    config: Config, weights: StoredWeights, scored: api.Evaluation, folder: Storage
) -> None:
    """Put documents' scores into a ledger, all in one file: a sample takes no minute, so what a
    worker that dies has scored of it is not worth a file every few seconds."""
    from evaluators.ledger import Ledger
    from golf_ray.api.evaluating import digests_of_data, identity_of, ledger_identity

    digests = _keep("digests", _text_of(config), lambda: digests_of_data(*_stream(config)))
    identity = ledger_identity(
        config, {**identity_of(weights, config), **digests}, api.pick_device(config)
    )
    # What an interrupted stage of another version left is not added to.
    folder.remove(LEDGER)
    Ledger(folder.uri_of(LEDGER), identity).add(scored.result.documents or ())


def _state(weights: StoredWeights) -> QuantizedState:
    from golf_ray.quantization.container import QuantizedState

    return QuantizedState(tensors=weights.tensors, kinds=weights.kinds)


def _scored(scored: api.Evaluation, began_s: float) -> dict[str, Any]:
    data: Mapping[str, Any] = scored.result.to_dict()
    return {**data, "wall_s": time.perf_counter() - began_s}


def _validated(run: Storage) -> dict[str, Any]:
    """Tokens and bytes that a training's last score is of."""
    intervals = parse_lines(run.read_bytes("intervals.jsonl") or b"")
    last = intervals[-1] if intervals else {}
    return {name: last.get(name) for name in ("val_tokens", "val_bytes")}


def _here(config: Config) -> dict[str, Any]:
    """Where a light stage ran, for whoever looks at what kept which GPU busy."""
    import socket

    from trainers.loop import name_of

    return {"device": name_of(api.pick_device(config)), "host": socket.gethostname()}


def final_model(training: Storage) -> str:
    """What to call a training's averaged weights."""
    return training.child(RUN).uri_of(FINAL_FILE)
