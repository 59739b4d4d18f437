"""Learning new pieces for a tokenizer that is there already, from text.

The text is cut into pieces by the tokenizer as it is. Then the most frequent pair of neighbours becomes a piece,
again and again (Sennrich et al. 2016, section 3.2), with today's pieces in the place of characters. So each new piece
is one that the text needs most, and it is made of two that exist, which `lathe.text.grow` relies on. A character
that no piece holds is a new piece too, and those come first: without them its words stay unknown, or bytes.

No piece crosses the borders of words, as the tokenizer cuts them, nor holds letters together with anything else.

The library's trainer does the counting, on words whose pieces have been written as one code point each, as in
`lathe.text.wordpiece`.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any

from lathe.errors import RequestError
from lathe.text.conventions import SPACE
from lathe.text.corpus import Corpus
from lathe.text.cut import BYTE
from lathe.text.grow import grow, longest_pieces
from lathe.text.rewritten import Rewritten, engine_document, model_ids
from lathe.text.tokenizer import Tokenizer
from lathe.text.use import iter_texts
from lathe.text.wordpiece import count_words, in_portions

_FIRST_SYMBOL = 0x10000  # past the surrogates, with room for a million pieces
_SPACED = re.compile(f"{SPACE}*[^{SPACE}]+|{SPACE}+")
# Of the characters that are not in the vocabulary, those that make up this share of their text become pieces.
_COVERAGE = 0.9995
# Some of what is learnt is there already under another spelling.
_SPARE = 1.1


def learn(tokenizer: Tokenizer, corpus: Corpus, count: int) -> Rewritten:
    """The tokenizer with the `count` new pieces that a text needs most.

    Raises:
        RequestError: an empty corpus, or one that cannot give as many (says how many it can).
    """
    words = count_words(iter_texts(corpus), tokenizer.engine)
    speller = _Speller(tokenizer)
    runs: Counter[tuple[str, ...]] = Counter()
    for word, times in words.items():
        for run in speller.runs(word):
            runs[run] += times
    new = _new_characters(runs, speller.known)
    most = [*new, *_merged(_without_rare(runs, speller.known, set(new)), speller, int(count * _SPARE) + 16)]
    found = [piece for piece in dict.fromkeys(most) if piece not in speller.known]
    made = grow(tokenizer, found, count)
    learnt = len(made.rows) - tokenizer.vocab_size
    if learnt < count:
        raise RequestError(
            f"vocab_size={tokenizer.vocab_size + count:,}: this text has new pieces for "
            f"{tokenizer.vocab_size + learnt:,} at most; ask for that or less, or give more text"
        )
    return made


class _Speller:
    """Cuts words into today's pieces, and characters that no piece holds."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._model: dict[str, Any] = engine_document(tokenizer)["model"]
        self._is_bytes = tokenizer.spells_bytes
        self.known = model_ids(self._model) | tokenizer.vocabulary
        self.prefix = self._model["continuing_subword_prefix"] if self._model["type"] == "WordPiece" else ""

    @cached_property
    def _special(self) -> set[str]:
        return {token.content for token in self._tokenizer.engine.get_added_tokens_decoder().values()}

    def runs(self, word: str) -> Iterator[tuple[str, ...]]:
        """The word's pieces, in the stretches within which pieces may be joined."""
        for part in [word] if self._is_bytes or self.prefix else _SPACED.findall(word):
            run: list[str] = []
            for piece in self._pieces(part):
                if run and not self._may_join(run[-1], piece):
                    yield tuple(run)
                    run = []
                run.append(piece)
            if run:
                yield tuple(run)

    def joined(self, pieces: Sequence[str]) -> str:
        """The piece that these make together."""
        first, *others = pieces
        return first + "".join(piece.removeprefix(self.prefix) for piece in others)

    def _pieces(self, word: str) -> list[str]:
        if self.prefix:
            return longest_pieces(word, self.known, self.prefix)
        if self._model["type"] == "BPE":
            # A character that is not in the vocabulary joins nothing.
            strange = sorted({character for character in word if character not in self.known})
            parts = re.split(f"([{re.escape(''.join(strange))}])", word) if strange else [word]
            found: list[str] = []
            for part in filter(None, parts):
                tokens = [] if part in strange else self._tokenizer.engine.model.tokenize(part)
                found += [part] if part in strange else [token.value for token in tokens]
            return found
        return list(self._read(word))

    def _read(self, word: str) -> Iterator[str]:
        """A word cut by a unigram model, with its characters where that has bytes or nothing for them."""
        spelt = bytearray()
        for token in self._tokenizer.engine.model.tokenize(word):
            if BYTE.fullmatch(token.value) and token.value not in word:
                spelt.append(int(token.value[3:5], 16))
                continue
            yield from spelt.decode("utf-8")
            spelt.clear()
            yield from [token.value] if token.value in self.known else token.value
        yield from spelt.decode("utf-8")

    def _may_join(self, left: str, right: str) -> bool:
        if left in self._special or right in self._special:
            return False
        if self._is_bytes:
            return True  # words were cut where letters end
        one, other = (piece.removeprefix(self.prefix).lstrip(SPACE) for piece in (left, right))
        return not one or one.isalpha() == other.isalpha()


def _new_characters(runs: Counter[tuple[str, ...]], known: dict[str, int]) -> list[str]:
    """The characters to take up, the most frequent first."""
    counts: Counter[str] = Counter()
    for run, times in runs.items():
        for piece in run:
            if piece not in known:
                counts[piece] += times
    wanted, covered, taken = _COVERAGE * counts.total(), 0, []
    for piece, times in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        if covered >= wanted:
            break
        taken.append(piece)
        covered += times
    return taken


def _without_rare(
    runs: Counter[tuple[str, ...]], known: dict[str, int], new: set[str]
) -> Iterator[tuple[tuple[str, ...], int]]:
    """The runs, cut at the characters that stay unknown."""
    for run, times in runs.items():
        part: list[str] = []
        for piece in run:
            if piece in known or piece in new:
                part.append(piece)
                continue
            if len(part) > 1:
                yield tuple(part), times
            part = []
        if len(part) > 1:
            yield tuple(part), times


def _merged(runs: Iterable[tuple[tuple[str, ...], int]], speller: _Speller, count: int) -> list[str]:
    """The pieces that frequent neighbours make, the most frequent first."""
    import tokenizers
    from tokenizers import models, pre_tokenizers, trainers

    counts: Counter[tuple[str, ...]] = Counter()
    for run, times in runs:
        counts[run] += times
    if not counts:
        return []
    symbols = sorted({piece for run in counts for piece in run})
    code = {piece: chr(_FIRST_SYMBOL + number) for number, piece in enumerate(symbols)}
    engine = tokenizers.Tokenizer(models.BPE())
    engine.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.BpeTrainer(
        vocab_size=len(symbols) + count, initial_alphabet=list(code.values()), min_frequency=2, show_progress=False
    )
    coded = {"".join(code[piece] for piece in run): times for run, times in sorted(counts.items())}
    engine.train_from_iterator(in_portions(coded), trainer)
    back = {coded: piece for piece, coded in code.items()}
    merges = json.loads(engine.to_str())["model"]["merges"]
    return [speller.joined([back[each] for each in left + right]) for left, right in merges]
