"""Training a SentencePiece tokenizer with the published settings.

Byte-pair encoding with byte fallback, digits split, nmt_nfkc normalisation, coverage 0.999, no
dummy prefix; pad 0, bos 1, eos 2, unk 3. Which text it sees is the caller's choice.

Invariant: the model's bytes follow from the texts, their order and the vocabulary size, on any
machine.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator
from typing import Any, Final

from golf_ray.data.shards import BOS_ID, MAX_VOCAB_SIZE
from golf_ray.errors import DataError

PAD_ID: Final = 0
EOS_ID: Final = 2
UNK_ID: Final = 3
NORMALIZATION: Final = "nmt_nfkc"

_SENTENCE_CHARS: Final = 4000
_SENTENCE_BYTES: Final = 4 * _SENTENCE_CHARS
_NUM_THREADS: Final = 2
"""Written into the model, so it must not follow from the machine."""
_TOO_HIGH = re.compile(r"Vocabulary size too high .*<= (\d+)")
_TOO_LOW = re.compile(r"Vocabulary size is smaller than required_chars\. \d+ vs (\d+)")


def sentences(text: str) -> Iterator[str]:
    """A document in pieces that the trainer takes: it drops those that are too long."""
    for start in range(0, len(text), _SENTENCE_CHARS):
        yield text[start : start + _SENTENCE_CHARS]


def train_tokenizer(pieces: Iterable[str], vocab_size: int) -> bytes:
    """Train a tokenizer.

    Args:
        pieces: what `sentences` gives for each document.

    Returns:
        The serialised model.

    Raises:
        DataError: the text is too little for the vocabulary size (the largest possible is named),
            or the vocabulary size cannot hold the text's characters.
    """
    import sentencepiece

    require_vocab_size(vocab_size)
    model = io.BytesIO()
    failures: list[BaseException] = []

    def guarded() -> Iterator[str]:
        # What is raised in here comes out of the trainer as a bare RuntimeError.
        try:
            yield from pieces
        except (Exception, KeyboardInterrupt) as error:
            failures.append(error)
            raise

    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=guarded(),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name=NORMALIZATION,
            character_coverage=0.999,
            add_dummy_prefix=False,
            pad_id=PAD_ID,
            bos_id=BOS_ID,
            eos_id=EOS_ID,
            unk_id=UNK_ID,
            max_sentence_length=_SENTENCE_BYTES,
            num_threads=_NUM_THREADS,
            minloglevel=2,
        )
    except RuntimeError as error:
        if failures:
            raise failures[0] from None
        raise _explained(str(error), vocab_size) from None
    return model.getvalue()


def require_vocab_size(vocab_size: int) -> None:
    """See that ids of the vocabulary fit into a shard.

    Raises:
        DataError: they do not.
    """
    if not 0 < vocab_size <= MAX_VOCAB_SIZE:
        raise DataError(
            f"a vocabulary of {vocab_size} does not fit into shards of 16-bit ids",
            f"choose a vocabulary size from 1 to {MAX_VOCAB_SIZE}",
        )


def published_normalizer() -> Any:
    """The normalisation of a tokenizer that `train_tokenizer` makes, before there is one."""
    import sentencepiece

    return sentencepiece.SentencePieceNormalizer(
        rule_name=NORMALIZATION, add_dummy_prefix=False, remove_extra_whitespaces=True
    )


def _explained(message: str, vocab_size: int) -> DataError:
    if found := _TOO_HIGH.search(message):
        return DataError(
            f"the text is too little for a vocabulary of {vocab_size}",
            f"the largest possible with it is {found[1]}: use more text or a smaller vocabulary",
        )
    if found := _TOO_LOW.search(message):
        return DataError(
            f"a vocabulary of {vocab_size} cannot hold the text's characters and the 256 bytes",
            f"the smallest possible with it is {found[1]}",
        )
    if "sentences_.empty()" in message or "all_chars_count" in message:
        return DataError("there is no text to make a tokenizer of", "use more text")
    reason = " ".join(message.split())
    return DataError(f"the tokenizer could not be trained ({reason})", "use other text")
