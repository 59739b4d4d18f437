"""A tokenizer with fewer pieces, which reads whatever needs none of the others as it did before.

Why the cut of a text into pieces stays the same, as long as all of its pieces are kept:

- *Unigram* takes the best-scored way through a word. The best way is still there, and no other has become better.
  An unknown character costs the lowest score less ten, so the piece with the lowest score is kept as well.
- *BPE* joins the pair whose merge stands first. A kept piece keeps the merges that it comes about by, with the
  pieces on the way (`lathe.text.bpe`), and in their order; so at every step the same merge stands first.
- *WordPiece* takes the longest piece that fits. The longest is still there.

Special tokens, sentinels, added tokens, the unknown token, the bare space and the pieces that spell single bytes are
always kept. A word that WordPiece could not spell before, and so was `[UNK]`, stays so unless shorter pieces happen to
spell it now. That takes a character which some longer piece continues a word with, and which has no such piece (`##c`)
of its own.

Ids are numbered anew without gaps, in their old order.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lathe.errors import RequestError
from lathe.text import files as names
from lathe.text.bpe import Parts
from lathe.text.conventions import SPACE
from lathe.text.rewritten import Rewritten, engine_document, model_ids, remade, require_tokens
from lathe.text.spiece import Kind, Piece, parse, with_pieces
from lathe.text.tokenizer import Tokenizer

BYTE = re.compile("<0x[0-9A-F]{2}>")


class Pieces:
    """A tokenizer's pieces, and what has to be kept of them, `reserved` ids among it."""

    def __init__(self, tokenizer: Tokenizer, reserved: Iterable[int] = ()) -> None:
        self.tokenizer = tokenizer
        document = engine_document(tokenizer)
        self.model: dict[str, Any] = document["model"]
        self._parts = Parts(self.model) if self.model["type"] == "BPE" else None
        self.texts = {number: token for token, number in tokenizer.vocabulary.items()}
        self.added = frozenset(tokenizer.engine.get_added_tokens_decoder())
        self.required = self.with_parts([*self._required(), *reserved])

    def with_parts(self, ids: Iterable[int]) -> frozenset[int]:
        """These ids and those that their pieces are merged from."""
        found = set(ids)
        if self._parts is not None:
            for number in list(found - self.added):
                found |= self._parts.of(self.texts[number])
        return frozenset(found)

    def most_used(self, counts: Mapping[int, int], size: int | None) -> frozenset[int]:
        """The ids to keep of a vocabulary of which a text uses so much.

        The single characters of the text count as often as they stand in it, within longer pieces too: whatever
        else is dropped falls back to them.

        Args:
            counts: how often the text uses each id.
            size: how many ids to keep. None keeps every one that the text uses, and its characters. Where the text
                uses fewer, those that come first in the vocabulary fill it up.

        Raises:
            RequestError: `size` is smaller than what always has to be kept (says how much that is), or larger than
                the vocabulary.
        """
        use = self._with_characters(counts)
        if size is None:
            return self.with_parts([*self.required, *(number for number, count in use.items() if count)])
        if size < len(self.required):
            raise RequestError(
                f"vocab_size={size:,} is too small: special tokens, sentinels and what spells single bytes take "
                f"{len(self.required):,}; ask for that at least"
            )
        if size > len(self.texts):
            raise RequestError(f"vocab_size={size:,}: the tokenizer has {len(self.texts):,} tokens to keep")
        kept = set(self.required)
        waiting = sorted(self.texts.keys() - kept, key=lambda number: (-use.get(number, 0), number))
        # A piece whose parts do not fit any more is passed over; the last of its parts may come later.
        while len(kept) < size:
            for number in waiting:
                needed = self.with_parts([number]) - kept
                if len(kept) + len(needed) <= size:
                    kept |= needed
            waiting = [number for number in waiting if number not in kept]
        return frozenset(kept)

    def _with_characters(self, counts: Mapping[int, int]) -> Counter[int]:
        use: Counter[int] = Counter()
        ids = model_ids(self.model)
        for number, count in counts.items():
            token = self.texts.get(number)
            if token is None or number in self.added:
                continue
            characters = _characters(token, self.model)
            for character in characters if len(characters) > 1 else []:
                if character in ids:
                    use[ids[character]] += count
            use[number] += count
        return use

    def _required(self) -> set[int]:
        ids = model_ids(self.model)
        found = set(self.tokenizer.special_ids | self.added)
        # A space that was spelt in bytes would not come back as one.
        found |= {number for token, number in ids.items() if BYTE.fullmatch(token) or token == SPACE}
        for pieces in sentencepieces(self.tokenizer.files).values():
            found |= {ids[piece.text] for piece in pieces if piece.kind != Kind.NORMAL and piece.text in ids}
        if self.tokenizer.spells_bytes:
            from tokenizers import pre_tokenizers

            found |= {ids[character] for character in pre_tokenizers.ByteLevel.alphabet() if character in ids}
        vocab = self.model["vocab"]
        if isinstance(vocab, list):
            found.add(self.model["unk_id"])
            spoken = [n for n, (token, _) in enumerate(vocab) if not BYTE.fullmatch(token) and n not in found]
            for group in (spoken, range(len(vocab))):
                found.add(min(group, key=lambda n: float(vocab[n][1]), default=self.model["unk_id"]))
        elif self.model.get("unk_token") in ids:
            found.add(ids[self.model["unk_token"]])
        return {number for number in found if number is not None and number in self.texts}


def cut(tokenizer: Tokenizer, ids: Iterable[int]) -> Rewritten:
    """The tokenizer with these ids, those that always have to be kept, and the parts of both.

    Raises:
        RequestError: an id that is outside the vocabulary.
        LatheError: files that cannot be rewritten, because the library would number their tokens otherwise.
    """
    return cut_pieces(Pieces(tokenizer), ids)


def cut_pieces(pieces: Pieces, ids: Iterable[int]) -> Rewritten:
    """As `cut`, for a tokenizer that was looked at already."""
    wanted = set(ids)
    if strange := sorted(wanted - pieces.texts.keys()):
        raise RequestError(
            f"id {strange[0]} is outside the vocabulary of {pieces.tokenizer.vocab_size:,} tokens; give ids that the "
            "tokenizer has"
        )
    kept = sorted(pieces.with_parts(wanted | pieces.required))
    new = {old: number for number, old in enumerate(kept)}
    texts = {pieces.texts[old]: number for old, number in new.items()}
    made = remade(pieces.tokenizer, cut_files(pieces.tokenizer, new, texts))
    require_tokens(made, [pieces.texts[old] for old in kept])
    return Rewritten(made, tuple((old,) for old in kept), len(kept))


def cut_files(tokenizer: Tokenizer, new: Mapping[int, int], texts: Mapping[str, int]) -> dict[str, bytes]:
    """The files of a tokenizer without the pieces that are gone.

    Args:
        new: the kept ids, old to new.
        texts: the kept tokens with their new ids.
    """
    files = dict(tokenizer.files)
    if names.TOKENIZER in files:
        files[names.TOKENIZER] = names.to_json(_document(names.read_json(files, names.TOKENIZER), new, texts))
    skip = tokenizer.settings.rules.skip if tokenizer.settings.rules else 0
    for name, pieces in sentencepieces(files).items():
        files[name] = _sentencepiece(files[name], name, pieces, texts, skip)
    if names.VOCAB_TEXT in files:
        lines = files[names.VOCAB_TEXT].decode("utf-8").replace("\r\n", "\n").removesuffix("\n").split("\n")
        last = {line: number for number, line in enumerate(lines)}  # of equal lines the last is the token
        kept = [line for number, line in enumerate(lines) if line in texts and last[line] == number]
        files[names.VOCAB_TEXT] = "".join(f"{line}\n" for line in kept).encode("utf-8")
    if names.VOCAB_JSON in files:
        vocab = names.read_json(files, names.VOCAB_JSON)
        files[names.VOCAB_JSON] = names.to_json(_kept_vocab(vocab, texts))
    if names.MERGES in files:
        files[names.MERGES] = _merge_lines(files[names.MERGES].decode("utf-8"), texts)
    return files | _settings(files, new)


def _settings(files: Mapping[str, bytes], new: Mapping[int, int]) -> dict[str, bytes]:
    """The settings' files that hold ids."""
    out: dict[str, bytes] = {}
    config = names.read_json(files, names.CONFIG)
    listed = config.get("added_tokens_decoder")
    if isinstance(listed, dict):
        renumbered = {str(new[int(old)]): token for old, token in listed.items() if int(old) in new}
        out[names.CONFIG] = names.to_json({**config, "added_tokens_decoder": renumbered})
    if names.ADDED_TOKENS in files:
        added = names.read_json(files, names.ADDED_TOKENS)
        out[names.ADDED_TOKENS] = names.to_json({token: new[old] for token, old in added.items() if old in new})
    return out


def _document(document: dict[str, Any], new: Mapping[int, int], texts: Mapping[str, int]) -> dict[str, Any]:
    """A tokenizer.json without the pieces that are gone."""
    model = dict(document["model"])
    vocab = model["vocab"]
    if isinstance(vocab, list):
        model["vocab"] = [entry for number, entry in enumerate(vocab) if number in new]
        if model.get("unk_id") is not None:
            model["unk_id"] = new[model["unk_id"]]
    else:
        model["vocab"] = _kept_vocab(vocab, texts)
    if "merges" in model:
        prefix = model.get("continuing_subword_prefix") or ""
        model["merges"] = [merge for merge in model["merges"] if _is_kept(merge, prefix, texts)]
    added = [{**token, "id": new[token["id"]]} for token in document.get("added_tokens", [])]
    changed = {"model": model, "added_tokens": added}
    if document.get("padding"):
        changed["padding"] = {**document["padding"], "pad_id": new[document["padding"]["pad_id"]]}
    return {**document, **changed, "post_processor": _renumbered(document.get("post_processor"), new)}


def _renumbered(part: Any, new: Mapping[int, int]) -> Any:
    """A post-processor with new ids: `ids` of a template, or the pair of token and id of BERT's and RoBERTa's."""
    if isinstance(part, list):
        return [_renumbered(each, new) for each in part]
    if not isinstance(part, dict):
        return part
    out = {}
    for key, value in part.items():
        if key == "ids":
            out[key] = [new[number] for number in value]
        elif key in ("sep", "cls") and isinstance(value, list | tuple):
            out[key] = [value[0], new[value[1]]]
        else:
            out[key] = _renumbered(value, new)
    return out


def _kept_vocab(vocab: Mapping[str, int], texts: Mapping[str, int]) -> dict[str, int]:
    return {token: texts[token] for token in vocab if token in texts}


def _is_kept(merge: Any, prefix: str, texts: Mapping[str, int]) -> bool:
    left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
    return left in texts and right in texts and left + right.removeprefix(prefix) in texts


def _merge_lines(text: str, texts: Mapping[str, int]) -> bytes:
    lines = text.replace("\r\n", "\n").removesuffix("\n").split("\n")
    is_version = [number == 0 and line.startswith("#version") for number, line in enumerate(lines)]
    kept = [
        line
        for line, version in zip(lines, is_version, strict=True)
        if version or (" " in line and _is_kept(line, "", texts))
    ]
    return "".join(f"{line}\n" for line in kept).encode("utf-8")


def sentencepieces(files: Mapping[str, bytes]) -> dict[str, tuple[Piece, ...]]:
    """The pieces of each SentencePiece file; beside a tokenizer.json one of that name may be another program's."""
    found = {}
    for name in names.PIECES:
        if name in files:
            try:
                found[name] = parse(files[name], name).pieces
            except RequestError:
                if names.TOKENIZER not in files:
                    raise
    return found


def _sentencepiece(data: bytes, name: str, pieces: Sequence[Piece], texts: Mapping[str, int], skip: int) -> bytes:
    """A SentencePiece file without the pieces that are gone; what its class passes over at its start stays."""
    kept = [
        number
        for number, piece in enumerate(pieces)
        if number < skip or piece.kind != Kind.NORMAL or piece.text in texts
    ]
    places = {old: number for number, old in enumerate(kept)}
    return with_pieces(data, name, [pieces[number] for number in kept], places)


def _characters(token: str, model: Mapping[str, Any]) -> list[str]:
    """A token as the single characters that could spell it."""
    prefix = (model.get("continuing_subword_prefix") or "") if model["type"] == "WordPiece" else ""
    bare = token.removeprefix(prefix)
    if not prefix:
        return list(bare)
    if bare != token:
        return [prefix + character for character in bare]
    return [bare[:1], *(prefix + character for character in bare[1:])]
