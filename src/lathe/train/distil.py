"""Distillation: learn from a teacher's whole distribution, not from the one token that was right.

The student's loss is `weight · T² · KL(teacher ‖ student) + (1 − weight) · cross-entropy`, with both
distributions softened by the temperature T (Hinton et al. 2015, §2; T² keeps the gradient's size). The
teacher's distribution says of every token how likely it was, so a batch teaches far more than its labels;
that is why a cut model heals in few steps. Both models see the same batch, and only positions with a label
count.

`top_k` compares only the teacher's k likeliest tokens and the rest as one: all that matters of a large
vocabulary at a fraction of its cost.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lathe.data.batch import Batch
from lathe.errors import RequestError
from lathe.model.transformer import Transformer
from lathe.train.loss import label_logits, mean_loss


class Distillation:
    """A loss function for `train`: half the teacher's distribution, half the labels.

    Args:
        teacher: a model with the student's vocabulary; it is used as it is (call `.eval()`), and not trained.
        weight: the teacher's share, 0 to 1.
        temperature: softens both distributions.
        top_k: compare only the teacher's likeliest tokens and the rest as one; None: all.

    Raises:
        RequestError: a value that cannot be.
    """

    def __init__(
        self, teacher: Transformer, *, weight: float = 0.5, temperature: float = 1.0, top_k: int | None = None
    ) -> None:
        if not 0.0 <= weight <= 1.0:
            raise RequestError(f"weight={weight}: expected the teacher's share, 0 to 1")
        if temperature <= 0:
            raise RequestError(f"temperature={temperature}: expected more than 0")
        vocab = teacher.architecture.embedding.vocab_size
        if top_k is not None and not 1 <= top_k < vocab:
            raise RequestError(f"top_k={top_k}: expected 1 or more and below the vocabulary of {vocab:,}")
        self.teacher, self.weight, self.temperature, self.top_k = teacher, weight, temperature, top_k

    def __call__(self, model: Transformer, batch: Batch) -> tuple[Tensor, int]:
        """The student's loss, and how many labels it is the mean of."""
        if model.architecture.embedding.vocab_size != self.teacher.architecture.embedding.vocab_size:
            raise RequestError(
                f"the student's vocabulary is {model.architecture.embedding.vocab_size:,} and the teacher's "
                f"{self.teacher.architecture.embedding.vocab_size:,}; distillation compares them token by token"
            )
        student_NV, targets_N, _ = label_logits(model, batch)
        with torch.no_grad():
            teacher_NV, _, _ = label_logits(self.teacher, batch)
        loss = torch.zeros((), device=student_NV.device)
        if self.weight < 1.0:
            loss = loss + (1.0 - self.weight) * mean_loss(student_NV, targets_N)
        if self.weight > 0.0:
            loss = loss + self.weight * self._divergence(student_NV.float(), teacher_NV.float())
        return loss, len(targets_N)

    def _divergence(self, student_NV: Tensor, teacher_NV: Tensor) -> Tensor:
        student = F.log_softmax(student_NV / self.temperature, dim=-1)
        teacher = F.log_softmax(teacher_NV / self.temperature, dim=-1)
        if self.top_k is not None:
            likeliest = teacher.topk(self.top_k, dim=-1).indices
            student, teacher = (_with_rest(each.gather(-1, likeliest)) for each in (student, teacher))
        divergence = F.kl_div(student, teacher, log_target=True, reduction="sum") / max(len(student), 1)
        return divergence * self.temperature**2


def _with_rest(log_p_NK: Tensor) -> Tensor:
    """Log-probabilities with the log of what they leave over as one more, N × (K + 1)."""
    rest = (1.0 - log_p_NK.exp().sum(-1, keepdim=True)).clamp_min(1e-7).log()
    return torch.cat((log_p_NK, rest), dim=-1)
