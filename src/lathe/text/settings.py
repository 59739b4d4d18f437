"""What a tokenizer's JSON files say about it, beside its vocabulary.

Three generations of files say the same things. `tokenizer_config.json` names the class, the special tokens and
the settings; `special_tokens_map.json` and `added_tokens.json` are older, and are heeded, as in `transformers`,
only where `tokenizer_config.json` has no `added_tokens_decoder`. What no file says, the class decides
(`conventions`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lathe.errors import RequestError
from lathe.text import files as names
from lathe.text.batch import Side
from lathe.text.conventions import ALIASES, CLASSES, GENERIC_TYPES, MODEL_TYPES, RECIPES, ROLES, TokenizerClass, derived

_FLAGS = ("single_word", "lstrip", "rstrip", "normalized")


@dataclass(frozen=True)
class Token:
    """A token that is looked for in the text before it is cut into pieces.

    Attributes:
        special: left out when ids are decoded for a reader.
        normalized: whether it is looked for in the normalised text instead of the original.
    """

    content: str
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = False
    special: bool = True


@dataclass(frozen=True)
class Settings:
    """What the files say.

    Attributes:
        tokenizer_class: the class by its name, None where nothing says.
        rules: what that class does, None where it is not one of `conventions`.
        options: the settings that its pipeline listens to.
        roles: the special tokens by role.
        listed: the tokens that the files list with their ids.
        named: the tokens of the roles, and special tokens without a role (`others` says whether there are any):
            made known to the vocabulary if the files did not.
        padding_side, truncation_side: where a batch is filled up, and where a long text is cut.
        token_types: whether its models take token types.
        clean_up: whether decoded text loses the space before punctuation.
        split_special_tokens: whether special tokens are not looked for in text.
    """

    tokenizer_class: str | None
    rules: TokenizerClass | None
    options: dict[str, Any]
    roles: dict[str, str]
    listed: tuple[Token, ...]
    named: tuple[Token, ...]
    others: bool
    padding_side: Side
    truncation_side: Side
    token_types: bool
    clean_up: bool
    split_special_tokens: bool


def read_settings(files: Mapping[str, bytes], *, convention: str | None, model_type: str | None) -> Settings:
    """Read the settings from a tokenizer's files.

    Args:
        files: name -> bytes.
        convention: takes the place of the class that the files name: a name of RECIPES or CLASSES.
        model_type: what the model's config.json says, for files that name no class.

    Raises:
        RequestError: an unreadable file, a setting of the wrong kind, an unknown convention.
    """
    config = names.read_json(files, names.CONFIG)
    name = _class_name(config, convention, model_type, names.TOKENIZER in files)
    rules = CLASSES.get(name) if name else None
    # Llama 3 came with the class of Llama 1 and 2, which cut text in another way.
    if rules is not None and rules.model in ("unigram", "bpe") and b'"ByteLevel"' in files.get(names.TOKENIZER, b""):
        name, rules = None, None
    if "added_tokens_decoder" not in config:
        config = {**config, **names.read_json(files, names.SPECIAL_TOKENS)}
    options = {
        key: config.get(key, value) if config.get(key) is not None else value
        for key, value in (rules.options if rules else {}).items()
    }
    roles = _roles(config, rules)
    others = _others(config)
    return Settings(
        tokenizer_class=name,
        rules=rules,
        options=derived(options),
        roles={role: token.content for role, token in roles.items()},
        listed=tuple(_listed_tokens(config, files)),
        named=(*roles.values(), *others),
        others=bool(others),
        padding_side=_side(config, "padding_side", rules.padding_side if rules else "right"),
        truncation_side=_side(config, "truncation_side", "right"),
        token_types=_token_types(config, rules or CLASSES.get(MODEL_TYPES.get(model_type or "", ""))),
        clean_up=bool(config.get("clean_up_tokenization_spaces", False)),
        split_special_tokens=bool(config.get("split_special_tokens", False)),
    )


def read_model_type(config: bytes) -> str | None:
    """The `model_type` that a model's config.json names."""
    kind = names.read_json({names.MODEL_CONFIG: config}, names.MODEL_CONFIG).get("model_type")
    return kind if isinstance(kind, str) else None


def _class_name(
    config: Mapping[str, Any], convention: str | None, model_type: str | None, spelt_out: bool
) -> str | None:
    if convention is not None:
        name = RECIPES[convention].tokenizer_class if convention in RECIPES else convention
        name = ALIASES.get(name, name)
        if name not in CLASSES:
            known = ", ".join([*RECIPES, *CLASSES])
            raise RequestError(f"there is no tokenizer convention {convention!r}: expected one of {known}")
        return name
    named = config.get("tokenizer_class")
    if isinstance(named, str):
        plain = named.removesuffix("Fast")
        plain = ALIASES.get(plain, plain)
        return plain if plain in CLASSES else named
    if model_type is None or (spelt_out and model_type in GENERIC_TYPES):
        return None
    return MODEL_TYPES.get(model_type)


def _roles(config: Mapping[str, Any], rules: TokenizerClass | None) -> dict[str, Token]:
    """The tokens that the roles have: the files' word counts, null for a role that is empty."""
    found: dict[str, Token] = {}
    for role in ROLES:
        key = f"{role}_token"
        value = config[key] if key in config else (rules.tokens.get(role) if rules else None)
        if value is not None:
            found[role] = _token(value, key)
    return found


def _listed_tokens(config: Mapping[str, Any], files: Mapping[str, bytes]) -> list[Token]:
    """The tokens that the files list with ids, in the order of the ids."""
    listed = config.get("added_tokens_decoder")
    if listed is not None:
        if not isinstance(listed, dict) or not all(str(number).isdecimal() for number in listed):
            raise RequestError(f"{names.CONFIG} holds an added_tokens_decoder that is not a map of ids to tokens")
        return [
            _token(listed[number], f"added_tokens_decoder {number}", special=False)
            for number in sorted(listed, key=int)
        ]
    added = names.read_json(files, names.ADDED_TOKENS)
    if not all(isinstance(number, int) for number in added.values()):
        raise RequestError(f"{names.ADDED_TOKENS} is not a map of tokens to ids")
    special = {token.content for token in [*_roles(config, None).values(), *_others(config)]}
    return [
        Token(content, special=content in special, normalized=content not in special)
        for content in sorted(added, key=lambda token: int(added[token]))
    ]


def _others(config: Mapping[str, Any]) -> list[Token]:
    """Special tokens without a role: sentinels, languages, what a chat is marked with."""
    found = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    named = [
        value
        for key, value in config.items()
        if key.endswith("_token") and key.removesuffix("_token") not in ROLES and isinstance(value, str)
    ]
    values = list(found.values()) if isinstance(found, dict) else found
    if not isinstance(values, list):
        raise RequestError(f"the settings hold extra_special_tokens of {found!r}: expected a list of tokens")
    return [_token(value, "extra_special_tokens") for value in [*named, *values]]


def _token(value: Any, where: str, *, special: bool = True) -> Token:
    """A token as the files write one: its text, or a map with its flags."""
    if isinstance(value, str):
        return Token(value, special=special)
    if isinstance(value, dict) and isinstance(value.get("content"), str):
        flags = {flag: bool(value[flag]) for flag in _FLAGS if flag in value}
        own = bool(value.get("special", special))
        return Token(value["content"], special=own, **{"normalized": not own, **flags})
    raise RequestError(f"the settings hold {where} = {value!r}: expected a token's text, or a map with its content")


def _side(config: Mapping[str, Any], key: str, default: Side) -> Side:
    side = config.get(key, default)
    if side not in ("left", "right"):
        raise RequestError(f"{names.CONFIG} holds {key} = {side!r}: expected 'left' or 'right'")
    return "left" if side == "left" else "right"


def _token_types(config: Mapping[str, Any], rules: TokenizerClass | None) -> bool:
    inputs = config.get("model_input_names")
    if isinstance(inputs, list):
        return "token_type_ids" in inputs
    return rules.token_types if rules else False
