"""A tokenizer inside a GGUF file: the pieces, what each of them is for, and how llama.cpp is to use them.

llama.cpp has a tokenizer of its own for each algorithm, with a few switches. What it does to a text before the pieces
are looked up is written in C++, so a tokenizer fits if its normaliser and its way of cutting words are among what is
there; one that does more is refused. Four algorithms, by llama.cpp's names:

- `t5`: unigram (Kudo 2018). The file holds SentencePiece's compiled table of normalisation. Characters that no piece
  holds are unknown, where SentencePiece may spell them in bytes.
- `llama`: BPE on characters, which starts from the visible space and knows no normalisation. A piece's score is minus
  the rank of its merge.
- `gpt2`: BPE on bytes. How a text is cut into words is a regular expression that goes by a name (`tokenizer.ggml.pre`).
- `bert`: WordPiece. Pieces that begin a word begin with the visible space, and those that go on lose their `##`.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lathe.errors import RequestError
from lathe.text.conventions import SPACE
from lathe.text.tokenizer import Tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # of gguf's TokenType

_GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
# How words are cut for byte-level BPE, and what llama.cpp calls it.
_WORDS = {_GPT2_WORDS: "gpt-2", _QWEN_WORDS: "qwen2", _LLAMA3_WORDS: "llama-bpe"}

_LOWEST = -1e9  # the score of a piece that no merge makes


@dataclass(frozen=True)
class Vocabulary:
    """The keys that a GGUF file has for a tokenizer, and what its user has to know."""

    keys: Mapping[str, Any]
    notes: tuple[str, ...] = ()


def vocabulary(tokenizer: Tokenizer, rows: int, ends: Sequence[int] = ()) -> Vocabulary:
    """A tokenizer as GGUF's keys.

    Args:
        rows: how many rows the token table has; those without a piece get an unused one.
        ends: the ids at which the model ends a text; llama.cpp keeps two.

    Raises:
        RequestError: a tokenizer that does what llama.cpp's of that kind does not.
    """
    document = json.loads(tokenizer.engine.to_str())
    model = document["model"]
    if tokenizer.vocab_size > rows:
        raise RequestError(f"the tokenizer has {tokenizer.vocab_size} tokens and the model's table {rows} rows")
    byte_level = model["type"] == "BPE" and tokenizer.spells_bytes
    kinds = {"Unigram": _unigram, "WordPiece": _wordpiece, "BPE": _bytes if byte_level else _characters}
    if model["type"] not in kinds:
        raise RequestError(_refused(f"its algorithm is {model['type']}"))
    return _with_pieces(kinds[model["type"]](document), document, tokenizer, rows, ends)


def without(rows: int) -> Vocabulary:
    """The keys of a file without a tokenizer: llama.cpp then takes ids alone."""
    return Vocabulary({"tokenizer.ggml.model": "none"}, ("the model has no tokenizer: llama.cpp takes its ids alone",))


@dataclass(frozen=True)
class _Algorithm:
    """What one algorithm adds: its keys, a score for each piece, and how a piece is written."""

    keys: Mapping[str, Any]
    scores: Mapping[str, float] | None = None
    phantom: bool = False
    notes: tuple[str, ...] = ()


def _with_pieces(
    algorithm: _Algorithm, document: Mapping[str, Any], tokenizer: Tokenizer, rows: int, ends: Sequence[int]
) -> Vocabulary:
    added = {token["id"]: token for token in document["added_tokens"]}
    pieces, types = [f"[PAD{row}]" for row in range(rows)], [UNUSED] * rows
    scores = [_LOWEST] * rows
    for piece, number in tokenizer.vocabulary.items():
        types[number] = _type(piece, number, added.get(number), tokenizer)
        scores[number] = (algorithm.scores or {}).get(piece, 0.0 if number in added else _LOWEST)
        word = algorithm.phantom and types[number] not in (CONTROL, UNKNOWN)
        pieces[number] = piece.removeprefix("##") if word and piece.startswith("##") else SPACE * word + piece
    around = _around(tokenizer)
    keys: dict[str, Any] = {
        "tokenizer.ggml.pre": "default",
        **algorithm.keys,
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.add_bos_token": bool(around[0]),
        f"tokenizer.ggml.add_{'sep' if algorithm.phantom else 'eos'}_token": bool(around[1]),
        **_special_ids(tokenizer, around, ends),
    }
    if algorithm.scores is not None:
        keys["tokenizer.ggml.scores"] = scores
    if "default" in tokenizer.chat_templates:
        keys["tokenizer.chat_template"] = tokenizer.chat_templates["default"]
    return Vocabulary(keys, algorithm.notes)


def _type(piece: str, number: int, added: Mapping[str, Any] | None, tokenizer: Tokenizer) -> int:
    if number == tokenizer.unk_id and not tokenizer.spells_bytes:
        return UNKNOWN
    if added is not None:
        return CONTROL if added["special"] else USER_DEFINED
    is_byte = len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">")
    return BYTE if is_byte else NORMAL


def _around(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """What the tokenizer sets before and after a text; llama.cpp sets one token, or none."""
    plain, whole = (tokenizer.encode("a", add_special_tokens=special) for special in (False, True))
    places = [place for place in range(len(whole)) if whole[place : place + len(plain)] == plain]
    if not places:
        raise RequestError(_refused("it changes a text's own tokens where it sets some around it"))
    before, after = whole[: places[0]], whole[places[0] + len(plain) :]
    if max(len(before), len(after)) > 1:
        raise RequestError(_refused("it sets more than one token before or after a text"))
    return before, after


def _special_ids(tokenizer: Tokenizer, around: tuple[list[int], list[int]], ends: Sequence[int]) -> dict[str, int]:
    before, after = around
    end = ends[0] if ends else tokenizer.eos_id
    ids = {
        "bos": before[0] if before else tokenizer.bos_id,
        "eos": after[0] if after and tokenizer.sep_id is None else end,
        "eot": ends[1] if len(ends) > 1 else None,
        "unknown": tokenizer.unk_id,
        "seperator": after[0] if after and tokenizer.sep_id is not None else tokenizer.sep_id,  # as GGUF spells it
        "padding": tokenizer.pad_id,
        "mask": tokenizer.mask_id,
    }
    return {f"tokenizer.ggml.{role}_token_id": number for role, number in ids.items() if number is not None}


# --- the four algorithms -----------------------------------------------------------------------------------


def _unigram(document: Mapping[str, Any]) -> _Algorithm:
    model = document["model"]
    cuts = _types(document["pre_tokenizer"])
    steps = _steps(document["normalizer"])
    charsmap = b""
    for step in steps:
        if step["type"] == "Precompiled":
            charsmap = base64.b64decode(step["precompiled_charsmap"])
        elif not _is_visible_space(step):
            raise RequestError(_refused(f"its normaliser has {step['type']}, which llama.cpp's unigram has not"))
    if not set(cuts) <= {"WhitespaceSplit", "Metaspace"}:
        raise RequestError(_refused(f"it cuts words with {' and '.join(cuts)}"))
    keys: dict[str, Any] = {
        "tokenizer.ggml.model": "t5",
        "tokenizer.ggml.add_space_prefix": _prepends(document),
        "tokenizer.ggml.remove_extra_whitespaces": "WhitespaceSplit" in cuts,
    }
    if charsmap:
        keys["tokenizer.ggml.precompiled_charsmap"] = charsmap
    fallback = ("a character that no piece holds is unknown in llama.cpp, and spelt in bytes here",)
    return _Algorithm(keys, dict(model["vocab"]), notes=fallback if model["byte_fallback"] else ())


def _characters(document: Mapping[str, Any]) -> _Algorithm:
    for step in _steps(document["normalizer"]):
        if not _is_visible_space(step):
            raise RequestError(
                _refused(f"its normaliser has {step['type']}, and llama.cpp's BPE takes text as it stands")
            )
    cuts = _types(document["pre_tokenizer"])
    if not set(cuts) <= {"Metaspace"} or any(each.get("split") for each in _steps(document["pre_tokenizer"])):
        raise RequestError(_refused(f"it cuts words with {' and '.join(cuts)} before it looks pieces up"))
    ranks: dict[str, float] = {}
    for rank, merge in enumerate(document["model"]["merges"]):
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        ranks.setdefault(left + right, -float(rank))
    keys = {"tokenizer.ggml.model": "llama", "tokenizer.ggml.add_space_prefix": _prepends(document)}
    return _Algorithm(keys, ranks)


def _bytes(document: Mapping[str, Any]) -> _Algorithm:
    normaliser = [step["type"] for step in _steps(document["normalizer"])]
    if not set(normaliser) <= {"NFC"}:
        raise RequestError(_refused(f"its normaliser has {' and '.join(normaliser)}"))
    words = _GPT2_WORDS
    for step in _steps(document["pre_tokenizer"]):
        if step["type"] == "Split":
            words = step["pattern"].get("Regex", "")
        elif step["type"] != "ByteLevel" or step["add_prefix_space"]:
            raise RequestError(_refused("it sets a space before a text, or cuts words in a way of its own"))
    if words not in _WORDS:
        raise RequestError(_refused("the expression by which it cuts words is none of gpt-2's, qwen2's and llama 3's"))
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in document["model"]["merges"]]
    keys = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": _WORDS[words],
        "tokenizer.ggml.merges": merges,
    }
    note = ("llama.cpp does not put text into the composed form (NFC) first, as the tokenizer does",)
    return _Algorithm(keys, notes=note if normaliser else ())


def _wordpiece(document: Mapping[str, Any]) -> _Algorithm:
    steps, cuts = _steps(document["normalizer"]), _types(document["pre_tokenizer"])
    if [step["type"] for step in steps] != ["BertNormalizer"] or cuts != ["BertPreTokenizer"]:
        raise RequestError(_refused("it normalises text or cuts words in another way than BERT's"))
    if not steps[0]["handle_chinese_chars"]:
        raise RequestError(_refused("it keeps Chinese characters together, and llama.cpp parts them"))
    lower = bool(steps[0]["lowercase"])
    accents = steps[0]["strip_accents"]
    keys = {
        "tokenizer.ggml.model": "bert",
        "tokenizer.ggml.normalizer.lowercase": lower,
        "tokenizer.ggml.normalizer.strip_accents": lower if accents is None else bool(accents),
    }
    return _Algorithm(keys, phantom=True)


def _steps(part: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    """The parts of a normaliser or pre-tokenizer, those of a sequence one by one."""
    if part is None:
        return []
    if part["type"] != "Sequence":
        return [part]
    return list(part.get("normalizers") or part.get("pretokenizers") or [])


def _types(part: Mapping[str, Any] | None) -> list[str]:
    return [str(step["type"]) for step in _steps(part)]


def _is_visible_space(step: Mapping[str, Any]) -> bool:
    """Whether a step does no more than write spaces visibly, or set one before the text."""
    if step["type"] == "Prepend":
        return bool(step["prepend"] == SPACE)
    return bool(step["type"] == "Replace" and step["content"] == SPACE and step["pattern"] == {"String": " "})


def _prepends(document: Mapping[str, Any]) -> bool:
    """Whether a space is set before a text."""
    prepended = any(step["type"] == "Prepend" for step in _steps(document["normalizer"]))
    metaspace = [step for step in _steps(document["pre_tokenizer"]) if step["type"] == "Metaspace"]
    return prepended or any(step.get("prepend_scheme", "always") != "never" for step in metaspace)


def _refused(reason: str) -> str:
    return f"gguf cannot hold this tokenizer: {reason}"
