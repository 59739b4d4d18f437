"""Speculative decoding: a small model drafts some tokens, the large one reads them all at once and keeps what fits.

A round has three parts (Leviathan et al. 2023, algorithm 1; Chen et al. 2023, algorithm 2).

1. The draft continues each row by up to k tokens, each drawn from its distribution q.
2. The parent reads the row's last token and the k drafted ones in one pass, which gives its distribution p at
   each of the k + 1 places.
3. From left to right a drafted token x is kept with probability min(1, p(x) / q(x)). The first one that is not is
   replaced by a draw from max(0, p - q), scaled to add up to 1, and ends the round. Where all are kept, one more
   token is drawn from p.

The kept token has distribution p whatever q is: x comes out with q(x) · min(1, p(x) / q(x)) = min(p(x), q(x)) as a
kept draft, and with max(0, p(x) - q(x)) as a replacement, which add up to p(x). So the draft decides how fast the
text comes and never which. p and q are what is left after the filters, and the same filters make both: a draft that
proposed what the parent may not choose would be refused for nothing. A greedy choice is the case in which p and q
each have one token.

Rows keep different numbers of tokens. Both caches are ragged, so a row that is refused a token forgets its slot and
goes on at its own place; nothing is moved. A row draws number n of its tokens with numbers of its own for n, so
neither the other rows nor the rounds change what it draws.

Shape suffixes: B rows, T positions, V vocabulary, N numbers to draw with.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lathe.errors import RequestError
from lathe.generate.draw import draw, numbers
from lathe.generate.filters import Filter, pipeline
from lathe.generate.history import History
from lathe.generate.prompt import Prompt
from lathe.generate.rows import Rows, explain_no_numbers
from lathe.generate.settings import Settings
from lathe.generate.single import Task, refuse_nothing_left
from lathe.model.output import Output
from lathe.model.transformer import Transformer

# The numbers that each new token may need: its draft's draw, whether that is kept, and what is drawn instead.
_DRAFT, _KEEP, _INSTEAD = range(3)


@dataclass(frozen=True)
class Speculation:
    """What the draft was good for.

    Args:
        proposed_R: how many drafted tokens the parent judged in each row.
        accepted_R: how many of them it kept.
        passes: how often the parent was run after the prompt; without a draft it is once a token.
    """

    proposed_R: Tensor
    accepted_R: Tensor
    passes: int

    @property
    def acceptance(self) -> float:
        """The share of the judged tokens that were kept; 0 where none was judged."""
        return int(self.accepted_R.sum()) / max(1, int(self.proposed_R.sum()))


@dataclass(frozen=True)
class Found:
    """The new tokens of each row, what they are worth, and how they came about; fields as in `Decoded`."""

    tokens_RT: Tensor
    log_probs_RT: Tensor
    lengths_R: Tensor
    ended_R: Tensor
    speculation: Speculation


def check_pair(parent: Transformer, draft: Transformer, settings: Settings, num_draft_tokens: int) -> None:
    """Raise RequestError where `draft` cannot draft for `parent`, or the settings have no use for a draft."""
    if type(num_draft_tokens) is not int or num_draft_tokens < 1:
        raise RequestError(f"num_draft_tokens={num_draft_tokens!r}: expected a whole number of at least 1")
    if settings.num_beams > 1:
        raise RequestError(f"num_beams={settings.num_beams} with a draft: beams are not drafted; pass num_beams=1")
    sizes = [model.architecture.embedding.vocab_size for model in (parent, draft)]
    if sizes[0] != sizes[1]:
        raise RequestError(
            f"the draft has a vocabulary of {sizes[1]:,} tokens and the model one of {sizes[0]:,}; "
            "expected a draft with the model's tokenizer, such as a resized copy of it"
        )
    ours, theirs = (getattr(model, "tokenizer", None) for model in (parent, draft))  # `lathe.Model` carries its own
    if ours is not None and theirs is not None and ours.vocabulary != theirs.vocabulary:
        raise RequestError(
            "the draft's tokenizer has other tokens than the model's; "
            "expected a draft with the model's tokenizer, such as a resized copy of it"
        )
    if (parent.encoder is None) != (draft.encoder is None):
        kinds = ["a decoder" if model.encoder is None else "an encoder-decoder" for model in (parent, draft)]
        raise RequestError(f"the draft is {kinds[1]} and the model {kinds[0]}; expected a draft of the same kind")
    if parent.device != draft.device:
        raise RequestError(f"the draft is on {draft.device} and the model on {parent.device}; expected one device")


@torch.no_grad()
def speculate(parent: Task, draft: Task, num_draft_tokens: int) -> Found:
    """Decode `parent` to the end, with `draft` proposing up to `num_draft_tokens` tokens a round.

    Args:
        parent, draft: the same prompts and settings with one model each; `check_pair` has passed.

    Raises:
        RequestError: filters that leave a row no token.
    """
    texts = _Texts.of(parent)
    filters, settings = pipeline(parent.settings), parent.settings
    copies = settings.num_return_sequences
    u_BN3 = None
    if settings.do_sample:
        u_BN = numbers(settings, len(texts.new_B) // copies, 3 * parent.max_new, texts.ids_BT.device, copies=copies)
        u_BN3 = u_BN.unflatten(1, (-1, 3))
    for rows in (parent.rows, draft.rows):
        rows.prefill()
        rows.spread(copies)
    proposed_B, accepted_B = torch.zeros_like(texts.new_B), torch.zeros_like(texts.new_B)
    passes = 0
    while not bool(texts.over_B.all()):
        # The parent adds one token of its own, so one fewer than there is room for is drafted.
        room_B = (parent.max_new - texts.new_B - 1).clamp(max=num_draft_tokens).masked_fill(texts.over_B, 0)
        q_BTV = _propose(draft.rows, texts, filters, u_BN3, room_B)
        start_B = texts.new_B.clone()
        logits_BTV = _read(parent.rows, texts, start_B - 1, (1 + room_B).masked_fill(texts.over_B, 0))
        passes += 1
        active_B = ~texts.over_B
        for place in range(logits_BTV.shape[1]):
            judged_B = active_B & (place < room_B)
            kept_B = _settle(texts, filters, u_BN3, logits_BTV[:, place], q_BTV[:, place], active_B, judged_B)
            proposed_B += judged_B
            accepted_B += kept_B
            active_B = kept_B & ~texts.over_B
            if not bool(active_B.any()):
                break
    longest = int(texts.new_B.max())
    new_BT = texts.ids_BT[:, texts.columns : texts.columns + longest]
    past_BT = torch.arange(longest, device=new_BT.device) >= texts.new_B[:, None]
    return Found(
        new_BT.masked_fill(past_BT, settings.filler),
        texts.log_probs_BT[:, :longest],
        texts.new_B,
        texts.ended_B,
        Speculation(proposed_B, accepted_B, passes),
    )


@dataclass
class _Texts:
    """The rows' texts, each as long as it is: row i holds `new_B[i]` tokens after its prompt.

    Args:
        task: the parent's.
        ids_BT: the prompts, padded on the left, then the new tokens and behind them drafted ones.
        columns: how many of them are the prompt.
        ended_B: whether an end-of-sequence token or a stop string ended the row.
    """

    task: Task
    ids_BT: Tensor
    pads_B: Tensor
    columns: int
    new_B: Tensor
    ended_B: Tensor
    log_probs_BT: Tensor

    @classmethod
    def of(cls, task: Task) -> _Texts:
        first = task.history(task.settings.num_return_sequences)
        ids_BT, rows = first.ids_BT, len(first.ids_BT)
        return cls(
            task,
            torch.cat((ids_BT, ids_BT.new_full((rows, task.max_new), task.settings.filler)), dim=1),
            first.pads_B,
            ids_BT.shape[1],
            torch.zeros_like(first.pads_B),
            torch.zeros(rows, dtype=torch.bool, device=ids_BT.device),
            torch.zeros(rows, task.max_new, device=ids_BT.device),
        )

    @property
    def over_B(self) -> Tensor:
        """Which rows get no more tokens."""
        return self.ended_B | (self.new_B >= self.task.max_new)

    def alike(self, new_B: Tensor, wanted_B: Tensor) -> list[tuple[Tensor, History]]:
        """The wanted rows, those with equally many new tokens together, and their history up to there."""
        found, source = [], self.task.source or self.task.rows.prompt
        copies = self.task.settings.num_return_sequences
        for count in new_B[wanted_B].unique().tolist():
            rows = (wanted_B & (new_B == count)).nonzero()[:, 0]
            own = Prompt(source.ids_BT[rows // copies], source.mask_BT[rows // copies])
            ids_BT = self.ids_BT[rows, : self.columns + count]
            found.append(
                (rows, History(ids_BT, self.pads_B[rows], self.task.columns, self.task.max_new, own, n_new=count))
            )
        return found

    def add(self, rows: Tensor, chosen_B: Tensor, log_probs_B: Tensor) -> None:
        """Add a token to each of some rows that have equally many, and see whether it ends them."""
        at_B = self.new_B[rows]
        self.ids_BT[rows, self.columns + at_B] = chosen_B
        self.log_probs_BT[rows, at_B] = log_probs_B
        self.new_B[rows] += 1
        ends = torch.tensor(self.task.settings.eos_token_id, dtype=torch.long, device=rows.device)
        ended_B = torch.isin(chosen_B, ends)
        if self.task.stops is not None:
            upto = self.columns + int(at_B[0]) + 1
            ended_B = ended_B | self.task.stops.ends(self.ids_BT[rows, :upto], self.pads_B[rows])
        self.ended_B[rows] = ended_B


def _propose(rows: Rows, texts: _Texts, filters: list[Filter], u_BN3: Tensor | None, room_B: Tensor) -> Tensor:
    """Write `room_B` drafted tokens behind each text; the distributions they were drawn from, B × T + 1 × V.

    The last of these is empty: behind all drafted tokens nothing was drawn, and the parent's own is drawn from.
    """
    count, vocabulary = int(room_B.max()), rows.model.architecture.embedding.vocab_size
    wide = torch.float32 if u_BN3 is None else u_BN3.dtype
    q_BTV = torch.zeros(len(room_B), count + 1, vocabulary, dtype=wide, device=room_B.device)
    for place in range(count):
        wanted_B, new_B = place < room_B, texts.new_B + place
        # The last round may have ended with a token that the draft drew and never read, and one of the parent's.
        fresh = 2 if place == 0 else 1
        have_B = texts.columns - texts.pads_B + new_B
        n_B = have_B.clamp(max=fresh).masked_fill(~wanted_B, 0)
        logits_BTV = _read(rows, texts, new_B - n_B, n_B)
        last_BV = logits_BTV[torch.arange(len(n_B), device=n_B.device), (n_B - 1).clamp(min=0)]
        for group, at in texts.alike(new_B, wanted_B):
            raw_BV = last_BV[group]
            left_BV = _filtered(raw_BV, at, filters)
            # Whether filters that leave nothing matter is seen when the parent comes to this place.
            left_BV = torch.where(left_BV.amax(dim=-1, keepdim=True).isneginf(), raw_BV, left_BV)
            u_B = None if u_BN3 is None else u_BN3[group, at.n_new, _DRAFT]
            chosen_B = left_BV.argmax(dim=-1) if u_B is None else draw(left_BV, u_B)
            texts.ids_BT[group, texts.columns + at.n_new] = chosen_B
            q_BTV[group, place] = _distribution(left_BV, wide, greedy=u_B is None)
    return q_BTV


def _settle(
    texts: _Texts,
    filters: list[Filter],
    u_BN3: Tensor | None,
    logits_BV: Tensor,
    q_BV: Tensor,
    active_B: Tensor,
    judged_B: Tensor,
) -> Tensor:
    """Add the next token to each active row: the drafted one where it is judged and kept, else one of the parent's.

    Returns:
        B, which rows kept their drafted token.
    """
    kept_B = torch.zeros_like(active_B)
    for group, at in texts.alike(texts.new_B, active_B):
        raw_BV = logits_BV[group]
        left_BV = _filtered(raw_BV, at, filters)
        refuse_nothing_left(left_BV.amax(dim=-1), at.n_new)
        p_BV = _distribution(left_BV, q_BV.dtype, greedy=u_BN3 is None)
        u_B3 = None if u_BN3 is None else u_BN3[group, at.n_new]
        drafted_B = texts.ids_BT[group, min(texts.columns + at.n_new, texts.ids_BT.shape[1] - 1)]
        keep_B, instead_B = judge(p_BV, q_BV[group] * judged_B[group, None], drafted_B, u_B3)
        kept_B[group] = keep_B = keep_B & judged_B[group]
        chosen_B = torch.where(keep_B, drafted_B, instead_B)
        texts.add(group, chosen_B, raw_BV.log_softmax(dim=-1).gather(1, chosen_B[:, None])[:, 0])
    return kept_B


def judge(p_BV: Tensor, q_BV: Tensor, drafted_B: Tensor, u_B3: Tensor | None) -> tuple[Tensor, Tensor]:
    """Whether each drafted token is kept, and the token that comes where it is not.

    Args:
        p_BV, q_BV: the parent's distribution and the one that the token was drawn from; a row of zeros where no
            token was drafted, which makes the other token a draw from p.
        u_B3: numbers from [0, 1), of which the second decides and the third draws; None for greedy choice.
    """
    p_B, q_B = (each.gather(1, drafted_B[:, None])[:, 0] for each in (p_BV, q_BV))
    left_BV = (p_BV - q_BV).clamp(min=0)
    # Equal distributions may differ by rounding, and then nothing is left of p where a token was refused.
    left_BV = torch.where(left_BV.sum(dim=-1, keepdim=True) > 0, left_BV, p_BV)
    if u_B3 is None:
        return p_B > 0, left_BV.argmax(dim=-1)
    return u_B3[:, _KEEP] * q_B < p_B, draw(left_BV.log(), u_B3[:, _INSTEAD])


def _filtered(logits_BV: Tensor, at: History, filters: list[Filter]) -> Tensor:
    for change in filters:
        logits_BV = change(logits_BV, at)
    return logits_BV


def _distribution(logits_BV: Tensor, dtype: torch.dtype, *, greedy: bool) -> Tensor:
    """The distribution that is chosen from; of greedy choice, the likeliest token's alone."""
    if greedy:
        return torch.zeros_like(logits_BV, dtype=dtype).scatter(1, logits_BV.argmax(dim=-1, keepdim=True), 1.0)
    return logits_BV.to(dtype).softmax(dim=-1)


def _read(rows: Rows, texts: _Texts, first_B: Tensor, n_B: Tensor) -> Tensor:
    """Read `n_B` tokens of each row, the first of them its new token number `first_B`; -1 is the prompt's last.

    What the cache holds from there on is forgotten. Logits are B × T × V, float32, those of a row at the left.
    """
    count = int(n_B.max())
    places_T = torch.arange(count, device=n_B.device)
    mask_BT = places_T < n_B[:, None]
    columns_BT = (texts.columns + first_B[:, None] + places_T).clamp(0, texts.ids_BT.shape[1] - 1)
    ids_BT = texts.ids_BT.gather(1, columns_BT)
    # A row that reads nothing is rewound again before it does.
    rows.cache.rewind((texts.columns - texts.pads_B + first_B).masked_fill(n_B == 0, 0), n_B)
    if rows.memory is None:
        out: Output = rows.model(input_ids=ids_BT, attention_mask=mask_BT.long(), past_key_values=rows.cache)
    else:
        out = rows.model(
            decoder_input_ids=ids_BT,
            decoder_attention_mask=mask_BT.long(),
            encoder_outputs=rows.memory,
            past_key_values=rows.cache,
        )
    assert out.logits is not None
    logits_BTV = out.logits.float()
    if not bool(logits_BTV[mask_BT].isfinite().all()):
        explain_no_numbers(rows.model)
    return logits_BTV
