"""From a tokenizer's files to one `tokenizer.json`, the form that the `tokenizers` library runs.

Text becomes ids in five steps, and the document has a part for each:

1. tokens of `added_tokens` are found and taken out whole;
2. the `normalizer` rewrites the rest: lower case, compatibility forms (NFKC), white space;
3. the `pre_tokenizer` cuts it into words, which no piece crosses;
4. the `model` cuts each word into pieces of the vocabulary;
5. the `post_processor` sets tokens around the result (`</s>`, or `[CLS]` and `[SEP]`) and the token types.

Decoding undoes 4, 3 and what it can of 2 (`decoder`). Every vocabulary file is brought to this one form, so
there is one engine, whatever a tokenizer was stored as; and it is the one that `transformers` runs, so the ids
are the same.

A `tokenizer.json` is taken as it stands, apart from what its class overrides in `transformers` as well
(lower-casing, first spaces, languages). `transformers` 5 goes further, and builds step 2 and 3 of a class that
it knows anew: for a file in which they differ from what the class does, the file's word counts here.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

from lathe.errors import RequestError
from lathe.text import files as names
from lathe.text.conventions import SENTINEL, TokenizerClass, bound, derived, resolve
from lathe.text.settings import Settings, Token
from lathe.text.spiece import Kind, SentencePieceModel, merges, parse

Document = dict[str, Any]

_TEXTS = ("A", "B")  # what a template calls the two texts


def build(files: Mapping[str, bytes], settings: Settings) -> Document:
    """The tokenizer.json of a tokenizer's files.

    Raises:
        RequestError: an unreadable file, or a vocabulary file without a word on how it is used.
    """
    if names.TOKENIZER in files:
        return _from_document(names.read_json(files, names.TOKENIZER), settings)
    rules = _require_rules(files, settings)
    for name in names.PIECES:
        if name in files:
            return from_pieces(parse(files[name], name), rules, settings)
    if names.VOCAB_TEXT in files:
        document = _from_model(_wordpiece(_lines(files, names.VOCAB_TEXT), settings), rules, settings.options)
    elif names.MERGES in files:
        document = _from_model(_byte_pairs(files), rules, settings.options)
    else:
        raise RequestError(f"there is {names.VOCAB_JSON} but no {names.MERGES}: both are needed")
    return _finish(document, rules, settings)


def from_pieces(model: SentencePieceModel, rules: TokenizerClass, settings: Settings) -> Document:
    """The tokenizer.json of a SentencePiece model, used as a class does."""
    sentinels = _sentinels(settings.options, rules)
    scored = [(piece.text, score) for piece, score in zip(model.pieces, _scores(model), strict=True)]
    others = [(token, 0.0) for token in (*sentinels, *rules.tail)]
    entries = [*((token, 0.0) for token in rules.head), *scored[rules.skip :], *others]
    unk = next((piece.text for piece in model.pieces if piece.kind == Kind.UNKNOWN), None)
    if unk is None:
        raise RequestError("the SentencePiece model has no piece for the unknown: it was not written by its trainer")
    ids = {text: number for number, (text, _) in enumerate(entries)}
    if model.model == "unigram":
        section: Document = {
            "type": "Unigram",
            "unk_id": ids[unk],
            "vocab": entries,
            "byte_fallback": model.byte_fallback,
        }
    else:
        section = _bpe(ids, merges(model.pieces), unk=unk, byte_fallback=model.byte_fallback, fuse_unk=True)
    options = {
        **settings.options,
        "charsmap": base64.b64encode(model.charsmap).decode("ascii"),
        "has_charsmap": bool(model.charsmap),
    }
    document = _from_model(section, rules, options)
    own = [
        Token(piece.text, special=piece.kind == Kind.CONTROL)
        for piece in model.pieces
        if piece.kind in (Kind.CONTROL, Kind.USER_DEFINED)
    ]
    # As in transformers, a list of special tokens in the settings takes the place of the model's own.
    added = [*([] if settings.others else own), *(Token(token) for token in (*sentinels, *rules.tail))]
    return _finish(document, rules, settings, added)


def without_vocabulary(rules: TokenizerClass, config: Mapping[str, Any]) -> Document:
    """A tokenizer.json that normalises text and cuts it into words as a class does, and knows no pieces yet."""
    section = _bpe({}, [], unk=None, byte_fallback=False, fuse_unk=False)
    return _from_model(section, rules, derived({**rules.options, **config}))


# --- a tokenizer.json that is there already ------------------------------------------------------------


def _from_document(document: Document, settings: Settings) -> Document:
    added = document.get("added_tokens", [])
    if not _has_vocabulary(document.get("model")) or not _are_tokens(added):
        raise RequestError(
            f"{names.TOKENIZER} holds no vocabulary: expected the file that the tokenizers library writes"
        )
    # A batch is padded and cut when it is asked for, not by what somebody last asked for.
    document = {**document, "added_tokens": list(added), "truncation": None, "padding": None}
    rules = settings.rules
    if rules is not None:
        for key, spec in (("normalizer", rules.normalizer), ("pre_tokenizer", rules.pre_tokenizer)):
            part = document.get(key)
            if isinstance(part, dict) and isinstance(spec, dict) and part.get("type") == spec["type"]:
                document[key] = {**part, **bound(spec, settings.options)}
    _add_tokens(document, settings)
    if rules is not None and "src_lang" in settings.options:
        document["post_processor"] = _template(document, rules, settings)
    return document


def _has_vocabulary(model: Any) -> bool:
    """Whether this is a model's part: token -> id, or a list of token and score."""
    vocab = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocab, list):
        return all(isinstance(entry, list) and entry and isinstance(entry[0], str) for entry in vocab)
    return isinstance(vocab, dict) and all(isinstance(number, int) for number in vocab.values())


def _are_tokens(added: Any) -> bool:
    return isinstance(added, list) and all(
        isinstance(token, dict) and isinstance(token.get("content"), str) and isinstance(token.get("id"), int)
        for token in added
    )


# --- a vocabulary file -----------------------------------------------------------------------------------


def _require_rules(files: Mapping[str, bytes], settings: Settings) -> TokenizerClass:
    found = next(name for name in names.VOCABULARIES if name in files)
    expected = {names.VOCAB_TEXT: ("wordpiece",), names.VOCAB_JSON: ("bytes",)}.get(found, ("unigram", "bpe"))
    if settings.rules is None:
        said = f"names {settings.tokenizer_class}" if settings.tokenizer_class else "is not there to say how"
        raise RequestError(
            f"{found} alone is not enough: {names.CONFIG} {said}; add {names.TOKENIZER}, or say which convention "
            "it follows, such as convention='t5'"
        )
    if settings.rules.model not in expected:
        raise RequestError(f"{found} does not go with {settings.tokenizer_class}, which {names.CONFIG} names")
    return settings.rules


def _from_model(section: Document, rules: TokenizerClass, options: Mapping[str, Any]) -> Document:
    normalizer = resolve(rules.normalizer, options)
    if isinstance(normalizer, dict) and normalizer.get("normalizers") == []:
        normalizer = None
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": normalizer,
        "pre_tokenizer": resolve(rules.pre_tokenizer, options),
        "post_processor": None,
        "decoder": resolve(rules.decoder, options),
        "model": section,
    }


def _finish(document: Document, rules: TokenizerClass, settings: Settings, others: Iterable[Token] = ()) -> Document:
    _add_tokens(document, settings, others)
    document["post_processor"] = _template(document, rules, settings)
    return document


def _sentinels(options: Mapping[str, Any], rules: TokenizerClass) -> list[str]:
    count = options[rules.sentinels] if rules.sentinels else 0
    if not isinstance(count, int) or count < 0:
        raise RequestError(f"{names.CONFIG} holds {rules.sentinels} = {count!r}: expected a count")
    return [SENTINEL.format(number) for number in reversed(range(count))]


def _scores(model: SentencePieceModel) -> Iterable[float]:
    """The pieces' scores, with byte pieces out of reach.

    SentencePiece never takes text that reads <0x41> for the byte piece of that name, though its file gives byte
    pieces the score 0, the best there is. The tokenizers library would; a score that no row of letters can fall
    below prevents it.
    """
    lowest = min((piece.score for piece in model.pieces if piece.kind == Kind.NORMAL), default=0.0)
    length = len("<0x41>")
    return (8 * length * min(lowest, -1.0) if p.kind == Kind.BYTE else p.score for p in model.pieces)


def _wordpiece(lines: list[str], settings: Settings) -> Document:
    return {
        "type": "WordPiece",
        "unk_token": settings.roles.get("unk", "[UNK]"),
        "continuing_subword_prefix": "##",
        "max_input_chars_per_word": 100,
        "vocab": {token: number for number, token in enumerate(lines)},
    }


def _byte_pairs(files: Mapping[str, bytes]) -> Document:
    vocab = names.read_json(files, names.VOCAB_JSON)
    if not all(isinstance(number, int) for number in vocab.values()):
        raise RequestError(f"{names.VOCAB_JSON} is not a map of tokens to ids")
    pairs: list[tuple[str, str]] = []
    for number, line in enumerate(_lines(files, names.MERGES), start=1):
        # The first line names the version of the format. A merge may start with # as well.
        if (number == 1 and line.startswith("#version")) or not line.strip():
            continue
        left, _, right = line.partition(" ")
        if left not in vocab or right not in vocab or left + right not in vocab:
            raise RequestError(f"{names.MERGES} line {number} merges {line!r}, which {names.VOCAB_JSON} does not hold")
        pairs.append((left, right))
    return _bpe(vocab, pairs, unk=None, byte_fallback=False, fuse_unk=False)


def _bpe(
    vocab: dict[str, int], pairs: list[tuple[str, str]], *, unk: str | None, byte_fallback: bool, fuse_unk: bool
) -> Document:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": unk,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": fuse_unk,
        "byte_fallback": byte_fallback,
        "ignore_merges": False,
        "vocab": vocab,
        "merges": pairs,
    }


def _lines(files: Mapping[str, bytes], name: str) -> list[str]:
    try:
        text = files[name].decode("utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(f"{name} is not UTF-8 (byte {error.start}): copy or download it again") from error
    # Not splitlines: some of the characters that it cuts at are tokens.
    lines = text.replace("\r\n", "\n").split("\n")
    return lines[:-1] if lines[-1] == "" else lines


# --- tokens and what stands around a text ----------------------------------------------------------------


def _add_tokens(document: Document, settings: Settings, others: Iterable[Token] = ()) -> None:
    """Make tokens known: under the id that the vocabulary has for them, or else under the next free one.

    A token that the files list with its id has the flags that it is listed with; the rest are added if they are
    not known by then.
    """
    vocab = document["model"]["vocab"]
    ids = {entry[0]: number for number, entry in enumerate(vocab)} if isinstance(vocab, list) else vocab
    known = {token["content"]: token for token in document["added_tokens"]}
    # As the library numbers them: after the vocabulary, one after the other.
    following = max([len(vocab), *(token["id"] + 1 for token in known.values())])
    for token in (*settings.listed, *settings.named, *others):
        earlier = known.get(token.content)
        if not token.content or (earlier is not None and token not in settings.listed):
            continue
        number = earlier["id"] if earlier else ids.get(token.content)
        if number is None:
            number, following = following, following + 1
        known[token.content] = {"id": number, **asdict(token)}
    document["added_tokens"] = sorted(known.values(), key=lambda token: int(token["id"]))


def _template(document: Document, rules: TokenizerClass, settings: Settings) -> Document:
    """The part that sets tokens around a text (`single`) and around a pair."""
    named = {**settings.roles, **{key: value for key, value in settings.options.items() if isinstance(value, str)}}
    single, pair = (_words(template) for template in rules.template or _begin_and_end(settings))
    used: dict[str, Document] = {}
    for name, _ in [*single, *pair]:
        if name in _TEXTS:
            continue
        number = token_id(document, named[name]) if name in named else None
        if number is None:
            raise RequestError(
                f"{settings.tokenizer_class} sets its {name} token around a text, and these files have no such token"
            )
        used[named[name]] = {"id": named[name], "ids": [number], "tokens": [named[name]]}

    def parts(words: list[tuple[str, int]]) -> list[Document]:
        return [
            {"Sequence": {"id": name, "type_id": kind}}
            if name in _TEXTS
            else {"SpecialToken": {"id": named[name], "type_id": kind}}
            for name, kind in words
        ]

    return {
        "type": "TemplateProcessing",
        "single": parts(single),
        "pair": parts(pair),
        "special_tokens": used,
    }


def _words(template: str) -> list[tuple[str, int]]:
    """A template of `conventions` in parts: what stands there, and its token type."""
    return [(name, int(kind)) for name, _, kind in (word.partition(":") for word in template.split())]


def _begin_and_end(settings: Settings) -> tuple[str, str]:
    begin = bool(settings.options.get("add_bos_token")) and "bos" in settings.roles
    end = bool(settings.options.get("add_eos_token")) and "eos" in settings.roles

    def around(text: str, kind: int) -> str:
        return " ".join([f"bos:{kind}"] * begin + [f"{text}:{kind}"] + [f"eos:{kind}"] * end)

    return around("A", 0), f"{around('A', 0)} {around('B', 1)}"


def token_id(document: Document, token: str) -> int | None:
    """The id of a token, None for one that the tokenizer has not."""
    for added in document["added_tokens"]:
        if added["content"] == token:
            return int(added["id"])
    vocab = document["model"]["vocab"]
    if isinstance(vocab, list):
        return next((number for number, entry in enumerate(vocab) if entry[0] == token), None)
    found = vocab.get(token)
    return None if found is None else int(found)


def dump(document: Document) -> str:
    """The document as the tokenizers library reads it."""
    return json.dumps(document, ensure_ascii=False)
