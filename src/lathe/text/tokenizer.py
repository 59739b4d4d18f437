"""Text to ids and back, for every family's tokenizer.

    tokenizer = Tokenizer.load("checkpoints/t5-small")
    batch = tokenizer(["A short text.", "Another text, a little longer."])   # tensors for model(**batch)
    tokenizer.decode(batch.input_ids[0])

A tokenizer is the bytes of its files together with the engine built from them (`pipeline`), so `save` gives back
what `load` read. What a given tokenizer does stands in its files; nothing here depends on the family.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

from lathe.errors import RequestError
from lathe.text import files as names
from lathe.text import pipeline
from lathe.text.batch import Batch, Padding, Side, pad, row_length, share
from lathe.text.conventions import SENTINEL, SPACE
from lathe.text.settings import Settings, read_model_type, read_settings
from lathe.text.template import DEFAULT, render, stored_templates
from lathe.text.templates import TEMPLATES

if TYPE_CHECKING:
    import tokenizers
    from torch import Tensor


class Tokenizer:
    """A trained vocabulary and its conventions. Make one with `Tokenizer.load` or `train_tokenizer`.

    Example:
        >>> from lathe.text import train_tokenizer
        >>> tokenizer = train_tokenizer(["to be or not to be"] * 9, 18, convention="bert")
        >>> ids = tokenizer(["to be", "or"]).input_ids
        >>> [tokenizer.pieces(row) for row in ids.tolist()]
        [['[CLS]', 'to', 'be', '[SEP]'], ['[CLS]', 'or', '[SEP]', '[PAD]']]
    """

    def __init__(self, files: Mapping[str, bytes], settings: Settings, engine: tokenizers.Tokenizer) -> None:
        self._files = dict(files)
        self._settings = settings
        self._engine = engine

    @classmethod
    def load(cls, directory: str | os.PathLike[str], *, convention: str | None = None) -> Tokenizer:
        """Open the tokenizer in a directory, in any of the forms that the families' own come in.

        Args:
            directory: holds `tokenizer.json`, or a family's vocabulary file (`spiece.model`, `tokenizer.model`,
                `sentencepiece.bpe.model`, `vocab.txt`, or `vocab.json` and `merges.txt`) with something that says
                how it is used: `tokenizer_config.json`, or the model's `config.json`.
            convention: says how the vocabulary file is used, where the files do not: `t5`, `bert`, `albert`, …

        Raises:
            RequestError: no tokenizer there, a damaged file, or files that do not say what they are.
        """
        path = Path(directory).expanduser()
        files = names.read(path)
        model = path / names.MODEL_CONFIG
        try:
            model_type = read_model_type(model.read_bytes()) if model.is_file() else None
            return cls.from_files(files, convention=convention, model_type=model_type)
        except RequestError as error:
            raise RequestError(f"{path}: {error}") from error

    @classmethod
    def from_files(
        cls, files: Mapping[str, bytes], *, convention: str | None = None, model_type: str | None = None
    ) -> Tokenizer:
        """Make a tokenizer of its files, given by name; see `load`.

        Args:
            model_type: what the model's `config.json` says, used if the files name no tokenizer class.
        """
        import tokenizers

        settings = read_settings(files, convention=convention, model_type=model_type)
        document = pipeline.build(files, settings)
        try:
            engine = tokenizers.Tokenizer.from_str(pipeline.dump(document))
        except Exception as error:  # the library raises no narrower class, whatever is wrong
            found = next(name for name in names.VOCABULARIES if name in files)
            reason = " ".join(str(error).split())[:160]
            raise RequestError(f"{found} is not a vocabulary that can be used ({reason})") from error
        for token in document["added_tokens"]:
            number = engine.token_to_id(token["content"])
            if number != token["id"]:
                # The library numbers added tokens one after the other, whatever the file says.
                raise RequestError(
                    f"{names.TOKENIZER} gives the token {token['content']!r} the id {token['id']}, but it follows the "
                    f"others as {number}: added tokens cannot leave ids out"
                )
        engine.encode_special_tokens = settings.split_special_tokens
        return cls(files, settings, engine)

    @staticmethod
    def is_in(directory: str | os.PathLike[str]) -> bool:
        """Whether a directory holds a tokenizer."""
        return names.is_in(Path(directory).expanduser())

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write the tokenizer's files into a directory, which is made if need be.

        Files that were loaded are written byte for byte, but for a `tokenizer_config.json` that names no class, or
        is missing. The class was then known from the model's `config.json`; it is added, so that the tokenizer
        stays what it is without that file.

        Raises:
            RequestError: another tokenizer is there already, or the directory cannot be written to.
        """
        names.write(self.files, Path(directory).expanduser())

    # --- what it is made of ----------------------------------------------------------------------------

    def __len__(self) -> int:
        return self.vocab_size

    def __repr__(self) -> str:
        model = type(self._engine.model).__name__
        return f"Tokenizer({model}, vocab_size={self.vocab_size}, special={self._settings.roles})"

    @property
    def files(self) -> dict[str, bytes]:
        """The files that it is made of, by name; what `save` writes."""
        config = names.read_json(self._files, names.CONFIG)
        if config.get("tokenizer_class") is not None or self._settings.tokenizer_class is None:
            return dict(self._files)
        named = names.to_json({**config, "tokenizer_class": self._settings.tokenizer_class})
        return {**self._files, names.CONFIG: named}

    @property
    def settings(self) -> Settings:
        """What its files say beside the vocabulary."""
        return self._settings

    @property
    def engine(self) -> tokenizers.Tokenizer:
        """What runs it, of the `tokenizers` library."""
        return self._engine

    @cached_property
    def vocabulary(self) -> dict[str, int]:
        """Every token with its id, added tokens among them."""
        return self._engine.get_vocab(with_added_tokens=True)

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest id: the rows that an embedding needs, added tokens and sentinels included."""
        return 1 + max(self.vocabulary.values(), default=-1)

    def token_id(self, token: str) -> int | None:
        """The id of a token; None if the vocabulary has no such token."""
        return self._engine.token_to_id(token)

    @property
    def pad_id(self) -> int | None:
        """Fills short rows of a batch."""
        return self._role("pad")

    @property
    def bos_id(self) -> int | None:
        """Begins a text."""
        return self._role("bos")

    @property
    def eos_id(self) -> int | None:
        """Ends a text."""
        return self._role("eos")

    @property
    def unk_id(self) -> int | None:
        """Stands for what the vocabulary cannot spell."""
        return self._role("unk")

    @property
    def mask_id(self) -> int | None:
        """Stands for a token to be guessed."""
        return self._role("mask")

    @property
    def cls_id(self) -> int | None:
        """The first position, which a classifier reads."""
        return self._role("cls")

    @property
    def sep_id(self) -> int | None:
        """Ends each text of a pair."""
        return self._role("sep")

    @cached_property
    def sentinels(self) -> tuple[int, ...]:
        """The ids of `<extra_id_0>`, `<extra_id_1>`, …, which stand for spans; empty if there are none."""
        found: list[int] = []
        while True:
            name = SENTINEL.format(len(found))
            # mT5 keeps its sentinels as pieces that begin a word.
            number = self.token_id(name)
            number = self.token_id(SPACE + name) if number is None else number
            if number is None:
                return tuple(found)
            found.append(number)

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """The ids that stand for no text: those with a role, sentinels, languages, and other special tokens."""
        added = self._engine.get_added_tokens_decoder()
        special = {number for number, token in added.items() if token.special}
        roles = {self._role(role) for role in self._settings.roles}
        return frozenset((special | {number for number in roles if number is not None}) | set(self.sentinels))

    @property
    def padding_side(self) -> Side:
        """Where a batch is filled up unless the call says otherwise."""
        return self._settings.padding_side

    @property
    def uses_token_types(self) -> bool:
        """Whether its models tell the texts of a pair apart by `token_type_ids`."""
        return self._settings.token_types

    @cached_property
    def spells_bytes(self) -> bool:
        """Whether every piece is a row of bytes, each written as one character (GPT-2's byte-level BPE)."""
        decoder = self._engine.decoder
        return decoder is not None and b'"ByteLevel"' in decoder.__getstate__()

    # --- text and ids ------------------------------------------------------------------------------------

    def encode(self, text: str, pair: str | None = None, add_special_tokens: bool = True) -> list[int]:
        """The ids of a text, or of two texts that belong together.

        Args:
            add_special_tokens: whether to set the tokens around it that the model expects.

        Raises:
            RequestError: not a string, or a string that is not valid Unicode.
        """
        return self._encodings([text], None if pair is None else [pair], add_special_tokens)[0].ids

    def encode_batch(
        self, texts: Sequence[str], pairs: Sequence[str] | None = None, add_special_tokens: bool = True
    ) -> list[list[int]]:
        """The ids of many texts at once, in parallel; as `encode`."""
        return [each.ids for each in self._encodings(texts, pairs, add_special_tokens)]

    def encode_spans(self, texts: Sequence[str]) -> list[tuple[list[int], list[tuple[int, int]]]]:
        """The ids of many texts without special tokens, and for each id the characters that it stands for.

        Raises:
            RequestError: as `encode`.
        """
        found = self._encodings(texts, None, False, spans=True)
        return [(each.ids, each.offsets) for each in found]

    def decode(
        self,
        ids: Sequence[int] | Tensor,
        skip_special_tokens: bool = True,
        errors: Literal["strict", "replace"] = "strict",
    ) -> str:
        """The text that ids spell.

        Args:
            ids: a row of ids, as a list or a one-dimensional tensor.
            skip_special_tokens: leave out `</s>`, sentinels and the like.
            errors: "replace" shows an id that has no token as U+FFFD. A model whose embedding has more rows than
                the vocabulary has tokens can produce one.

        Raises:
            RequestError: an id that is outside the vocabulary; names the id, its position and the vocabulary.
        """
        if errors not in ("strict", "replace"):
            raise RequestError(f"errors={errors!r}: expected 'strict' or 'replace'")
        row = _row(ids)
        if errors == "replace":
            return "\N{REPLACEMENT CHARACTER}".join(self._decode(run, skip_special_tokens) for run in self._runs(row))
        self.pieces(row)
        return self._decode(row, skip_special_tokens)

    def pieces(self, ids: Sequence[int] | Tensor) -> list[str]:
        """The token of each id, as the vocabulary writes it: `▁the`, `##ing`, `Ġthe`, `<0x0A>`.

        Raises:
            RequestError: an id that is outside the vocabulary.
        """
        found = []
        for position, number in enumerate(_row(ids)):
            token = self._piece(number)
            if token is None:
                raise RequestError(
                    f"id {number} at position {position} is outside the vocabulary of {self.vocab_size} tokens; "
                    "do the ids come from another tokenizer?"
                )
            found.append(token)
        return found

    def __call__(
        self,
        texts: str | Sequence[str],
        pairs: str | Sequence[str] | None = None,
        *,
        padding: Padding = "longest",
        padding_side: Side | None = None,
        truncation: bool = False,
        max_length: int | None = None,
        add_special_tokens: bool = True,
        pad_id: int | None = None,
    ) -> Batch:
        """A batch of texts as tensors, with the names that `transformers` gives them.

        Args:
            texts: one text or several; one text makes a batch of one.
            pairs: a second text for each.
            padding: "longest" (or True) fills every row up to the longest; a number, up to that; "max_length", up
                to `max_length`. None (or False) fills up nothing: the rows must be of one length.
            padding_side: "left" or "right"; default what the tokenizer's files say.
            truncation: cut texts that come out longer than `max_length`, of a pair the longer text first. Without
                it nothing is cut, however long.
            max_length: in tokens, with those that are set around the text.
            pad_id: the id to fill up with, for a tokenizer that names none. The mask hides it from the model.

        Returns:
            `input_ids`, `attention_mask` and, if the tokenizer's models take them, `token_type_ids`: int64, (B, T).

        Raises:
            RequestError: no texts, rows of unequal length without padding, no padding token, arguments that
                contradict each other.
        """
        rows = [texts] if isinstance(texts, str) else list(texts)
        others = [pairs] if isinstance(pairs, str) else None if pairs is None else list(pairs)
        length = row_length(padding, truncation, max_length)
        if padding_side not in (None, "left", "right"):
            raise RequestError(f"padding_side={padding_side!r}: expected 'left' or 'right'")
        if truncation:
            assert max_length is not None  # or row_length had raised
            encodings = self._truncated(rows, others, add_special_tokens, max_length)
        else:
            encodings = self._encodings(rows, others, add_special_tokens)
        ids = [each.ids for each in encodings]
        return pad(
            ids,
            self._padding_id(ids, padding, length, pad_id),
            side=padding_side or self.padding_side,
            length=length,
            token_types=[each.type_ids for each in encodings] if self.uses_token_types else None,
        )

    # --- conversations ---------------------------------------------------------------------------------------

    @cached_property
    def chat_templates(self) -> dict[str, str]:
        """The chat templates that came with it, by name; the one without a name is `default`."""
        return stored_templates(self._files)

    def chat_template(self, name: str | None = None) -> str:
        """A chat template's text.

        Args:
            name: of one that came with the tokenizer, or of one of `lathe.text.templates`; a text with a brace in it
                is a template itself. Default: the tokenizer's own.

        Raises:
            RequestError: there is no such template, or the tokenizer lacks the tokens that it marks turns with.
        """
        own = self.chat_templates
        known = f"expected {', '.join([*own, *(each for each in TEMPLATES if each not in own)])}"
        if name is None:
            if DEFAULT in own:
                return own[DEFAULT]
            if own:
                raise RequestError(f"this tokenizer has several chat templates and no default: {known}")
            raise RequestError(
                f"this tokenizer has no chat template, as a base model's has none: name the one that the model was "
                f"trained with ({', '.join(TEMPLATES)}), or give one in jinja"
            )
        if name in own or "{" in name:
            return own.get(name, name)
        if name not in TEMPLATES:
            raise RequestError(f"there is no chat template {name!r}: {known}, or a template in jinja")
        missing = [token for token in TEMPLATES[name].tokens if self.token_id(token) is None]
        if missing:
            raise RequestError(
                f"the chat template {name!r} marks turns with {', '.join(missing)}, which this tokenizer lacks: "
                f"name another one ({', '.join(each for each in TEMPLATES if each != name)})"
            )
        return TEMPLATES[name].source

    @overload
    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tokenize: Literal[True] = True,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        tools: object = None,
        **variables: Any,
    ) -> list[int]: ...

    @overload
    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tokenize: Literal[False],
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        tools: object = None,
        **variables: Any,
    ) -> str: ...

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tokenize: bool = True,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        tools: object = None,
        **variables: Any,
    ) -> list[int] | str:
        """A conversation as the model was trained to read it; what `transformers` gives with `return_dict=False`.

        Args:
            messages: `{"role": "user", "content": "…"}` and so on; roles are the template's to know.
            tokenize: give ids, which hold the special tokens that the template writes and no others; else the text.
            chat_template: as for `chat_template`.
            add_generation_prompt: end where an answer begins.
            tools: has to be None: Lathe calls no functions.
            variables: what else the template reads, such as `enable_thinking=False`.

        Raises:
            RequestError: tools, no such template, or messages or variables that it does not take.
        """
        for name, value in (("tools", tools), ("documents", variables.pop("documents", None))):
            if value is not None:
                raise RequestError(f"{name}: not supported; say in the system message what the model is to know")
        tokens = {f"{role}_token": token for role, token in self._settings.roles.items()}
        text = render(
            self.chat_template(chat_template),
            messages,
            tokens,
            add_generation_prompt=add_generation_prompt,
            variables=variables,
        )
        return self.encode(text, add_special_tokens=False) if tokenize else text

    # --- inside --------------------------------------------------------------------------------------------

    def _role(self, role: str) -> int | None:
        token = self._settings.roles.get(role)
        return None if token is None else self.token_id(token)

    def _piece(self, number: int) -> str | None:
        return self._engine.id_to_token(number) if 0 <= number < self.vocab_size else None

    def _runs(self, row: list[int]) -> list[list[int]]:
        """The stretches of a row between ids that have no token."""
        runs: list[list[int]] = [[]]
        for number in row:
            if self._piece(number) is None:
                runs.append([])
            else:
                runs[-1].append(number)
        return runs

    def _decode(self, row: list[int], skip_special_tokens: bool) -> str:
        text = self._engine.decode(row, skip_special_tokens=skip_special_tokens)
        # Written for WordPiece; in BPE, which keeps its spaces, it would take out spaces that were in the text.
        if self._settings.clean_up and type(self._engine.model).__name__ != "BPE":
            for old, new in _CLEAN_UP:
                text = text.replace(old, new)
        return text

    def _encodings(
        self, texts: Sequence[str], pairs: Sequence[str] | None, add_special_tokens: bool, *, spans: bool = False
    ) -> list[tokenizers.Encoding]:
        if isinstance(texts, str) or isinstance(pairs, str):
            raise RequestError("one string where a list of texts was expected: put it in a list")
        if pairs is not None and len(pairs) != len(texts):
            raise RequestError(f"{len(texts)} texts and {len(pairs)} second texts: expected as many of each")
        inputs: list[Any] = list(texts if pairs is None else zip(texts, pairs, strict=True))
        encode = self._engine.encode_batch if spans else self._engine.encode_batch_fast  # which leaves the spans out
        try:
            return encode(inputs, add_special_tokens=add_special_tokens)
        except TypeError:
            _find_bad_text([*texts, *(pairs or [])])
            raise

    def _truncated(
        self, texts: Sequence[str], pairs: Sequence[str] | None, add_special_tokens: bool, max_length: int
    ) -> list[tokenizers.Encoding]:
        around = self._engine.num_special_tokens_to_add(pairs is not None) if add_special_tokens else 0
        room = max_length - around
        if room < 0:
            raise RequestError(
                f"max_length={max_length}: {around} tokens are set around the text, so give at least that"
            )
        firsts = self._encodings(texts, None, False)
        seconds = [None] * len(firsts) if pairs is None else self._encodings(pairs, None, False)
        if len(seconds) != len(firsts):
            raise RequestError(f"{len(firsts)} texts and {len(seconds)} second texts: expected as many of each")
        whole = []
        for first, second in zip(firsts, seconds, strict=True):
            keep_first, keep_second = share(room, len(first), 0 if second is None else len(second))
            for encoding, keep in ((first, keep_first), (second, keep_second)):
                if encoding is not None and len(encoding) > keep:
                    encoding.truncate(keep, direction=self._settings.truncation_side)
            whole.append(self._engine.post_process(first, second, add_special_tokens))
        return whole

    def _padding_id(self, ids: list[list[int]], padding: Padding, length: int | None, pad_id: int | None) -> int:
        lengths = {len(row) for row in ids} | ({length} if length is not None else set())
        unequal = len(lengths) > 1
        if unequal and (padding is None or padding is False):
            raise RequestError(
                f"the texts have from {min(lengths)} to {max(lengths)} tokens, and padding={padding} fills up nothing:"
                " pass padding='longest'"
            )
        chosen = self.pad_id if pad_id is None else pad_id
        if chosen is None:
            if unequal:
                raise RequestError(
                    "this tokenizer names no padding token: pass pad_id, such as its end token's "
                    f"(pad_id={self.eos_id}); the attention mask hides it"
                )
            return 0
        if self._piece(chosen) is None:
            raise RequestError(f"pad_id={chosen} is outside the vocabulary of {self.vocab_size} tokens")
        return chosen


# What clean_up_tokenization_spaces means.
_CLEAN_UP = (
    (" .", "."),
    (" ?", "?"),
    (" !", "!"),
    (" ,", ","),
    (" ' ", "'"),
    (" n't", "n't"),
    (" 'm", "'m"),
    (" 's", "'s"),
    (" 've", "'ve"),
    (" 're", "'re"),
)


def _row(ids: Sequence[int] | Tensor) -> list[int]:
    values: Any = ids if isinstance(ids, list | tuple) else ids.tolist() if hasattr(ids, "tolist") else ids
    if not isinstance(values, Iterable):
        raise RequestError(f"one id, {values!r}, where a row of ids was expected")
    row = []
    for position, number in enumerate(values):
        try:
            row.append(operator.index(number))
        except TypeError as error:
            raise RequestError(
                f"{number!r} at position {position} is not an id: expected one row of whole numbers"
            ) from error
    return row


def _find_bad_text(texts: Sequence[object]) -> None:
    """Raise RequestError for the first that is not a string, or not valid Unicode."""
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise RequestError(f"text {number} is {type(text).__name__} {text!r:.60}: expected a string")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise RequestError(
                f"text {number} holds {text[error.start]!r} at position {error.start}, half of a surrogate pair: "
                "it was decoded wrongly, so read it again as UTF-8"
            ) from error
