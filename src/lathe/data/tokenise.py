"""Text to a corpus of token ids, and the special tokens that objectives ask for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice

from lathe.architecture import Architecture
from lathe.data.corpus import Corpus
from lathe.errors import RequestError
from lathe.objectives.base import SpecialTokens
from lathe.text.tokenizer import Tokenizer

_TEXTS_AT_ONCE = 1024


def tokenise(tokenizer: Tokenizer, texts: Iterable[str]) -> Corpus:
    """A corpus of one field, `text`, in memory: a document for each text, without special tokens.

    Raises:
        RequestError: there is no text, or one that is no string or not valid Unicode.
    """
    return Corpus.of(tokenizer.vocab_size, text=_encoded(tokenizer, texts))


def _encoded(tokenizer: Tokenizer, texts: Iterable[str]) -> Iterator[list[int]]:
    source = iter(texts)
    while group := list(islice(source, _TEXTS_AT_ONCE)):
        yield from tokenizer.encode_batch(group, add_special_tokens=False)


def special_tokens(tokenizer: Tokenizer, architecture: Architecture) -> SpecialTokens:
    """The special tokens of a tokenizer, with the model's own start token for its decoder.

    Raises:
        RequestError: the tokenizer has more tokens than the model's vocabulary.
    """
    vocab = architecture.embedding.vocab_size
    if tokenizer.vocab_size > vocab:
        raise RequestError(
            f"the tokenizer has {tokenizer.vocab_size:,} tokens and the model's vocabulary is {vocab:,}; "
            "use the model's own tokenizer, or a larger vocab_size"
        )
    return SpecialTokens(
        vocab_size=tokenizer.vocab_size,
        pad=tokenizer.pad_id,
        bos=tokenizer.bos_id,
        eos=tokenizer.eos_id,
        cls=tokenizer.cls_id,
        sep=tokenizer.sep_id,
        mask=tokenizer.mask_id,
        sentinels=tokenizer.sentinels,
        decoder_start=architecture.tokens.decoder_start,
        reserved=tuple(sorted(tokenizer.special_ids)),
    )
