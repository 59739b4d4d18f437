"""Training a tokenizer on a corpus, in the form that a family's own tokenizers have.

Which algorithm runs follows from the family's convention (`conventions.RECIPES`):

- *SentencePiece* (T5, ALBERT, Llama), unigram or BPE. Unigram (Kudo 2018, section 3.2) starts from every frequent
  substring and prunes those that cost the likelihood least; BPE merges the most frequent pair. Unigram has the
  more regular pieces, BPE trains several times faster.
- *WordPiece* (BERT, ELECTRA) and *byte-level BPE* (GPT-2, BART), in `wordpiece`.

`vocab_size` counts everything that has an id: special tokens, bytes and sentinels too. It is the number of rows
that the model's embedding needs.

The same corpus and arguments give the same bytes: the number of SentencePiece's threads is fixed, since the sums
of its EM step are split by thread, and so is the order of everything else.

*Byte fallback.* A character that no piece holds is spelt in the bytes of its UTF-8, as pieces `<0x00>` … `<0xFF>`,
so nothing is lost and 256 ids are spent. `transformers` 5 knows that only of its Llama class; a T5 or ALBERT
tokenizer with byte fallback is therefore saved with the class PreTrainedTokenizerFast, which takes `tokenizer.json`
as it stands, while one without has its family's class.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any, NoReturn

from lathe.errors import LatheError, RequestError
from lathe.text import files as names
from lathe.text import pipeline
from lathe.text.conventions import RECIPES, ROLES, SENTINEL, Recipe, TokenizerClass
from lathe.text.corpus import Corpus, read_lines, sample
from lathe.text.settings import Settings, read_settings
from lathe.text.spiece import parse
from lathe.text.tokenizer import Tokenizer
from lathe.text.wordpiece import count_words, too_large, train_bytes, train_wordpiece

_KINDS: dict[str, tuple[Any, str]] = {
    "sentinels": (int, "a whole number"),
    "byte_fallback": (bool, "true or false"),
    "character_coverage": ((int, float), "a number"),
    "normalisation": (str, "the name of a rule"),
    "lowercase": (bool, "true or false"),
    "strip_accents": (bool, "true or false"),
    "max_lines": (int, "a whole number"),
    "seed": (int, "a whole number"),
}

NORMALISATIONS = ("nmt_nfkc", "nfkc", "nmt_nfkc_cf", "nfkc_cf", "identity")
GENERIC_CLASS = "PreTrainedTokenizerFast"

_MOST_TOKENS = 1 << 22  # the trainers set room aside for all of them at once
_THREADS = 4
_SILENT = 3  # SentencePiece's log level past every message
_LONGEST_LINE = 1 << 30  # in bytes; its own limit drops longer lines without a word
# SentencePiece passes over a line that holds one of these: it uses them itself.
_RESERVED = re.compile("[\0\u2585]")
# With these pieces, text that reads <0x41> can be spelt, and never needs the byte piece of that name.
_BYTE_NAMES = "<0x123456789ABCDEF>"


def train_tokenizer(
    corpus: Corpus,
    vocab_size: int,
    *,
    convention: str = "t5",
    model: str | None = None,
    sentinels: int | None = None,
    byte_fallback: bool | None = None,
    character_coverage: float | None = None,
    normalisation: str | None = None,
    lowercase: bool | None = None,
    strip_accents: bool | None = None,
    max_lines: int | None = None,
    seed: int = 0,
) -> Tokenizer:
    """Train a tokenizer.

    An argument left at None takes the convention's own value; one that the convention has no use for is refused.

    Args:
        corpus: texts; or the `Path` of a UTF-8 file, or several.
        vocab_size: how many ids in all: special tokens, bytes and sentinels included.
        convention: whose tokenizer to make: t5, bert, electra, albert, bart, gpt2 or llama.
        model: "unigram" or "bpe", for t5, albert and llama.
        sentinels: how many `<extra_id_…>` tokens, for t5; 100 unless said otherwise.
        byte_fallback: spell unknown characters in bytes, for t5, albert and llama; on unless said otherwise.
        character_coverage: the share of the text whose characters get pieces of their own, 0.98 to 1. Default
            0.9995 for SentencePiece and 1 for WordPiece.
        normalisation: what SentencePiece does to text first: "nmt_nfkc" (compatibility forms brought together,
            control characters and repeated spaces dropped), "nfkc", either with "_cf" for case folding, or
            "identity" (nothing).
        lowercase, strip_accents: for bert, electra and albert. Lower case is on unless said otherwise, and accents
            are kept: taking them off also takes Korean syllables apart.
        max_lines: train on a random sample of so many lines. SentencePiece holds the corpus in memory, and a few
            hundred thousand lines are plenty for one language.
        seed: of that sample.

    Raises:
        RequestError: text that is not UTF-8, an empty corpus, a vocabulary larger than the corpus can fill (says
            the largest that fits) or too small for its characters, an unknown convention, model or normalisation.

    Example:
        >>> from lathe.text import train_tokenizer
        >>> tokenizer = train_tokenizer(["to be or not to be"] * 9, 13, byte_fallback=False, sentinels=2)
        >>> tokenizer.vocab_size, tokenizer.decode(tokenizer.encode("to be"))
        (13, 'to be')
    """
    recipe = _recipe(convention, vocab_size)
    _check(
        convention,
        recipe,
        sentinels=sentinels,
        byte_fallback=byte_fallback,
        character_coverage=character_coverage,
        normalisation=normalisation,
        lowercase=lowercase,
        strip_accents=strip_accents,
        max_lines=max_lines,
        seed=seed,
    )
    chosen = _choose("model", model, recipe.models)
    config = _config(recipe, lowercase, strip_accents, recipe.sentinels if sentinels is None else sentinels)
    lines = _sampled(corpus, max_lines, seed)
    if chosen == "wordpiece":
        return _train_wordpiece(lines, vocab_size, recipe, config, character_coverage or 1.0)
    if chosen == "bytes":
        return _train_bytes(lines, vocab_size, recipe, config)
    fallback = bool(recipe.byte_fallback) if byte_fallback is None else byte_fallback
    trainer = {
        "model_type": chosen,
        "byte_fallback": fallback,
        "character_coverage": character_coverage or 0.9995,
        "normalization_rule_name": _choose("normalisation", normalisation, (recipe.normalisation, *NORMALISATIONS)),
        "remove_extra_whitespaces": not recipe.lossless,
        "allow_whitespace_only_pieces": recipe.lossless,
        "split_digits": recipe.lossless,
        "required_chars": _BYTE_NAMES if fallback and chosen == "unigram" else "",
    }
    return _train_pieces(lines, vocab_size, recipe, config, trainer)


# --- SentencePiece ---------------------------------------------------------------------------------------


def _train_pieces(
    lines: Iterator[str], vocab_size: int, recipe: Recipe, config: dict[str, Any], trainer: dict[str, Any]
) -> Tokenizer:
    sentinels = int(config.get("extra_ids", 0))
    if vocab_size <= sentinels + len(recipe.control):
        what = "special tokens and sentinels" if sentinels else "special tokens"
        raise RequestError(
            f"vocab_size={vocab_size} is too small: {what} alone take {sentinels + len(recipe.control)}; ask for more"
        )
    rules = recipe.rules
    text = _prepared(lines, rules, config)
    data = _sentencepiece(text, vocab_size - sentinels, sentinels, {**trainer, **_first_ids(recipe)})
    as_class = trainer["model_type"] == rules.model and trainer["byte_fallback"] == rules.byte_fallback
    named = recipe.tokenizer_class if as_class and not recipe.lossless else GENERIC_CLASS
    settings = _settings(recipe, config, named)
    parsed = parse(data, recipe.file)
    document = pipeline.from_pieces(parsed, recipe.rules, _read(settings, recipe))
    return _finished(document, settings, {recipe.file: data})


def _sentencepiece(lines: Iterable[str], vocab_size: int, sentinels: int, arguments: dict[str, Any]) -> bytes:
    import sentencepiece

    result = io.BytesIO()
    feed = _Feed(lines)
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(feed),
            model_writer=result,
            vocab_size=vocab_size,
            num_threads=_THREADS,
            max_sentence_length=_LONGEST_LINE,
            minloglevel=_SILENT,
            **arguments,
        )
    except (RuntimeError, ValueError, OSError) as error:
        if feed.error is not None:
            raise feed.error from None
        _explain(error, vocab_size, sentinels, arguments)
    return result.getvalue()


class _Feed:
    """Hands lines to SentencePiece, and keeps the error that reading them may raise: it makes its own of it."""

    def __init__(self, lines: Iterable[str]) -> None:
        self.lines = lines
        self.error: Exception | None = None

    def __iter__(self) -> Iterator[str]:
        try:
            yield from self.lines
        except Exception as error:
            self.error = error
            raise


def _explain(error: Exception, vocab_size: int, sentinels: int, arguments: dict[str, Any]) -> NoReturn:
    """Say in one line what SentencePiece found wrong."""
    message = str(error)
    asked = vocab_size + sentinels
    if too_high := re.search(r"Vocabulary size too high .* <= (\d+)", message):
        raise too_large(asked, int(too_high[1]) + sentinels) from error
    if too_low := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        fallback = bool(arguments["byte_fallback"])
        parts = ["special tokens", *["sentinels"] * bool(sentinels), *["bytes"] * fallback, "characters"]
        raise RequestError(
            f"vocab_size={asked} is too small: {', '.join(parts)} take {int(too_low[1]) + sentinels}; ask for that at "
            f"least, or lower character_coverage{' or pass byte_fallback=False' if fallback else ''}"
        ) from error
    if "sentences_.empty()" in message or "all_chars_count" in message:
        raise RequestError("the corpus is empty: normalisation leaves none of its characters") from error
    raise LatheError(f"SentencePiece could not train: {' '.join(message.split())}") from error


def _first_ids(recipe: Recipe) -> dict[str, Any]:
    """SentencePiece's names for the tokens that take the first ids."""
    # The roles that SentencePiece has; its own begin and end tokens stay off where the family has others.
    own = [role for role in ("pad", "unk", "bos", "eos") if recipe.tokens.get(role) in recipe.control]
    own = [role for role in own if recipe.tokens[role] not in (recipe.tokens.get("cls"), recipe.tokens.get("sep"))]
    arguments: dict[str, Any] = {f"{role}_id": -1 for role in ("pad", "bos", "eos")}
    for role in own:
        arguments[f"{role}_id"] = recipe.control.index(recipe.tokens[role])
        arguments[f"{role}_piece"] = recipe.tokens[role]
    taken = {recipe.tokens[role] for role in own}
    arguments["control_symbols"] = [token for token in recipe.control if token not in taken]
    return arguments


def _prepared(lines: Iterator[str], rules: TokenizerClass, config: dict[str, Any]) -> Iterator[str]:
    """Lines as SentencePiece will meet them: normalised as far as its own rules do not, without reserved marks."""
    normalise = _normaliser(rules, config)
    for line in lines:
        for part in _RESERVED.split(normalise(line.rstrip("\r\n"))):
            if part.strip():
                yield part


def _normaliser(rules: TokenizerClass, config: dict[str, Any]) -> Any:
    """What the class does to text before SentencePiece's own rules: lower case and accents of ALBERT."""
    if "do_lower_case" not in config:
        return str
    engine = _bare_engine(rules, config)
    return engine.normalizer.normalize_str


# --- WordPiece and bytes ---------------------------------------------------------------------------------


def _train_wordpiece(
    lines: Iterator[str], vocab_size: int, recipe: Recipe, config: dict[str, Any], coverage: float
) -> Tokenizer:
    words = count_words(lines, _bare_engine(recipe.rules, config))
    if not words:
        raise RequestError("the corpus is empty: normalisation leaves none of its characters")
    tokens = train_wordpiece(words, vocab_size, recipe.control, coverage)
    vocabulary = {recipe.file: "".join(f"{token}\n" for token in tokens).encode("utf-8")}
    return _from_vocabulary(vocabulary, recipe, config)


def _train_bytes(lines: Iterator[str], vocab_size: int, recipe: Recipe, config: dict[str, Any]) -> Tokenizer:
    vocab, merges = train_bytes(lines, vocab_size, recipe.control)
    rows = ["#version: 0.2", *(f"{left} {right}" for left, right in merges)]
    vocabulary = {
        recipe.file: names.to_json(dict(sorted(vocab.items(), key=lambda item: item[1]))),
        names.MERGES: "".join(f"{row}\n" for row in rows).encode("utf-8"),
    }
    return _from_vocabulary(vocabulary, recipe, config)


def _from_vocabulary(vocabulary: dict[str, bytes], recipe: Recipe, config: dict[str, Any]) -> Tokenizer:
    settings = _settings(recipe, config, recipe.tokenizer_class)
    document = pipeline.build(vocabulary, _read(settings, recipe))
    return _finished(document, settings, vocabulary)


def _bare_engine(rules: TokenizerClass, config: dict[str, Any]) -> Any:
    """An engine that normalises and cuts words, and knows no pieces yet."""
    import tokenizers

    return tokenizers.Tokenizer.from_str(pipeline.dump(pipeline.without_vocabulary(rules, config)))


# --- arguments, settings, files --------------------------------------------------------------------------


def _recipe(convention: str, vocab_size: object) -> Recipe:
    if convention not in RECIPES:
        raise RequestError(f"convention={convention!r}: expected one of {', '.join(RECIPES)}")
    if isinstance(vocab_size, bool) or not isinstance(vocab_size, int) or not 1 <= vocab_size <= _MOST_TOKENS:
        raise RequestError(f"vocab_size={vocab_size!r}: expected a whole number from 1 to {_MOST_TOKENS:,}")
    return RECIPES[convention]


def _check(convention: str, recipe: Recipe, **asked: Any) -> None:
    """Refuse arguments of the wrong kind, out of range, or without effect for this convention."""
    for name, value in asked.items():
        if value is None:
            continue
        kind, expected = _KINDS[name]
        # True is a whole number to Python, but nobody means it as one.
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise RequestError(f"{name}={value!r}: expected {expected}")
    pieces = recipe.normalisation is not None  # whether SentencePiece trains it
    useful = {
        "sentinels": recipe.sentinels is not None,
        "byte_fallback": pieces,
        "normalisation": pieces,
        "character_coverage": recipe.models != ("bytes",),
        "lowercase": "do_lower_case" in recipe.settings,
        "strip_accents": "do_lower_case" in recipe.settings,
    }
    for name, has_effect in useful.items():
        if asked[name] is not None and not has_effect:
            raise RequestError(f"{name}={asked[name]!r} has no effect with convention={convention!r}: leave it out")
    if asked["seed"] != 0 and asked["max_lines"] is None:
        raise RequestError(f"seed={asked['seed']} has no effect without max_lines: leave it out")
    if asked["character_coverage"] is not None and not 0.98 <= asked["character_coverage"] <= 1:
        raise RequestError(f"character_coverage={asked['character_coverage']!r}: expected 0.98 to 1")
    for name, least in (("sentinels", 0), ("max_lines", 1)):
        if asked[name] is not None and asked[name] < least:
            raise RequestError(f"{name}={asked[name]}: expected at least {least}")


def _choose(name: str, asked: str | None, known: Iterable[str | None]) -> str:
    offered = list(dict.fromkeys(each for each in known if each is not None))
    if asked is not None and asked not in offered:
        raise RequestError(f"{name}={asked!r}: expected {' or '.join(offered)}")
    return offered[0] if asked is None else asked


def _sampled(corpus: Corpus, max_lines: int | None, seed: int) -> Iterator[str]:
    lines = read_lines(corpus)
    if max_lines is not None:
        return iter(sample(lines, max_lines, seed))
    # The first line is read now, so that a corpus that is not there says so before anything starts.
    first = next(lines)
    return chain([first], lines)


def _config(
    recipe: Recipe, lowercase: bool | None, strip_accents: bool | None, sentinels: int | None
) -> dict[str, Any]:
    """The settings of tokenizer_config.json that the arguments decide."""
    config = dict(recipe.settings)
    if lowercase is not None:
        config["do_lower_case"] = lowercase
    if strip_accents is not None:
        if "keep_accents" in config:
            config["keep_accents"] = not strip_accents
        else:
            config["strip_accents"] = strip_accents
    if sentinels is not None:
        config["extra_ids"] = sentinels
    return config


def _settings(recipe: Recipe, config: dict[str, Any], tokenizer_class: str) -> dict[str, Any]:
    """The content of tokenizer_config.json."""
    rules = recipe.rules
    inputs = ["input_ids", "token_type_ids", "attention_mask"] if rules.token_types else ["input_ids", "attention_mask"]
    content: dict[str, Any] = {
        "tokenizer_class": tokenizer_class,
        **{f"{role}_token": _role(recipe, role) for role in ROLES},
        **config,
        "model_input_names": inputs,
        "padding_side": rules.padding_side,
        "clean_up_tokenization_spaces": False,
    }
    if config.get("extra_ids"):
        content["extra_special_tokens"] = [SENTINEL.format(number) for number in range(config["extra_ids"])]
    return content


def _role(recipe: Recipe, role: str) -> str | dict[str, Any] | None:
    token = recipe.tokens.get(role)
    if role not in recipe.takes_space:
        return token
    return {"__type": "AddedToken", "content": token, "lstrip": True, "normalized": False, "special": True}


def _read(settings: dict[str, Any], recipe: Recipe) -> Settings:
    """The settings as they will be read, with the class whose rules the pipeline follows."""
    return read_settings({names.CONFIG: names.to_json(settings)}, convention=recipe.tokenizer_class, model_type=None)


def _finished(document: pipeline.Document, settings: dict[str, Any], vocabulary: dict[str, bytes]) -> Tokenizer:
    special = {
        key: {k: v for k, v in value.items() if k not in ("__type", "special")} if isinstance(value, dict) else value
        for key, value in settings.items()
        if key.endswith("_token") and value is not None
    }
    return Tokenizer.from_files(
        {
            names.TOKENIZER: names.to_json(document),
            names.CONFIG: names.to_json(settings),
            names.SPECIAL_TOKENS: names.to_json(special),
            **vocabulary,
        }
    )
