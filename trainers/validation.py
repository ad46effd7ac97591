"""Packed evaluation in the middle of a training, shared out over its ranks.

Invariant: the score is that of a fixed list of batches, summed in their order, so it does not
depend on the number of ranks.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from evaluators.packed import packed_bounds, score_batch
from golf_ray.config import Config
from golf_ray.data.documents import cut_tokens
from golf_ray.data.shards import find_shards, load_tokens
from golf_ray.data.tokenizer import ByteTables, byte_tables, find_tokenizer
from golf_ray.metric import Score, total
from golf_ray.model.model import GolfModel
from golf_ray.optim.world import World


class PackedValidation:
    """Scores the raw weights on the whole validation stream.

    Args:
        tokens: the stream.
        tables: bytes of each token id.
        config: sequence length and batch size of the packed evaluation.

    Raises:
        DataError: the stream is shorter than one sequence.
    """

    def __init__(self, tokens: NDArray[np.integer], tables: ByteTables, config: Config) -> None:
        self._evaluation = config.evaluation
        self._tokens = cut_tokens(tokens, config.evaluation.seq_len)
        self._tables = tables
        self._plan = packed_bounds(len(self._tokens), config.evaluation)

    @staticmethod
    def of_config(config: Config) -> PackedValidation | None:
        """Over the validation shards that a configuration names; None where it asks for none.

        Raises:
            DataError: shards or tokenizer are missing or damaged.
        """
        if config.train.val_every_steps is None:
            return None
        vocab_size = config.model.vocab_size
        tables = byte_tables(find_tokenizer(config.data, vocab_size), vocab_size)
        tokens = load_tokens(find_shards(config.data, vocab_size, "val"), vocab_size)
        return PackedValidation(tokens, tables, config)

    def __call__(self, model: GolfModel, world: World, loop: bool) -> Score:
        """The score over all ranks; every rank must call it."""
        # A row a batch, each filled by one rank: adding zeros leaves every bit as it is.
        sums = torch.zeros(len(self._plan), 3, dtype=torch.float64)
        for i in range(world.rank, len(self._plan), world.size):
            score = score_batch(
                model,
                self._tokens,
                self._plan[i],
                self._tables,
                self._evaluation.seq_len,
                loop=loop,
            )
            sums[i] = torch.tensor([score.nats, score.tokens, score.num_bytes], dtype=torch.float64)
        rows = world.sum_(sums.to(world.device)).tolist()
        return total(Score(nats=n, tokens=int(t), num_bytes=int(b)) for n, t, b in rows)
