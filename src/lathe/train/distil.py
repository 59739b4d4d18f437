"""Distillation: learn from a teacher's whole distribution, not from the one token that was right.

The student's loss is `weight · T² · KL(teacher ‖ student) + (1 − weight) · cross-entropy`, with both
distributions softened by the temperature T (Hinton et al. 2015, §2; T² keeps the gradient's size). The
teacher's distribution says of every token how likely it was, so a batch teaches far more than its labels;
that is why a cut model heals in few steps. Both models see the same batch, and only positions with a label
count. What a sentence head says of each row is learnt in the same way, beside the tokens.

`top_k` compares only the teacher's k likeliest tokens and the rest as one: all that matters of a large
vocabulary at a fraction of its cost.

`hidden` adds the mean squared difference of the cosines between every two tokens of a row, in the last hidden states
of each stack (similarity-preserving distillation, Tung & Mori 2019, §3). Cosines between tokens can be compared
whatever the two widths are, so no projection has to be learnt and then thrown away.

`noise` swaps that share of the tokens that both models read for others of the same batch. A teacher that knows its text
by heart says on it what it says nowhere else; on text that it has never seen it still says what it thinks of it, and no
label is needed to learn that. Special tokens stay where they are: what a model reads of a row begins with them.

Shape suffixes: B batch, T positions, D d_model, N labels that count, V vocabulary, K special tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from lathe.data.batch import Batch
from lathe.errors import RequestError
from lathe.model.output import Output
from lathe.model.transformer import Transformer
from lathe.train.loss import label_logits, mean_loss, sentence_loss, widened

_AT_ONCE = {"cpu": 2**18}  # logits, by the device's type; what a core's cache holds
_AT_ONCE_ELSEWHERE = 2**26  # few launches count for more


class Distillation:
    """A loss function for `train`: the teacher's distribution and the labels, half of each where nothing else is said.

    Args:
        teacher: a model with the student's vocabulary; it is used as it is (call `.eval()`), and not trained.
        weight: the teacher's share, 0 to 1.
        temperature: softens both distributions.
        top_k: compare only the teacher's likeliest tokens and the rest as one; None: all.
        hidden: the weight of the hidden states' difference, 0 or more.
        noise: the share of the tokens read, special ones apart, that are swapped for others of the batch.
        keep: the tokenizer's special tokens (`SpecialTokens.ids`); the few that an architecture knows are kept anyway.

    Raises:
        RequestError: a value that cannot be.
    """

    def __init__(
        self,
        teacher: Transformer,
        *,
        weight: float = 0.5,
        temperature: float = 1.0,
        top_k: int | None = None,
        hidden: float = 0.0,
        noise: float = 0.0,
        keep: Iterable[int] = (),
    ) -> None:
        if not 0.0 <= weight <= 1.0:
            raise RequestError(f"weight={weight}: expected the teacher's share, 0 to 1")
        if temperature <= 0:
            raise RequestError(f"temperature={temperature}: expected more than 0")
        check_top_k(top_k, teacher.architecture.embedding.vocab_size)
        if hidden < 0:
            raise RequestError(f"hidden={hidden}: expected the weight of the hidden states' difference, 0 or more")
        if not 0.0 <= noise < 1.0:
            raise RequestError(f"noise={noise}: expected a share of the tokens, 0 or more and below 1")
        self.teacher, self.weight, self.temperature, self.top_k = teacher, weight, temperature, top_k
        self.hidden, self.noise = hidden, noise
        own = teacher.architecture.tokens
        kept = {*keep, *own.eos, own.pad, own.bos, own.decoder_start, own.mask}
        self.kept_K = torch.tensor([token for token in kept if token is not None], dtype=torch.long)

    def __call__(self, model: Transformer, batch: Batch) -> tuple[Tensor, int]:
        """The student's loss, and how many labels it is the mean of."""
        if model.architecture.embedding.vocab_size != self.teacher.architecture.embedding.vocab_size:
            raise RequestError(
                f"the student's vocabulary is {model.architecture.embedding.vocab_size:,} and the teacher's "
                f"{self.teacher.architecture.embedding.vocab_size:,}; distillation compares them token by token"
            )
        if self.noise > 0.0:
            batch = replace(batch, inputs=_disturbed(batch, self.noise, self.kept_K))
        student_NV, targets_N, student = label_logits(model, batch)
        with torch.no_grad():
            teacher_NV, _, teacher = label_logits(self.teacher, batch)
        loss = torch.zeros((), device=student_NV.device)
        if self.weight < 1.0:
            loss = loss + (1.0 - self.weight) * (mean_loss(student_NV, targets_N) + sentence_loss(student, batch))
        if self.weight > 0.0:
            rows = self._sentence_divergence(student, teacher)
            loss = loss + self.weight * (self._divergence(student_NV, teacher_NV, self.top_k) + batch.row_weight * rows)
        if self.hidden > 0.0:
            loss = loss + self.hidden * _hidden_difference(student, teacher, batch)
        return loss, len(targets_N)

    def _sentence_divergence(self, student: Output, teacher: Output) -> Tensor | float:
        """Of what both say of each row as a whole; 0 where one of them says nothing."""
        ours, theirs = student.seq_relationship_logits, teacher.seq_relationship_logits
        if ours is None or theirs is None:
            return 0.0
        if ours.shape != theirs.shape:
            raise RequestError(
                f"the student's sentence head has {ours.shape[-1]} labels and the teacher's {theirs.shape[-1]}; "
                "distillation compares them label by label"
            )
        return self._divergence(ours, theirs)

    def _divergence(self, student_NV: Tensor, teacher_NV: Tensor, top_k: int | None = None) -> Tensor:
        """Mean over N, in float32 at least."""
        student_NV = widened(student_NV)
        teacher_NV = teacher_NV.to(student_NV.dtype)
        if self.temperature != 1.0:
            student_NV, teacher_NV = student_NV / self.temperature, teacher_NV / self.temperature
        if top_k is None:
            total = cast(Tensor, _Divergence.apply(student_NV, teacher_NV))  # type: ignore[no-untyped-call]
        else:
            student, teacher = F.log_softmax(student_NV, dim=-1), F.log_softmax(teacher_NV, dim=-1)
            likeliest = teacher.topk(top_k, dim=-1).indices
            student, teacher = (_with_rest(each.gather(-1, likeliest)) for each in (student, teacher))
            total = F.kl_div(student, teacher, log_target=True, reduction="sum")
        return total / max(len(student_NV), 1) * self.temperature**2


def check_top_k(top_k: int | None, vocab_size: int) -> None:
    """Raise `RequestError` where a vocabulary has no `top_k` likeliest tokens and others beside them."""
    if top_k is not None and not 1 <= top_k < vocab_size:
        raise RequestError(f"top_k={top_k}: expected 1 or more and below the vocabulary of {vocab_size:,}")


class _Divergence(torch.autograd.Function):
    """KL(teacher ‖ student) of two N × V logits, summed over N.

    Its gradient is the difference of the two distributions, which are at hand while the sum is made. So both come of
    one pass over a few rows at a time, which stay in a core's cache; all that is kept until the backward pass is the
    gradient, where one is wanted. No gradient goes to the teacher.
    """

    @staticmethod
    def forward(ctx: Any, student_NV: Tensor, teacher_NV: Tensor) -> Tensor:
        at_once = _AT_ONCE.get(student_NV.device.type, _AT_ONCE_ELSEWHERE)
        rows = max(at_once // student_NV.shape[-1], 1)
        total = student_NV.new_zeros(())
        slope_NV = torch.empty_like(student_NV) if ctx.needs_input_grad[0] else None
        for start in range(0, len(student_NV), rows):
            some = slice(start, start + rows)
            student, teacher = F.log_softmax(student_NV[some], dim=-1), F.log_softmax(teacher_NV[some], dim=-1)
            p = teacher.exp()
            total += teacher.sub_(student).mul_(p).sum()  # a dot product would be bfloat16 under autocast
            if slope_NV is not None:
                torch.sub(student.exp_(), p, out=slope_NV[some])
        ctx.save_for_backward(slope_NV)
        return total

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None]:
        (slope_NV,) = ctx.saved_tensors
        return slope_NV * outer[0], None


def _hidden_difference(student: Output, teacher: Output, batch: Batch) -> Tensor:
    """The mean squared difference of the tokens' cosines, summed over the stacks."""
    both = student.encoder_last_hidden_state is not None
    pairs = [(student.last_hidden_state, teacher.last_hidden_state, "decoder_" if both else "")]
    if both:
        pairs.append((student.encoder_last_hidden_state, teacher.encoder_last_hidden_state, ""))
    total = torch.zeros((), device=batch.inputs["input_ids"].device)
    for ours_BTD, theirs_BTD, side in pairs:
        assert ours_BTD is not None
        assert theirs_BTD is not None
        counted_BT = _tokens(batch, side, ours_BTD)
        pair_BTT = counted_BT[:, :, None] & counted_BT[:, None, :]
        difference_BTT = _cosines(ours_BTD) - _cosines(theirs_BTD)
        total = total + (difference_BTT.square() * pair_BTT).sum() / pair_BTT.sum().clamp_min(1)
    return total


def _cosines(hidden_BTD: Tensor) -> Tensor:
    """Cosines between every two tokens of a row, B × T × T; in float32 at least, whatever autocast says."""
    with torch.autocast(hidden_BTD.device.type, enabled=False):
        unit_BTD = F.normalize(widened(hidden_BTD), dim=-1)
        return unit_BTD @ unit_BTD.transpose(1, 2)


def _tokens(batch: Batch, side: str, like_BTD: Tensor) -> Tensor:
    """Which positions are tokens and no padding, B × T."""
    counted_BT = torch.ones(like_BTD.shape[:2], dtype=torch.bool, device=like_BTD.device)
    mask, segments = batch.inputs.get(f"{side}attention_mask"), batch.inputs.get(f"{side}segment_ids")
    if mask is not None:
        counted_BT &= mask.bool()
    if segments is not None:
        counted_BT &= segments >= 0
    return counted_BT


def _disturbed(batch: Batch, share: float, kept_K: Tensor) -> dict[str, Tensor]:
    """The inputs with a share of the tokens swapped for others; the same ones whenever the batch comes again."""
    inputs = dict(batch.inputs)
    for name in ("input_ids", "decoder_input_ids"):
        if name not in inputs:
            continue
        ids_BT = inputs[name].cpu()
        counted_BT = _tokens(batch, name.removesuffix("input_ids"), inputs[name]).cpu() & ~torch.isin(ids_BT, kept_K)
        some_N = ids_BT[counted_BT]
        draw = torch.Generator().manual_seed(int(some_N.sum()))
        others_N = some_N[torch.randperm(len(some_N), generator=draw)]
        hit_N = torch.rand(len(some_N), generator=draw) < share
        inputs[name] = ids_BT.masked_scatter(counted_BT, torch.where(hit_N, others_N, some_N)).to(inputs[name].device)
    return inputs


def _with_rest(log_p_NK: Tensor) -> Tensor:
    """Log-probabilities with the log of what they leave over as one more, N × (K + 1)."""
    rest = (1.0 - log_p_NK.exp().sum(-1, keepdim=True)).clamp_min(1e-7).log()
    return torch.cat((log_p_NK, rest), dim=-1)
