"""Speed of test-time training: what a chunk costs by its window, and the whole set's time from it.

Documents of random tokens run through the engine as any do. Those of one class grow from their
first chunk to the class's window together, as many at a time as a full step holds, so that one run
gives the time of a step at every window up to there. The whole set's time is the sum over all
chunks of the field's documents, each at the price of its window, times what a run of mixed
documents took over what those prices say of it.

Invariant: what is timed is the device, from the end of one step to the end of the next, and so the
host too wherever the device waits for it.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from golf_ray.adaptation.adapters import AdapterLayout, adapter_slots
from golf_ray.adaptation.budget import choose_budget
from golf_ray.adaptation.engine import Engine
from golf_ray.adaptation.packing import Budget, Step
from golf_ray.adaptation.plan import chunk_at, count_chunks
from golf_ray.adaptation.scores import Document
from golf_ray.bench.corpus import document_lengths
from golf_ray.bench.processes import cold_and_warm
from golf_ray.bench.profile import profile_work
from golf_ray.config import AdaptationConfig, Config
from golf_ray.data.tokenizer import ByteTables
from golf_ray.errors import EvaluationFailed
from golf_ray.model.model import GolfModel

Tell = Callable[[str], None]
NUM_DOCUMENTS = 50_000
"""Of the field's validation set."""
SHORTEST_CLASS = 64
SETTLING_RUNS = 2
"""Before a class is timed: the first compiles, the second captures."""
FULL_STEPS = 12
"""Steps at the whole window, where chunks are most."""
LONGEST_MIXED = 4
"""Windows of the longest document of the mixed run: longer ones would run alone at its end."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassTiming:
    """Steps of one class of windows."""

    window: int
    """The class's largest."""
    documents: int
    """In a step."""
    chunk_ms: float
    """Of a document's chunk at that window, its part of the step."""
    ending_ms: float
    """Of its last chunk, which is not learned from."""
    window_tokens_per_s: float


class _Clock:
    """Times of steps, by the device where there is one."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.steps: list[Step] = []
        self._marks: list[Any] = []

    def mark(self, step: Step | None = None) -> None:
        if step is not None:
            self.steps.append(step)
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def times_ms(self) -> list[float]:
        """Milliseconds of each step, from the mark before it."""
        pairs = zip(self._marks, self._marks[1:], strict=False)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            return [a.elapsed_time(b) for a, b in pairs]
        return [(b - a) * 1e3 for a, b in pairs]


def random_model(config: Config, device: torch.device, seed: int = 0) -> GolfModel:
    """A model of random weights: none is zero, which would spare a GPU power and time."""
    from golf_ray.model.compute import choose_compute

    model = GolfModel(config.model, compute=choose_compute(config, device)).init_weights(seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in model.tensors().values():
            if tensor.ndim == 3:
                scale = tensor.shape[-1] ** -0.5
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * scale)
    return model.to(device)


def no_bytes(vocab_size: int) -> ByteTables:
    """Tables for tokens that stand for nothing."""
    return ByteTables(
        base_bytes=np.ones(vocab_size, dtype=np.int16),
        has_leading_space=np.zeros(vocab_size, dtype=bool),
        is_boundary=np.zeros(vocab_size, dtype=bool),
    )


def documents_of(lengths: Sequence[int]) -> tuple[Document, ...]:
    """Documents of so many predictions, one behind the other."""
    ends = np.cumsum([n + 1 for n in lengths]).tolist()
    return tuple(
        Document(index=i, start=end - n - 1, end=end)
        for i, (n, end) in enumerate(zip(lengths, ends, strict=True))
    )


class TttBench:
    """One model and engine to time.

    Args:
        config: model and adaptation.
        device: where to.
    """

    def __init__(self, config: Config, device: torch.device) -> None:
        self.config = config
        self.device = device
        self.model = random_model(config, device)
        adaptation, model = config.adaptation, config.model
        layout = AdapterLayout(adapter_slots(model, adaptation.sites), adaptation.rank)
        self.budget: Budget = choose_budget(
            model, adaptation, self.model.compute, layout, device, num_documents=NUM_DOCUMENTS
        )
        self._clock = _Clock(device)
        rng = np.random.default_rng(0)
        self._tokens = rng.integers(4, model.vocab_size, 4 * 1024 * 1024).astype(np.uint16)
        # What a step costs, and not what it costs where captures are spared.
        self.engine = self._new_engine(thrifty=False)

    def _new_engine(self, *, thrifty: bool) -> Engine:
        return Engine(
            self.model,
            self._tokens,
            self.config.adaptation,
            tables=no_bytes(self.config.model.vocab_size),
            budget=self.budget,
            on_step=lambda step: self._clock.mark(step),
            thrifty=thrifty,
        )

    def run(self, lengths: Sequence[int]) -> tuple[list[Step], list[float]]:
        """Documents of those lengths to their end: the steps, and the milliseconds of each."""
        documents = documents_of(lengths)
        assert documents[-1].end <= len(self._tokens)
        self._clock = clock = _Clock(self.device)
        clock.mark()
        for _ in self.engine.run(documents):
            pass
        return clock.steps, clock.times_ms()

    def classes(self) -> list[int]:
        """Largest windows of the classes, each twice the one before."""
        adaptation = self.config.adaptation
        found = [adaptation.window]
        while found[-1] // 2 >= max(SHORTEST_CLASS, adaptation.chunk_size):
            found.append(found[-1] // 2)
        return found[::-1]

    def time_class(self, window: int) -> tuple[ClassTiming, dict[int, float]]:
        """One class, and the milliseconds of a document's chunk at each window it passes."""
        chunk = self.config.adaptation.chunk_size
        whole = window == self.config.adaptation.window
        count = max(1, min(self.budget.residents, self.budget.step_tokens // window))
        predictions = window + chunk * (FULL_STEPS if whole else 1)
        for _ in range(SETTLING_RUNS):
            self.run([predictions] * count)
        steps, times = self.run([predictions] * count)
        by_window: dict[int, list[float]] = {}
        ending = []
        for step, ms in zip(steps, times, strict=True):
            if step.learns:
                at = step.members[0].chunk.window_tokens
                by_window.setdefault(at, []).append(ms / len(step.members))
            else:
                ending.append(ms / len(step.members))
        # The first step of a class waits for the documents' start, and whatever is compiled.
        prices = {at: float(np.median(found)) for at, found in by_window.items()}
        timing = ClassTiming(
            window=window,
            documents=count,
            chunk_ms=prices[window],
            ending_ms=float(np.median(ending)),
            window_tokens_per_s=window / prices[window] * 1e3,
        )
        return timing, prices

    def run_afresh(self, lengths: Sequence[int]) -> float:
        """Seconds of documents in an engine of their own, which takes this one's place: what a
        trial of so many documents takes, its captures with it."""
        del self.engine
        _give_back_memory(self.device)
        self.engine = self._new_engine(thrifty=True)
        _, times = self.run(lengths)
        return sum(times) / 1e3

    def start_ms(self) -> float:
        """Milliseconds to give a row to a document."""
        rows = list(range(min(16, self.budget.residents)))
        clock = _Clock(self.device)
        self.engine.adapters.start(rows, rows, 0)
        clock.mark()
        self.engine.adapters.start(rows, rows, 0)
        clock.mark()
        return clock.times_ms()[0] / len(rows)

    def profile(self) -> list[dict[str, Any]]:
        """Where the time of steps at the whole window goes."""
        adaptation = self.config.adaptation
        count = max(1, self.budget.step_tokens // adaptation.window)
        lengths = [adaptation.window + 2 * adaptation.chunk_size] * count
        return [asdict(share) for share in profile_work(partial(self.run, lengths))]


def _give_back_memory(device: torch.device) -> None:
    # An engine and its graphs hold one another.
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def whole_set_ms(
    lengths: Sequence[int] | NDArray[np.integer],
    adaptation: AdaptationConfig,
    prices: dict[int, float],
    endings: Sequence[tuple[int, float]],
    start_ms: float,
) -> float:
    """Milliseconds of documents at given prices.

    Args:
        lengths: predictions of each.
        prices: milliseconds of a chunk that is learned from, by window.
        endings: (window, milliseconds) of a last chunk.
    """
    chunk, window = adaptation.chunk_size, adaptation.window
    known = sorted(prices)
    at, price = np.array(known, float), np.array([prices[w] for w in known])
    end_at, end_price = (np.array(column, float) for column in zip(*sorted(endings), strict=True))
    total = 0.0
    for n in np.asarray(lengths).tolist():
        chunks = count_chunks(n, chunk)
        if not chunks:
            continue
        growing = np.arange(1, min(chunks, window // chunk + 1)) * chunk
        total += float(np.interp(np.minimum(growing, window), at, price).sum())
        total += max(0, chunks - 1 - len(growing)) * prices[known[-1]]
        last = chunk_at(chunks - 1, n, chunk, window).window_tokens
        total += float(np.interp(last, end_at, end_price)) + start_ms
    return total


def mixed_lengths(
    config: Config, seconds: float, price: Callable[[Sequence[int]], float]
) -> list[int]:
    """Predictions of documents at even steps through the field's, that cost about `seconds`."""
    lengths = np.sort(document_lengths(NUM_DOCUMENTS, seed=1))
    lengths = lengths[lengths <= LONGEST_MIXED * config.adaptation.window]
    count = 32
    while True:
        places = ((np.arange(count) + 0.5) * (len(lengths) / count)).astype(int)
        chosen = [int(n) for n in lengths[places]]
        if price(chosen) >= seconds * 1e3 or sum(chosen) > 1_500_000:
            return chosen
        count *= 2


def bench_ttt(
    config: Config,
    device: torch.device,
    *,
    profile: bool,
    mixed_s: float,
    start_up: bool,
    tell: Tell,
) -> dict[str, Any]:
    """All figures; see `golf_ray.bench.report.bench_ttt`."""
    adaptation = config.adaptation
    bench = TttBench(config, device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    classes = bench.classes()
    timings: list[ClassTiming] = []
    prices: dict[int, float] = {}
    for window in classes:
        tell(f"windows up to {window}")
        timing, found = bench.time_class(window)
        timings.append(timing)
        low = classes[classes.index(window) - 1] if window != classes[0] else 0
        prices.update({w: ms for w, ms in found.items() if low < w <= window})
    endings = [(t.window, t.ending_ms) for t in timings]
    start_ms = bench.start_ms()
    price = partial(
        whole_set_ms, adaptation=adaptation, prices=prices, endings=endings, start_ms=start_ms
    )
    tell("mixed documents")
    chosen = mixed_lengths(config, mixed_s, price)
    # Its shapes are few of thousands of steps, and all of them new in a run so short.
    bench.run(chosen)
    steps, times = bench.run(chosen)
    mixed = {
        "documents": len(chosen),
        "window_tokens": sum(step.window_tokens for step in steps),
        "steps": len(steps),
        "measured_s": sum(times) / 1e3,
        "priced_s": price(chosen) / 1e3,
    }
    mixed["measured_over_priced"] = mixed["measured_s"] / mixed["priced_s"]
    lengths = document_lengths(NUM_DOCUMENTS)
    priced_s = price(lengths) / 1e3
    found_: dict[str, Any] = {
        "budget": asdict(bench.budget),
        "compute": bench.model.compute.to_dict(),
        "classes": [asdict(timing) for timing in timings],
        "chunk_ms_by_window": {str(w): prices[w] for w in sorted(prices)},
        "document_start_ms": start_ms,
        "mixed": mixed,
        "whole_set": {
            "documents": NUM_DOCUMENTS,
            "tokens": int(lengths.sum()),
            "priced_gpu_s": priced_s,
            "gpu_s": priced_s * mixed["measured_over_priced"],
            "method": "sum over all chunks of their price by window, times measured over priced "
            "of the mixed run",
        },
    }
    if device.type == "cuda":
        # What captured steps use is not allocated between replays, but nobody else's either.
        found_["peak_memory_bytes"] = torch.cuda.max_memory_reserved(device)
        if profile:
            tell("profile")
            found_["profile"] = bench.profile()
    tell("mixed documents in a fresh engine")
    mixed["fresh_s"] = bench.run_afresh(chosen)
    del bench
    if start_up:
        tell("start-up")
        _give_back_memory(device)
        found_["first_result"] = time_first_result(config)
    return found_


def time_first_result(config: Config) -> dict[str, float]:
    """Seconds from a process's start to its first score: with nothing compiled yet, then again.

    Raises:
        EvaluationFailed: such a process failed.
    """
    return cold_and_warm(
        "golf_ray.bench.first_result",
        config,
        lambda line, began_unix_s: float(line["unix_s"]) - began_unix_s,
        cache="TRITON_CACHE_DIR",
        error=EvaluationFailed,
    )
