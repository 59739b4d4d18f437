"""Training WordPiece and byte-level BPE vocabularies, the same for the same text every time.

Both grow a vocabulary by merging the most frequent neighbouring pair of symbols, again and again (Sennrich et al.
2016, section 3.2). They differ in the symbols to begin with. Byte-level BPE has the 256 bytes, so nothing is ever
unknown. WordPiece has the characters, and tells one that begins a word (`c`) from one within (`##c`).

The tokenizers library can train both. But it numbers the `##` symbols in the order in which a hash table with a
random seed gives them, and breaks ties between pairs by those numbers, so its WordPiece differs from run to run.
Here each symbol, `c` or `##c`, becomes one code point of a range of its own, numbered in sorted order. The library
then trains plain BPE on the rewritten words, which it does in a fixed order, and the result is written back.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from lathe.errors import RequestError

if TYPE_CHECKING:
    import tokenizers

CONTINUES = "##"
# Where the rewritten symbols begin: past the surrogates, and with room for a million.
_FIRST_SYMBOL = 0x10000
# A frequent word is fed to the library in portions, so that none becomes one huge line.
_PORTION = 1000

Symbol = tuple[str, bool]  # a character, and whether it continues a word


def train_wordpiece(
    words: Counter[str], vocab_size: int, control: tuple[str, ...], character_coverage: float
) -> list[str]:
    """A WordPiece vocabulary, in the order of the ids.

    Args:
        words: how often each word occurs, normalised and cut as the tokenizer will.
        vocab_size: of the result, `control` included.
        control: special tokens, which take the first ids.
        character_coverage: the share of the text whose characters the vocabulary must hold. A word with a rarer
            character comes out as unknown.

    Raises:
        RequestError: `vocab_size` is too small for the characters, or more than the corpus can fill.
    """
    import tokenizers
    from tokenizers import models, pre_tokenizers, trainers

    kept = _covering(words, character_coverage)
    usable = {word: count for word, count in sorted(words.items()) if kept.issuperset(word)}
    symbols = sorted({symbol for word in usable for symbol in _symbols(word)})
    least = len(control) + len(symbols)
    if least > vocab_size:
        raise RequestError(
            f"vocab_size={vocab_size} is too small: {len(control)} special tokens and {len(symbols)} characters "
            f"(at the start of a word and within one) take {least}; ask for that at least, or lower character_coverage"
        )
    code = {symbol: chr(_FIRST_SYMBOL + number) for number, symbol in enumerate(symbols)}
    engine = tokenizers.Tokenizer(models.BPE())
    engine.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(control), initial_alphabet=list(code.values()), show_progress=False
    )
    engine.train_from_iterator(in_portions(_coded(usable, code)), trainer)
    ids = engine.get_vocab()
    back = {coded: symbol for symbol, coded in code.items()}
    tokens = [*control, *(_plain(token, back) for token in sorted(ids, key=ids.__getitem__))]
    if len(tokens) < vocab_size:
        raise too_large(vocab_size, len(tokens))
    return tokens


def train_bytes(
    lines: Iterable[str], vocab_size: int, control: tuple[str, ...]
) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A byte-level BPE vocabulary and its merges.

    Raises:
        RequestError: `vocab_size` is too small for the bytes, or more than the corpus can fill.
    """
    import json

    import tokenizers
    from tokenizers import models, pre_tokenizers, trainers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    least = len(control) + len(alphabet)
    if least > vocab_size:
        raise RequestError(
            f"vocab_size={vocab_size} is too small: {len(control)} special tokens and {len(alphabet)} bytes take "
            f"{least}; ask for that at least"
        )
    engine = tokenizers.Tokenizer(models.BPE())
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=list(control), initial_alphabet=alphabet, show_progress=False
    )
    engine.train_from_iterator(lines, trainer)
    model = json.loads(engine.to_str())["model"]
    if len(model["vocab"]) < vocab_size:
        raise too_large(vocab_size, len(model["vocab"]))
    return model["vocab"], [(left, right) for left, right in model["merges"]]


def count_words(lines: Iterable[str], engine: tokenizers.Tokenizer) -> Counter[str]:
    """How often each word occurs, normalised and cut as the tokenizer will."""
    normalise: Callable[[str], str] = engine.normalizer.normalize_str if engine.normalizer else str
    words: Counter[str] = Counter()
    for line in lines:
        text = normalise(line)
        cut = engine.pre_tokenizer.pre_tokenize_str(text) if engine.pre_tokenizer else [(text, (0, len(text)))]
        words.update(word for word, _ in cut if word)
    return words


def too_large(vocab_size: int, largest: int) -> RequestError:
    """The error for a vocabulary that the corpus cannot fill."""
    return RequestError(
        f"vocab_size={vocab_size} is more than this corpus can fill: the largest that fits is {largest}; ask for that "
        "or less, or give more text"
    )


def _covering(words: Counter[str], character_coverage: float) -> set[str]:
    """The most frequent characters that make up this share of the text."""
    counts: Counter[str] = Counter()
    for word, count in words.items():
        for character in word:
            counts[character] += count
    wanted = character_coverage * counts.total()
    kept: set[str] = set()
    covered = 0
    for character, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        if covered >= wanted:
            break
        kept.add(character)
        covered += count
    return kept


def _symbols(word: str) -> Iterator[Symbol]:
    return ((character, place > 0) for place, character in enumerate(word))


def in_portions(words: Mapping[str, int]) -> Iterator[str]:
    """Lines that hold each word as often as its count says, which is how the library's trainer is told a count."""
    for word, count in words.items():
        while count > 0:
            yield " ".join([word] * min(count, _PORTION))
            count -= _PORTION


def _coded(words: dict[str, int], code: dict[Symbol, str]) -> dict[str, int]:
    return {"".join(code[symbol] for symbol in _symbols(word)): count for word, count in words.items()}


def _plain(token: str, back: dict[str, Symbol]) -> str:
    symbols = [back[coded] for coded in token]
    text = "".join(character for character, _ in symbols)
    return CONTINUES + text if symbols[0][1] else text
