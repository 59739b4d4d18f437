"""Another vocabulary for a trained model: fewer rows of the token table, or more, with the tokenizer to match.

A token is a row of the token table and, in a head of its own, a row of the output and an entry of its bias. Dropping
the rows that a text never needs changes no logit of the others (Abdaoui et al. 2020, "Load What You Need"), provided
that the tokenizer still cuts the text in the same way (`lathe.text.cut` says why it does). Factorised and tied tables
need nothing more: all of it happens along the one axis `vocab`.

A new piece starts from the mean of the old pieces that spelt it, in every one of those tensors, so that the model
knows something of it from the start; the logits of old pieces stay as they are, and text that holds no new piece is
read as before. A row that stands for no piece (which fills the table up to a multiple, say) is the mean of all rows:
its logit is the mean of the others' and so never the largest.

Ids are numbered anew, so the ids that an architecture, a config or generation settings hold are too.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lathe.architecture import Architecture, Tokens
from lathe.errors import RequestError
from lathe.model.transformer import Transformer
from lathe.reshape.calibrate import Batch
from lathe.reshape.operation import Context, Operation
from lathe.reshape.state import State, Step, blocks
from lathe.reshape.stream import StreamedTransformer, weights_of
from lathe.text.corpus import Corpus
from lathe.text.cut import Pieces, cut_pieces
from lathe.text.grow import grow, spelt
from lathe.text.learn import learn
from lathe.text.rewritten import Rewritten, Rows, unchanged
from lathe.text.tokenizer import Tokenizer
from lathe.text.use import Use, counted, use_of

LARGEST_MULTIPLE = 1 << 16


@dataclass(frozen=True)
class Vocabulary:
    """What a model's vocabulary shall be, beside its size (`vocab_size=`).

    Args:
        corpus: text whose pieces are kept, or of which new pieces are learnt: texts, or `Path`s of UTF-8 files.
        words: words that shall be pieces of their own.
        ids: the ids to keep, for whoever has chosen them already; the only way for a model without a tokenizer and
            without text. The ids that the model itself needs are kept as well.
        multiple_of: rows are added until their number is a multiple of this. The tokenizer does not have them.

    >>> import lathe
    >>> tiny = lathe.preset("gpt2").with_(d_model=24, n_heads=2, d_head=12, d_ff=48, n_layers=1, vocab_size=500)
    >>> padded = lathe.resize(lathe.Model(tiny, seed=0), vocabulary=lathe.Vocabulary(multiple_of=64))
    >>> padded.architecture.embedding.vocab_size
    512
    """

    corpus: Corpus | None = None
    words: Sequence[str] = ()
    ids: Sequence[int] | None = None
    multiple_of: int = 1

    @property
    def told(self) -> dict[str, Any]:
        """What is asked, as words of a request; texts and ids are not among them."""
        words = {"words": list(self.words)} if self.words else {}
        return words | ({"multiple_of": self.multiple_of} if self.multiple_of > 1 else {})

    def __post_init__(self) -> None:
        if isinstance(self.words, str):
            raise RequestError("words is one string: pass a list of words")
        if type(self.multiple_of) is not int or not 1 <= self.multiple_of <= LARGEST_MULTIPLE:
            raise RequestError(
                f"multiple_of={self.multiple_of!r}: expected a whole number from 1 to 65,536, such as 64"
            )
        if self.corpus is not None and not isinstance(self.corpus, os.PathLike | Iterable):
            raise RequestError(
                f"vocabulary={self.corpus!r}: expected text, as a list or a Path, or a lathe.Vocabulary; how many "
                "tokens there shall be is vocab_size"
            )
        if self.ids is not None and (self.corpus is not None or self.words):
            raise RequestError(
                "ids says what is kept, so there is no use for a corpus or words beside it; leave one out"
            )


@dataclass(frozen=True)
class Renewed:
    """A vocabulary as it is to be.

    Args:
        rows: for each new id, the old ids whose mean it starts from; one for an old token, none for the mean of all.
        ids: the tokens that stay, old id to new.
        tokens: the ids that the architecture holds, as they are now.
        tokenizer: None where the model has none.
        step: what it is called, and what is known of its cost.
    """

    rows: Rows
    ids: Mapping[int, int]
    tokens: Tokens
    tokenizer: Tokenizer | None
    step: Step

    @property
    def changes(self) -> dict[str, Any]:
        """The fields of the architecture that it settles."""
        return {"embedding.vocab_size": len(self.rows), "tokens": self.tokens}

    def applied(self, state: State) -> State:
        """The model with this vocabulary in place of the one that it was settled for."""
        changed = state.blank()
        for parameter, dim in state.along("vocab"):
            changed[parameter.name] = _gathered(state.tensors[parameter.name], dim, self.rows)
        return state.with_(changed, self.changes)

    def model(self, model: Transformer) -> Transformer:
        """A model with this vocabulary in place of its own, otherwise as it is: a teacher for one that has it."""
        state = self.applied(State(model.architecture, weights_of(model)))
        if isinstance(model, StreamedTransformer):
            return StreamedTransformer(state.architecture, state.copied())
        made = Transformer(state.architecture, device="meta")
        made.load_state_dict(dict(state.tensors), assign=True)
        return made.train(model.training)


# --- settling -------------------------------------------------------------------------------------------------


def settle(
    architecture: Architecture,
    changes: Mapping[str, Any],
    tokenizer: Tokenizer | None,
    asked: Vocabulary | None,
    *,
    batches: Iterable[Batch] = (),
    reserved: Iterable[int] = (),
) -> Renewed | None:
    """The vocabulary that changes of the architecture and a request lead to; None where they leave it as it is.

    Args:
        changes: fields of the architecture; only the vocabulary's size is looked at.
        batches: token ids to count the use of tokens in, where `asked` has no corpus.
        reserved: further ids to keep, such as those in generation settings.

    Raises:
        RequestError: a size that is too small for what has to be kept (says the least), growth without a corpus or
            words, a corpus that is empty or that the tokenizer cannot read, a word that is a piece already.
    """
    sizes = [value for name, value in changes.items() if architecture.paths(name) == ["embedding.vocab_size"]]
    size = architecture.with_(vocab_size=sizes[-1]).embedding.vocab_size if sizes else None
    if asked is None and size in (None, architecture.embedding.vocab_size):
        return None
    if asked == Vocabulary() and size is None:
        raise RequestError("the vocabulary asks for nothing: give a corpus, words, ids or multiple_of")
    settling = _Settling(architecture, size, asked or Vocabulary(), batches, reserved)
    return settling.without_tokenizer() if tokenizer is None else settling.with_tokenizer(tokenizer)


def _with_pieces(change: Rewritten, new: Sequence[str]) -> Rewritten:
    return change.then(grow(change.tokenizer, new)) if new else change


class _Settling:
    """What is known while a vocabulary is settled."""

    def __init__(
        self,
        architecture: Architecture,
        size: int | None,
        asked: Vocabulary,
        batches: Iterable[Batch],
        reserved: Iterable[int],
    ) -> None:
        self.architecture, self.size, self.asked, self.batches = architecture, size, asked, batches
        self.before = architecture.embedding.vocab_size
        self.own = sorted(token_ids(architecture.tokens))
        self.keep = {number for number in (*self.own, *reserved) if 0 <= number < self.before}
        if asked.ids is not None:
            if size is not None:
                raise RequestError(f"vocab_size={size:,}: ids says already which tokens to keep; leave one of them out")
            if wrong := [number for number in asked.ids if not 0 <= number < self.before]:
                raise RequestError(f"ids holds {wrong[0]}: expected ids from 0 to {self.before - 1:,}")

    def with_tokenizer(self, tokenizer: Tokenizer) -> Renewed:
        """Rows and tokenizer together."""
        asked, known = self.asked, tokenizer.vocab_size
        # Tokens of the model that its tokenizer does not have follow those that it has.
        outside = [number for number in self.own if number not in tokenizer.vocabulary.values()]
        room = None if self.size is None else self.size - len(outside)
        is_cut = asked.ids is not None or (room < known if room is not None else asked.corpus is not None)
        is_grown = bool(asked.words) or (asked.corpus is not None and room is not None and room > known)
        if not is_cut and not is_grown:
            return self._same_tokens(tokenizer)
        change, use = unchanged(tokenizer), None
        new = spelt(tokenizer, asked.words)
        if is_cut:
            change, use = self._cut(tokenizer, room, new)
        elif new:
            change = _with_pieces(change, new)
            if room is not None and len(change.rows) > room:
                least = len(change.rows) + len(outside)
                raise RequestError(
                    f"vocab_size={self.size:,} has no room for the new words: ask for {least:,} at least"
                )
        if room is not None and len(change.rows) < room:
            change = change.then(learn(change.tokenizer, self._corpus(), room - len(change.rows)))
        ids = {row[0]: number for number, row in enumerate(change.rows[: change.origin])}
        rows = [tuple(old for old in row if old < self.before) for row in change.rows]
        for number in outside:
            ids[number] = len(rows)
            rows.append((number,))
        return self._renewed(rows, ids, change.tokenizer, use)

    def without_tokenizer(self) -> Renewed:
        """Rows alone, by their ids."""
        asked = self.asked
        if asked.corpus is not None or asked.words:
            raise RequestError("this model has no tokenizer to read text with: give it one, or say which ids to keep")
        use: Mapping[int, int] | None = None
        if asked.ids is not None:
            kept = sorted(self.keep | set(asked.ids))
        elif self.size is None or self.size >= self.before:
            return self._same_tokens(None)
        else:
            use = self._counts()
            if self.size < len(self.keep):
                raise self._too_small(len(self.keep))
            order = sorted(set(range(self.before)) - self.keep, key=lambda number: (-use.get(number, 0), number))
            kept = sorted([*self.keep, *order[: self.size - len(self.keep)]])
        return self._renewed([(old,) for old in kept], {old: number for number, old in enumerate(kept)}, None, use)

    def _same_tokens(self, tokenizer: Tokenizer | None) -> Renewed:
        """More or fewer of the rows that stand for no token."""
        least = 0 if tokenizer is None else tokenizer.vocab_size
        most = max(self.before, least)
        size = most if self.size is None else self.size
        if size > most:
            raise RequestError(
                f"vocab_size={size:,}: the model has {most:,}; new tokens need words=[…], or a text to learn them "
                "from (vocabulary=FILE), and a tokenizer. For rows without a token ask for multiple_of=64 instead"
            )
        if self.own and size <= self.own[-1]:
            raise self._too_small(self.own[-1] + 1)
        kept = range(min(size, self.before))
        rows = [(number,) if number < self.before else () for number in range(size)]
        return self._renewed(rows, {number: number for number in kept}, tokenizer, None)

    def _cut(
        self, tokenizer: Tokenizer, room: int | None, new: Sequence[str]
    ) -> tuple[Rewritten, Mapping[int, int] | None]:
        """The pieces that stay, as many as there is room for beside the new; and how often the text uses each."""
        held = set(tokenizer.vocabulary.values())
        pieces = Pieces(tokenizer, self.keep & held)
        self._require_room(pieces, room, 0)
        if self.asked.ids is not None:
            return cut_pieces(pieces, self.asked.ids), None
        if self.asked.corpus is not None:
            use: Use = use_of(tokenizer, self.asked.corpus)
        else:
            use = counted({n: c for n, c in self._counts(tokenizer).items() if n in held}, tokenizer)
        made, taken = _with_pieces(cut_pieces(pieces, pieces.most_used(use.counts, room)), new), 0
        # The more is dropped, the more ids new pieces may take: what they are joined of is dropped as well.
        while room is not None and (over := len(made.rows) - room) > 0:
            taken += over
            self._require_room(pieces, room, taken)
            made = _with_pieces(cut_pieces(pieces, pieces.most_used(use.counts, room - taken)), new)
        return made, use.counts

    def _require_room(self, pieces: Pieces, room: int | None, taken: int) -> None:
        """Refuse a size that does not hold what has to stay, and the new words."""
        if self.size is None or room is None or room - taken >= len(pieces.required):
            return
        kept = f"special tokens, sentinels{', the new words' if taken else ''} and what spells single bytes"
        least = len(pieces.required) + taken + self.size - room
        raise RequestError(f"vocab_size={self.size:,} is too small: {kept} take {least:,}; ask for that at least")

    def _corpus(self) -> Corpus:
        if self.asked.corpus is None:
            raise RequestError(
                f"vocab_size={self.size:,} leaves room for more pieces than the new words: give a text to learn them "
                "from (vocabulary=FILE), or leave vocab_size out"
            )
        return self.asked.corpus

    def _counts(self, tokenizer: Tokenizer | None = None) -> Counter[int]:
        """How often the calibration text uses each id: the text itself, without what is set around it and into it."""
        counts: Counter[int] = Counter()
        for batch in self.batches:
            for text_N in self._text_of(batch):
                ids, times = text_N.unique(return_counts=True)
                counts.update(dict(zip(ids.tolist(), times.tolist(), strict=True)))
        special = set(self.own)
        if tokenizer is not None:  # what is unknown to it stands for text
            special |= tokenizer.special_ids - {tokenizer.unk_id}
        counts = Counter({number: times for number, times in counts.items() if number not in special})
        if not counts:
            raise RequestError(
                f"vocab_size={self.size:,}: which of {self.before:,} tokens to keep is seen from text; give it "
                "(vocabulary=FILE), or calibration text of the kind that the model is used on"
            )
        return counts

    def _text_of(self, batch: Batch) -> Iterator[Tensor]:
        """The tokens of a batch, each once: none of padding, and where some were hidden the ones that stood there."""
        stacks, labels_BT = self.architecture, None
        if stacks.head.language is not None and "labels" in batch:  # else they are no tokens
            labels_BT = torch.as_tensor(batch["labels"])
        written = "decoder_" if stacks.encoder is not None and stacks.decoder is not None else ""
        for side in dict.fromkeys(("", written)):
            hidden_BT = labels_BT if side == written else None
            ids_BT = torch.as_tensor(batch[f"{side}input_ids"]) if f"{side}input_ids" in batch else hidden_BT
            if ids_BT is None:
                continue
            counted_BT = ids_BT >= 0
            for name, least in ((f"{side}attention_mask", 1), (f"{side}segment_ids", 0)):
                if name in batch:
                    counted_BT = counted_BT & (torch.as_tensor(batch[name]) >= least)
            if hidden_BT is not None and hidden_BT.shape == ids_BT.shape:
                ids_BT = torch.where(hidden_BT >= 0, hidden_BT, ids_BT)
            yield ids_BT[counted_BT]

    def _too_small(self, least: int) -> RequestError:
        return RequestError(
            f"vocab_size={self.size:,} is too small: the tokens that the model itself needs take {least:,}; ask for "
            "that at least"
        )

    def _renewed(
        self,
        rows: Sequence[tuple[int, ...]],
        ids: Mapping[int, int],
        tokenizer: Tokenizer | None,
        counts: Mapping[int, int] | None,
    ) -> Renewed:
        size = -(-len(rows) // self.asked.multiple_of) * self.asked.multiple_of
        padded = (*rows, *[()] * (size - len(rows)))
        known = self.before if tokenizer is None else tokenizer.vocab_size
        new = sum(len(row) > 1 or (bool(row) and ids.get(row[0]) != number) for number, row in enumerate(padded))
        is_cut = len(ids) < min(self.before, known)
        verb = ("change" if is_cut else "grow") if new else "cut" if is_cut or size <= self.before else "pad"
        name = f"{verb} vocabulary {self.before:,} → {size:,}"
        is_exact, detail = not new and not is_cut, dict[str, float]()
        if counts is not None:
            kept = sum(count for number, count in counts.items() if number in ids)
            detail["text"] = kept / sum(counts.values())
            is_exact = not new and kept == sum(counts.values())
        tokens = _renumbered_tokens(self.architecture.tokens, ids)
        measures = "share of the text's tokens that are kept"
        return Renewed(padded, ids, tokens, tokenizer, Step(name, is_exact, detail, measures))


# --- the operation ----------------------------------------------------------------------------------------------


def plan_vocabulary(done: Architecture, target: Architecture, *, is_asked: bool = False) -> list[Operation]:
    """An operation where the vocabulary becomes another, which `settle` has settled by the time that it runs.

    Args:
        is_asked: whether it does even at an unchanged size.
    """
    if done.embedding.vocab_size == target.embedding.vocab_size and not is_asked:
        return []
    changes = {"embedding.vocab_size": target.embedding.vocab_size, "tokens": target.tokens}
    return [Operation(changes, _renew)]


def _renew(context: Context, state: State) -> tuple[State, list[Step]]:
    assert context.vocabulary is not None
    context.tokenizer = context.vocabulary.tokenizer
    return context.vocabulary.applied(state), [context.vocabulary.step]


def _gathered(tensor: Tensor, dim: int, rows: Rows) -> Tensor:
    """The rows of a tensor along `dim`: as they are, or means of several, taken in float64."""
    lying = tensor.detach().movedim(dim, 0)
    out = lying.index_select(0, torch.tensor([row[0] if row else 0 for row in rows], device=lying.device))
    means: dict[tuple[int, ...], Tensor] = {}
    for number, row in enumerate(rows):
        if len(row) == 1:
            continue
        if row not in means:
            some = lying[list(row)] if row else lying
            zero = torch.zeros((), dtype=torch.float64, device=some.device)
            total = sum((some[part].to(torch.float64).sum(0) for part in blocks(some)), zero)
            means[row] = (total / len(some)).to(lying.dtype)
        out[number] = means[row]
    return out.movedim(0, dim).contiguous()


# --- ids elsewhere ------------------------------------------------------------------------------------------------

_LISTS = ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "force_words_ids")


def token_ids(tokens: Tokens) -> set[int]:
    """The ids that an architecture holds."""
    single = {tokens.pad, tokens.bos, tokens.decoder_start, tokens.mask}
    return {number for number in single if number is not None} | set(tokens.eos)


def settings_ids(settings: Mapping[str, Any]) -> set[int]:
    """The token ids in a config or in generation settings."""
    found: set[int] = set()

    def note(number: int) -> int:
        found.add(number)
        return number

    _each_id(settings, note)
    return found


def renumbered_settings(settings: Mapping[str, Any], ids: Mapping[int, int]) -> dict[str, Any]:
    """A config or generation settings with new token ids, None for those that are gone."""
    return _each_id(settings, ids.get)


def _each_id(settings: Mapping[str, Any], change: Callable[[int], int | None]) -> dict[str, Any]:
    def walk(value: Any) -> Any:
        if isinstance(value, list | tuple):
            changed = [walk(each) for each in value]
            return [each for each in changed if each is not None]
        return change(value) if type(value) is int else value

    out = {}
    for key, value in settings.items():
        if key.endswith(("_token_id", "_token_ids")) or key in _LISTS:
            out[key] = walk(value)
        elif key == "forced_decoder_ids" and isinstance(value, list):  # pairs of place and id
            out[key] = [[place, walk(number)] for place, number in value]
        elif key == "sequence_bias" and isinstance(value, list):  # pairs of a run of ids and what it weighs
            out[key] = [[walk(run), weight] for run, weight in value]
        elif key == "task_specific_params" and isinstance(value, dict):
            out[key] = {task: _each_id(of, change) if isinstance(of, dict) else of for task, of in value.items()}
        else:
            out[key] = value
    return out


def _renumbered_tokens(tokens: Tokens, ids: Mapping[int, int]) -> Tokens:
    single = {name: getattr(tokens, name) for name in ("pad", "bos", "decoder_start", "mask")}
    moved = {name: None if number is None else ids[number] for name, number in single.items()}
    return replace(tokens, **moved, eos=tuple(ids[number] for number in tokens.eos))
