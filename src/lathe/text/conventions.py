"""How each kind of tokenizer is put together, as data.

A vocabulary file alone does not say how text becomes ids. The rest (what is lowercased, where words are cut,
which tokens stand around a sentence) is a convention, and the file `tokenizer_config.json` names it by a class
of `transformers`: `T5Tokenizer`, `BertTokenizer`, … This module has two tables.

- `CLASSES`: what each of those classes does with its vocabulary file. Used when a directory holds
  `spiece.model`, `vocab.txt` or `vocab.json` and no `tokenizer.json`, which would spell everything out.
- `RECIPES`: what `lathe.text.train` makes for each family when it trains a tokenizer.

The parts of a pipeline are written as the JSON of a `tokenizer.json`. `Option(name)` stands for a setting of
`tokenizer_config.json`, and `When(name, value, part)` for a part that is there only if a setting has a value.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

Spec = Any  # the JSON of one part of a tokenizer.json, which may hold Option and When
Model = Literal["unigram", "bpe", "wordpiece", "bytes"]

# The roles that a special token can have, in the order in which transformers adds tokens that a vocabulary lacks.
ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")

SPACE = "▁"  # U+2581, SentencePiece's visible space
SENTINEL = "<extra_id_{}>"  # what span corruption puts in place of a span, numbered from 0


@dataclass(frozen=True)
class Option:
    """The value of this setting."""

    name: str


@dataclass(frozen=True)
class When:
    """`part`, present only if the setting `name` has this value."""

    name: str
    value: Any
    part: Spec


@dataclass(frozen=True)
class TokenizerClass:
    """What a tokenizer class of transformers does.

    Attributes:
        model: how words are cut: unigram (Kudo 2018), bpe (Sennrich 2016, on characters), wordpiece (Schuster
            2012) or bytes (BPE on bytes, Radford 2019).
        tokens: the special tokens where the files name none, by role.
        options: the settings that the pipeline listens to, with their values where the files do not say.
        normalizer, pre_tokenizer, decoder: parts of a tokenizer.json.
        template: what stands around one text and around a pair. A lower-case word is a role or an option that
            names a token, `A` and `B` are the texts, the number is the token type. None: begin and end tokens
            as `add_bos_token` and `add_eos_token` say.
        token_types: whether its models tell the texts of a pair apart by token type.
        byte_fallback: whether the class itself spells unknown characters in bytes. Here a vocabulary that has the
            byte pieces does, whatever its class.
        head, skip, tail: SentencePiece files that are not used as they stand: the first `skip` pieces make way
            for `head`, and `tail` follows the last.
        sentinels: the option that counts the sentinels after the last piece, highest number first.
    """

    model: Model
    tokens: Mapping[str, str]
    pre_tokenizer: Spec
    decoder: Spec
    options: Mapping[str, Any] = field(default_factory=dict)
    normalizer: Spec = None
    template: tuple[str, str] | None = None
    token_types: bool = False
    padding_side: Literal["left", "right"] = "right"
    byte_fallback: bool = False
    head: tuple[str, ...] = ()
    skip: int = 0
    tail: tuple[str, ...] = ()
    sentinels: str | None = None


def _metaspace(scheme: Spec, split: bool = True) -> dict[str, Spec]:
    return {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": scheme, "split": split}


def _byte_level(add_prefix_space: Spec, use_regex: bool = True) -> dict[str, Spec]:
    return {
        "type": "ByteLevel",
        "add_prefix_space": add_prefix_space,
        "trim_offsets": True,
        "use_regex": use_regex,
    }


def _sequence(kind: str, *parts: Spec) -> dict[str, Spec]:
    return {"type": "Sequence", kind: list(parts)}


def _replace(old: str, new: str) -> dict[str, Spec]:
    return {"type": "Replace", "pattern": {"String": old}, "content": new}


# SentencePiece's own normalisation, compiled into its file; a file without any has none.
_CHARSMAP = When("has_charsmap", True, {"type": "Precompiled", "precompiled_charsmap": Option("charsmap")})

# Words are cut at white space before the pieces are looked up, and each begins with the visible space.
_WORDS = _sequence("pretokenizers", {"type": "WhitespaceSplit"}, _metaspace("always"))

# Pieces back to text: visible spaces to spaces, byte pieces to the characters they spell, no first space.
_FROM_PIECES = _sequence(
    "decoders",
    _replace(SPACE, " "),
    {"type": "ByteFallback"},
    {"type": "Fuse"},
    When("add_prefix_space", True, {"type": "Strip", "content": " ", "start": 1, "stop": 0}),
)

# A visible space before the text and for every space in it; unlike Metaspace it keeps a first space apart from
# the one it adds, so that no text loses anything.
_PREPENDED = _sequence("normalizers", {"type": "Prepend", "prepend": SPACE}, _replace(" ", SPACE))

# fmt: off
_LANGUAGES = (
    "ar_AR", "cs_CZ", "de_DE", "en_XX", "es_XX", "et_EE", "fi_FI", "fr_XX", "gu_IN", "hi_IN", "it_IT", "ja_XX",
    "kk_KZ", "ko_KR", "lt_LT", "lv_LV", "my_MM", "ne_NP", "nl_XX", "ro_RO", "ru_RU", "si_LK", "tr_TR", "vi_VN",
    "zh_CN",
)
# fmt: on

_QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_BERT_TEMPLATE = ("cls:0 A:0 sep:0", "cls:0 A:0 sep:0 B:1 sep:1")

CLASSES: dict[str, TokenizerClass] = {
    "T5Tokenizer": TokenizerClass(
        model="unigram",
        tokens={"eos": "</s>", "unk": "<unk>", "pad": "<pad>"},
        options={"extra_ids": 100, "add_prefix_space": True},
        normalizer=_sequence("normalizers", _CHARSMAP),
        pre_tokenizer=_WORDS,
        decoder=_FROM_PIECES,
        template=("A:0 eos:0", "A:0 eos:0 B:0 eos:0"),
        sentinels="extra_ids",
    ),
    "AlbertTokenizer": TokenizerClass(
        model="unigram",
        tokens={
            "bos": "[CLS]",
            "eos": "[SEP]",
            "unk": "<unk>",
            "sep": "[SEP]",
            "pad": "<pad>",
            "cls": "[CLS]",
            "mask": "[MASK]",
        },
        options={"do_lower_case": True, "keep_accents": False, "add_prefix_space": True},
        normalizer=_sequence(
            "normalizers",
            _replace("``", '"'),
            _replace("''", '"'),
            When("keep_accents", False, {"type": "NFKD"}),
            When("keep_accents", False, {"type": "StripAccents"}),
            When("do_lower_case", True, {"type": "Lowercase"}),
            _CHARSMAP,
        ),
        pre_tokenizer=_sequence("pretokenizers", {"type": "WhitespaceSplit"}, _metaspace(Option("always_or_never"))),
        decoder=_FROM_PIECES,
        template=_BERT_TEMPLATE,
        token_types=True,
    ),
    "BertTokenizer": TokenizerClass(
        model="wordpiece",
        tokens={"unk": "[UNK]", "sep": "[SEP]", "pad": "[PAD]", "cls": "[CLS]", "mask": "[MASK]"},
        options={"do_lower_case": True, "tokenize_chinese_chars": True, "strip_accents": None},
        normalizer={
            "type": "BertNormalizer",
            "clean_text": True,
            "handle_chinese_chars": Option("tokenize_chinese_chars"),
            "strip_accents": Option("strip_accents"),
            "lowercase": Option("do_lower_case"),
        },
        pre_tokenizer={"type": "BertPreTokenizer"},
        decoder={"type": "WordPiece", "prefix": "##", "cleanup": True},
        template=_BERT_TEMPLATE,
        token_types=True,
    ),
    "GPT2Tokenizer": TokenizerClass(
        model="bytes",
        tokens={"bos": "<|endoftext|>", "eos": "<|endoftext|>", "unk": "<|endoftext|>"},
        options={"add_prefix_space": False, "add_bos_token": False, "add_eos_token": False},
        pre_tokenizer=_byte_level(Option("add_prefix_space")),
        decoder=_byte_level(True),
    ),
    "RobertaTokenizer": TokenizerClass(  # BART's too
        model="bytes",
        tokens={
            "bos": "<s>",
            "eos": "</s>",
            "unk": "<unk>",
            "sep": "</s>",
            "pad": "<pad>",
            "cls": "<s>",
            "mask": "<mask>",
        },
        options={"add_prefix_space": False},
        pre_tokenizer=_byte_level(Option("add_prefix_space")),
        decoder=_byte_level(True),
        template=("cls:0 A:0 sep:0", "cls:0 A:0 sep:0 sep:0 B:0 sep:0"),
    ),
    "MBartTokenizer": TokenizerClass(
        model="unigram",
        tokens={
            "bos": "<s>",
            "eos": "</s>",
            "unk": "<unk>",
            "sep": "</s>",
            "pad": "<pad>",
            "cls": "<s>",
            "mask": "<mask>",
        },
        options={"src_lang": "en_XX", "add_prefix_space": True},
        pre_tokenizer=_WORDS,
        decoder=_FROM_PIECES,
        template=("A:0 eos:0 src_lang:0", "A:0 B:0 eos:0 src_lang:0"),
        head=("<s>", "<pad>", "</s>", "<unk>"),
        skip=3,
        tail=(*_LANGUAGES, "<mask>"),
    ),
    "LlamaTokenizer": TokenizerClass(
        model="bpe",
        tokens={"bos": "<s>", "eos": "</s>", "unk": "<unk>"},
        options={"add_prefix_space": True, "legacy": False, "add_bos_token": False, "add_eos_token": False},
        pre_tokenizer=_metaspace(Option("prepend_scheme"), split=False),
        decoder=_FROM_PIECES,
        padding_side="left",
        byte_fallback=True,
    ),
    "Qwen2Tokenizer": TokenizerClass(
        model="bytes",
        tokens={"eos": "<|endoftext|>", "unk": "<|endoftext|>", "pad": "<|endoftext|>"},
        options={"add_prefix_space": False, "add_bos_token": False, "add_eos_token": False},
        normalizer={"type": "NFC"},
        pre_tokenizer=_sequence(
            "pretokenizers",
            {"type": "Split", "pattern": {"Regex": _QWEN_WORDS}, "behavior": "Isolated", "invert": False},
            _byte_level(Option("add_prefix_space"), use_regex=False),
        ),
        decoder=_byte_level(True),
    ),
}

# Other names of the same classes; a final "Fast" is dropped before.
ALIASES = {
    "BartTokenizer": "RobertaTokenizer",
    "DistilBertTokenizer": "BertTokenizer",
    "ElectraTokenizer": "BertTokenizer",
    "MT5Tokenizer": "T5Tokenizer",
}

# The `model_type` of a config.json -> the class, where no tokenizer_config.json names one.
MODEL_TYPES = {
    "albert": "AlbertTokenizer",
    "bart": "RobertaTokenizer",
    "bert": "BertTokenizer",
    "electra": "BertTokenizer",
    "gpt2": "GPT2Tokenizer",
    "llama": "LlamaTokenizer",
    "mbart": "MBartTokenizer",
    "mistral": "LlamaTokenizer",
    "mt5": "T5Tokenizer",
    "qwen2": "Qwen2Tokenizer",
    "t5": "T5Tokenizer",
}

# Of these, transformers takes a tokenizer.json as it stands unless a tokenizer_config.json names a class.
GENERIC_TYPES = ("llama", "mistral")


@dataclass(frozen=True)
class Recipe:
    """How a tokenizer is trained for a family.

    Attributes:
        tokenizer_class: the class of transformers that it is for.
        tokens: the special tokens by role; together with `control` they take the first ids, in this order.
        control: the tokens that take the first ids.
        file: the name of the vocabulary file that the family's own tokenizers have.
        models: the algorithms that can be asked for, the usual one first.
        normalisation: SentencePiece's rule, or None where SentencePiece has no part.
        byte_fallback: whether unknown characters are spelt in bytes, or None where the question does not arise.
        sentinels: how many sentinels are asked for by default, or None for a family that has none.
        settings: further settings of tokenizer_config.json.
        takes_space: the roles whose token takes the space before it with it.
        lossless: keep every space: no text is changed on its way through ids and back.
    """

    tokenizer_class: str
    tokens: Mapping[str, str]
    control: tuple[str, ...]
    file: str
    models: tuple[Model, ...]
    normalisation: str | None = None
    byte_fallback: bool | None = None
    sentinels: int | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    takes_space: tuple[str, ...] = ()
    lossless: bool = False

    @property
    def rules(self) -> TokenizerClass:
        """What its tokenizers do: as the class, unless they are to be lossless."""
        rules = CLASSES[ALIASES.get(self.tokenizer_class, self.tokenizer_class)]
        return replace(rules, normalizer=_PREPENDED, pre_tokenizer=None) if self.lossless else rules


_BERT_RECIPE = Recipe(
    tokenizer_class="BertTokenizer",
    tokens=CLASSES["BertTokenizer"].tokens,
    control=("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"),
    file="vocab.txt",
    models=("wordpiece",),
    # Stripping accents takes Korean syllables apart, here and in ALBERT's, so it has to be asked for.
    settings={"do_lower_case": True, "strip_accents": False},
)

# GPT-2 and Llama name no padding token. Here they get one of their own: with the end token in that part, whoever
# leaves padding out of the loss by its id also never learns to end a text.
RECIPES: dict[str, Recipe] = {
    "t5": Recipe(
        tokenizer_class="T5Tokenizer",
        tokens=CLASSES["T5Tokenizer"].tokens,
        control=("<pad>", "</s>", "<unk>"),
        file="spiece.model",
        models=("unigram", "bpe"),
        normalisation="nmt_nfkc",
        byte_fallback=True,
        sentinels=100,
    ),
    "bert": _BERT_RECIPE,
    "electra": _BERT_RECIPE,
    "albert": Recipe(
        tokenizer_class="AlbertTokenizer",
        tokens=CLASSES["AlbertTokenizer"].tokens,
        control=("<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]"),
        file="spiece.model",
        models=("unigram", "bpe"),
        normalisation="nmt_nfkc",
        byte_fallback=True,
        settings={"do_lower_case": True, "keep_accents": True},
    ),
    "bart": Recipe(
        tokenizer_class="BartTokenizer",
        tokens=CLASSES["RobertaTokenizer"].tokens,
        control=("<s>", "<pad>", "</s>", "<unk>", "<mask>"),
        file="vocab.json",
        models=("bytes",),
        takes_space=("mask",),
    ),
    "gpt2": Recipe(
        tokenizer_class="GPT2Tokenizer",
        tokens={**CLASSES["GPT2Tokenizer"].tokens, "pad": "<|pad|>"},
        control=("<|endoftext|>", "<|pad|>"),
        file="vocab.json",
        models=("bytes",),
    ),
    "llama": Recipe(
        tokenizer_class="LlamaTokenizer",
        tokens={**CLASSES["LlamaTokenizer"].tokens, "pad": "<pad>"},
        control=("<unk>", "<s>", "</s>", "<pad>"),
        file="tokenizer.model",
        models=("bpe", "unigram"),
        normalisation="identity",
        byte_fallback=True,
        settings={"add_bos_token": True, "add_eos_token": False},
        lossless=True,
    ),
}


def derived(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options together with those that follow from them: where a first space is added."""
    prefixed = bool(options.get("add_prefix_space"))
    first = "always" if options.get("legacy") else "first"
    return {
        **options,
        "always_or_never": "always" if prefixed else "never",
        "prepend_scheme": first if prefixed else "never",
        "has_charsmap": bool(options.get("charsmap")),
    }


def resolve(spec: Spec, options: Mapping[str, Any]) -> Spec:
    """The JSON of a part: options replaced by their values, parts that do not apply left out."""
    if isinstance(spec, Option):
        return options[spec.name]
    if isinstance(spec, list):
        kept = [each.part if isinstance(each, When) else each for each in spec if _applies(each, options)]
        return [resolve(each, options) for each in kept]
    if isinstance(spec, dict):
        return {key: resolve(value, options) for key, value in spec.items()}
    return spec


def bound(spec: Spec, options: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a part that options decide, with their values."""
    if not isinstance(spec, dict):
        return {}
    return {key: options[value.name] for key, value in spec.items() if isinstance(value, Option)}


def _applies(spec: Spec, options: Mapping[str, Any]) -> bool:
    return not isinstance(spec, When) or options.get(spec.name) == spec.value
