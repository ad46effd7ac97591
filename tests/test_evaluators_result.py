"""What an evaluation says, through the one function that runs any."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from reference import TOKENIZER, VAL_SHARDS, tiny_model

from evaluators.result import EvaluationResult, Method, evaluate
from golf_ray.data.shards import load_tokens
from golf_ray.data.tokenizer import byte_tables
from golf_ray.metric import LN2, Score
from golf_ray.presets import TINY

TOKENS = np.array(load_tokens(VAL_SHARDS, 512))[:330]
TABLES = byte_tables(TOKENIZER, 512)


@pytest.mark.parametrize("method", ["packed", "sliding", "ttt"])
def test_every_method_says_the_same_things(method: Method) -> None:
    result = evaluate(tiny_model(), TINY, method, tokens=TOKENS, tables=TABLES, weights="int6")
    data = json.loads(json.dumps(result.to_dict()))
    assert data["method"] == method and data["weights"] == "int6"
    assert data["tokens_scored"] == (329 if method == "ttt" else 320)
    bits = data["val_loss_nats"] / LN2 * data["tokens_scored"]
    assert data["val_bpb"] == pytest.approx(bits / data["bytes_scored"], rel=1e-12)
    assert 0 < data["seconds"] < 60
    assert ("documents_scored" in data) == (method == "ttt")
    assert "documents" not in data


def test_scores_by_document() -> None:
    result = evaluate(tiny_model(), TINY, "ttt", tokens=TOKENS, tables=TABLES, weights="full")
    data = result.to_dict(per_document=True)
    assert data["documents_scored"] == len(data["documents"]) == 9
    assert [d["index"] for d in data["documents"]] == list(range(9))
    assert sum(d["tokens"] for d in data["documents"]) == data["tokens_scored"]
    assert sum(d["bytes"] for d in data["documents"]) == data["bytes_scored"]
    nats = math.fsum(d["nats"] for d in data["documents"])
    assert nats / data["tokens_scored"] == data["val_loss_nats"]


def test_plain_numbers() -> None:
    score = Score(nats=LN2 * 6, tokens=2, num_bytes=3)
    result = EvaluationResult(method="packed", weights="full", score=score, seconds=1.5)
    assert result.to_dict() == {
        "method": "packed", "val_loss_nats": LN2 * 3, "val_bpb": 2.0, "tokens_scored": 2,
        "bytes_scored": 3, "weights": "full", "seconds": 1.5,
    }  # fmt: skip
