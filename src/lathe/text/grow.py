"""A tokenizer with new pieces, which reads what holds none of them as it did before.

New pieces take the ids after the last, so every old id stays. How each kind of tokenizer comes to use them:

- *Unigram*: the score of a new piece is that of the pieces which spelt it, and a little more; so it is taken where
  they stood next to each other, the longer piece before the shorter, and hardly ever elsewhere.
- *BPE*: the merges that make a new piece follow all old ones. Where a word came out as three pieces or more, two of
  them have to be joined first, which makes further pieces on the way; they count.
- *WordPiece* takes the longest piece that fits, so the new piece is taken wherever it fits. What is left of the word
  can then begin elsewhere than before. For this a character that so far only stands inside pieces which continue a
  word gets such a piece (`##c`) of its own; no word that could be spelt becomes `[UNK]`.

The result is spelt out in a `tokenizer.json`. The vocabulary file of the family stays beside it where it can hold
the same ids, which it cannot where tokens (sentinels, say) follow its last piece.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from lathe.errors import RequestError
from lathe.text import files as names
from lathe.text.bpe import Parts, spell
from lathe.text.cut import BYTE, sentencepieces
from lathe.text.rewritten import Rewritten, engine_document, merge_pairs, model_ids, remade, require_tokens
from lathe.text.spiece import Kind, Piece, with_pieces
from lathe.text.tokenizer import Tokenizer
from lathe.text.wordpiece import CONTINUES, count_words

# How much better than the pieces that spelt it a new piece of a unigram model is, for each of them after the first.
_BETTER = 0.01


def spelt(tokenizer: Tokenizer, words: Iterable[str]) -> list[str]:
    """Words as the pieces that they would be in a text: normalised, with the space before them where pieces have it.

    A piece that continues a word is written as WordPiece writes it, `##ing`.

    Raises:
        RequestError: two words that are the same piece, a word that the tokenizer cuts in two before it looks for
            pieces, or one that is a piece already.
    """
    model = engine_document(tokenizer)["model"]
    found: dict[str, str] = {}
    for word in words:
        piece = word
        if not (model["type"] == "WordPiece" and word.startswith(CONTINUES)):
            cut = _pieces_of(word, tokenizer)
            if len(cut) != 1:
                raise RequestError(
                    f"the new word {word!r} is {len(cut)} words to this tokenizer, and a piece holds one: give one"
                )
            piece = cut[0]
        if piece in found:
            raise RequestError(
                f"the new words {found[piece]!r} and {word!r} are the same piece {piece!r}: give it once"
            )
        if tokenizer.token_id(piece) is not None:
            raise RequestError(f"the new word {word!r} is a piece of this tokenizer already: leave it out")
        found[piece] = word
    return list(found)


def _pieces_of(word: str, tokenizer: Tokenizer) -> list[str]:
    """A word as it comes out after another one, or alone, where that is more pieces or all of the text is one."""
    if not word.strip():
        return []
    _, *after = count_words([f"a {word.strip()}"], tokenizer.engine).elements()
    return after if len(after) == 1 else list(count_words([word.strip()], tokenizer.engine).elements())


def grow(tokenizer: Tokenizer, pieces: Sequence[str], limit: int | None = None) -> Rewritten:
    """The tokenizer with further pieces.

    Args:
        pieces: new pieces as the vocabulary writes them: `▁new`, `##ing`, `Ġthe`.
        limit: how many ids may be new. A piece that needs more than are left is passed over.

    Raises:
        RequestError: a piece that is there already, or twice in the list.
        LatheError: files that cannot be rewritten.
    """
    document = engine_document(tokenizer)
    known = model_ids(document["model"])
    for piece in pieces:
        if piece in known:
            raise RequestError(f"{piece!r} is a piece of this tokenizer already: leave it out")
    if len(set(pieces)) != len(pieces):
        twice = next(piece for number, piece in enumerate(pieces) if piece in pieces[:number])
        raise RequestError(f"{twice!r} is twice among the new pieces: give it once")
    kind = document["model"]["type"]
    if kind not in _KINDS:
        raise RequestError(f"this tokenizer is a {kind} model: only {', '.join(_KINDS)} take new pieces")
    texts = {number: token for token, number in tokenizer.vocabulary.items()}
    if (gap := next((number for number in range(tokenizer.vocab_size) if number not in texts), None)) is not None:
        raise RequestError(
            f"no token of this tokenizer has the id {gap}, so no others can follow: cut it first, which numbers its "
            "tokens without gaps"
        )
    tokens = [texts[number] for number in range(tokenizer.vocab_size)]
    _take_in(document["model"], tokens)
    spellings = _KINDS[kind](tokenizer, document["model"], tokens, pieces, limit)
    made = remade(tokenizer, _files(tokenizer, document, tokens))
    expected = [*tokens, *spellings]
    require_tokens(made, expected)
    old = tuple((number,) for number in range(len(tokens)))
    return Rewritten(made, (*old, *spellings.values()), len(tokens))


def _take_in(model: dict[str, Any], tokens: Sequence[str]) -> None:
    """Give the vocabulary every token that follows it, so that new pieces can follow those."""
    vocab = model["vocab"]
    if isinstance(vocab, list):
        model["vocab"] = [*vocab, *([token, 0.0] for token in tokens[len(vocab) :])]
    else:
        model["vocab"] = {**vocab, **{token: number for number, token in enumerate(tokens) if token not in vocab}}


# --- each kind of model: put the pieces in, and say which old ids spell them -------------------------------

Spellings = dict[str, tuple[int, ...]]


def _unigram(
    tokenizer: Tokenizer, model: dict[str, Any], tokens: Sequence[str], pieces: Sequence[str], limit: int | None
) -> Spellings:
    vocab = model["vocab"]
    added = tokenizer.engine.get_added_tokens_decoder()
    lowest = min(
        (score for number, (token, score) in enumerate(vocab) if number not in added and not BYTE.fullmatch(token)),
        default=0.0,
    )
    spellings: Spellings = {}
    for piece in pieces[:limit]:
        ids = tuple(token.id for token in tokenizer.engine.model.tokenize(piece))
        score = sum(float(vocab[number][1]) for number in ids) + _BETTER * (len(ids) - 1)
        # Unknown characters and bytes have no score to speak of; nor may a new piece change what they cost.
        is_spoken = not any(number == model["unk_id"] or BYTE.fullmatch(tokens[number]) for number in ids)
        model["vocab"].append([piece, _rounded(max(score, lowest) if is_spoken else lowest)])
        spellings[piece] = ids
    return spellings


def _rounded(score: float) -> float:
    """A score as a SentencePiece file holds it."""
    (rounded,) = struct.unpack("<f", struct.pack("<f", score))
    return float(rounded)


def _wordpiece(
    tokenizer: Tokenizer, model: dict[str, Any], tokens: Sequence[str], pieces: Sequence[str], limit: int | None
) -> Spellings:
    vocab: dict[str, int] = model["vocab"]
    unknown = vocab[model["unk_token"]]
    prefix = model["continuing_subword_prefix"]
    added = {token.content for token in tokenizer.engine.get_added_tokens_decoder().values()}
    inside = {
        character
        for token in vocab
        if token not in added
        for character in (token[len(prefix) :] if token.startswith(prefix) else token[1:])
    }
    wanted = [prefix + character for character in sorted(inside) if prefix + character not in vocab]
    wanted += [piece for piece in pieces if piece not in wanted]
    spellings: Spellings = {}
    for piece in wanted[:limit]:
        parts = longest_pieces(piece, vocab, prefix)
        spellings[piece] = tuple(vocab.get(part, vocab.get(part.removeprefix(prefix), unknown)) for part in parts)
    for piece in spellings:
        vocab[piece] = len(vocab)
    return spellings


def longest_pieces(piece: str, vocab: Mapping[str, int], prefix: str) -> list[str]:
    """A word, or the rest of one that `prefix` begins, cut as WordPiece cuts it; a character that no piece holds
    is a piece of its own."""
    start = len(prefix) if piece.startswith(prefix) else 0
    before, word = piece[:start], piece[start:]
    found, at = [], 0
    while at < len(word):
        mark = before if at == 0 else prefix
        end = next((end for end in range(len(word), at, -1) if mark + word[at:end] in vocab), at + 1)
        found.append(mark + word[at:end])
        at = end
    return found


def _bpe(
    tokenizer: Tokenizer, model: dict[str, Any], tokens: Sequence[str], pieces: Sequence[str], limit: int | None
) -> Spellings:
    vocab: dict[str, int] = model["vocab"]
    added = {token.content for token in tokenizer.engine.get_added_tokens_decoder().values()}
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise RequestError("this tokenizer marks the ends of words in its pieces, and new pieces cannot follow that")
    ranks = dict(Parts(model).ranks)
    spellings: Spellings = {}

    def ids_of(piece: str) -> tuple[int, ...]:
        return tuple(token.id for token in tokenizer.engine.model.tokenize(piece))

    for piece in pieces:
        needed = _on_the_way(piece, vocab, ranks)
        if needed is None:
            if limit is None:
                raise RequestError(
                    f"{piece!r} cannot be merged without old pieces being made in a new way: leave it out"
                )
            continue
        if limit is not None and len(spellings) + len(needed) > limit:
            continue
        for each in needed:
            spellings[each] = ids_of(each)
            vocab[each] = len(vocab)
            for pair in _ways(each, vocab, added):
                ranks.setdefault(pair, len(ranks))
    # Every way to make a new piece, in the order in which SentencePiece's file implies them.
    made = [pair for each in spellings for pair in _ways(each, vocab, added)]
    model["merges"] = [*merge_pairs(model), *made]
    return spellings


def _ways(piece: str, vocab: Mapping[str, int], added: set[str]) -> list[tuple[str, str]]:
    """Every way to join two pieces to this one."""
    pairs = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
    return [pair for pair in pairs if pair[0] in vocab and pair[1] in vocab and not added.intersection(pair)]


def _on_the_way(piece: str, vocab: Mapping[str, int], ranks: Mapping[tuple[str, str], int]) -> list[str] | None:
    """The new pieces that have to be there to make `piece`, itself last.

    None where two pieces would have to be joined to an old one that they do not make so far.
    """
    needed = [character for character in dict.fromkeys(piece) if character not in vocab]
    *_, current = spell(list(piece), ranks)
    while len(current) > 1:
        at = next((at for at, pair in enumerate(pairwise(current)) if "".join(pair) not in vocab), None)
        if at is None:
            return None
        current[at : at + 2] = [current[at] + current[at + 1]]
        needed.append(current[at])
    return list(dict.fromkeys(needed))


_KINDS = {"Unigram": _unigram, "BPE": _bpe, "WordPiece": _wordpiece}


# --- the files -----------------------------------------------------------------------------------------------


def _files(tokenizer: Tokenizer, document: dict[str, Any], tokens: Sequence[str]) -> dict[str, bytes]:
    """The files of the grown tokenizer: tokenizer.json, and each vocabulary file that can hold the same ids."""
    files = dict(tokenizer.files)
    vocab = document["model"]["vocab"]
    new = [entry[0] for entry in vocab[len(tokens) :]] if isinstance(vocab, list) else list(vocab)[len(tokens) :]
    for name, pieces in sentencepieces(files).items():
        if [piece.text for piece in pieces] == list(tokens):
            # In a BPE model the score is the merge's rank, and theirs come after all others.
            last = min(piece.score for piece in pieces)
            ranks = {piece: last - 1.0 - number for number, piece in enumerate(new)}
            scores = dict(vocab) if isinstance(vocab, list) else ranks
            grown = [*pieces, *(Piece(piece, scores[piece], Kind.NORMAL) for piece in new)]
            files[name] = with_pieces(files[name], name, grown, {number: number for number in range(len(pieces))})
        else:
            del files[name]
    if names.VOCAB_TEXT in files:
        lines = files[names.VOCAB_TEXT].decode("utf-8").replace("\r\n", "\n").removesuffix("\n").split("\n")
        if lines == list(tokens):
            files[names.VOCAB_TEXT] = "".join(f"{line}\n" for line in [*tokens, *new]).encode("utf-8")
        else:
            del files[names.VOCAB_TEXT]
    if names.VOCAB_JSON in files:
        files[names.VOCAB_JSON] = names.to_json(dict(sorted(vocab.items(), key=lambda item: item[1])))
    if names.MERGES in files:
        rows = ["#version: 0.2", *(" ".join(pair) for pair in document["model"]["merges"])]
        files[names.MERGES] = "".join(f"{row}\n" for row in rows).encode("utf-8")
    document["added_tokens"] = sorted(document["added_tokens"], key=lambda token: int(token["id"]))
    return {**files, names.TOKENIZER: names.to_json(document)}
