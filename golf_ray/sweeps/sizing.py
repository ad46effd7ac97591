"""Sizes known before anything is trained: from another trial's, by bits and clip widths."""

from __future__ import annotations

import json

from golf_ray.config import Config
from trainers.storage import Storage


def predicted_from_records(config: Config, records: Storage) -> int | None:
    """Bytes of the model that a configuration will give, from any trial of the same model whose
    codes are known; None where there is none.

    Training changes a size by far less than bits and clip widths do.
    """
    from golf_ray.quantization.sizes import predict_change

    for name in records.names():
        data = records.read_bytes(name) if name.endswith(".json") else None
        record = {} if data is None else json.loads(data)
        if not record.get("codes"):
            continue
        reference = Config.from_dict(record["config"])
        if reference.model == config.model:
            return predict_change(reference, record["model_bytes"], config)
    return None
