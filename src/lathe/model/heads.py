"""What is read off the last hidden states: token logits, a pooled state, labels.

A language head is a product with the token table (Press & Wolf 2017), the same one when tied; BERT puts a
dense layer, an activation and a norm before it. A pooler picks the position that stands for the sequence;
a classifier is a linear layer on it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lathe.architecture import Architecture, Stack
from lathe.model.embedding import TokenTable
from lathe.model.feed_forward import ACTIVATION_FUNCTIONS
from lathe.model.norm import make_norm


class TiedOutput(nn.Module):
    """The place of the output table where the token table serves; it holds the bias, if any."""

    def __init__(self, vocab_size: int, *, bias: bool) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(vocab_size)) if bias else None


class LanguageHead(nn.Module):
    """Hidden states to token logits."""

    def __init__(self, architecture: Architecture, stack: Stack) -> None:
        super().__init__()
        spec = architecture.head.language
        assert spec is not None
        d, factorised = architecture.d_model, architecture.embedding.d_embed is not None
        vocab = architecture.embedding.vocab_size
        self.scale = d**-0.5 if spec.scaled else 1.0
        inner = architecture.width
        self.projection: nn.Linear | None = None
        self.transform: nn.Linear | None = None
        self.norm: nn.Module | None = None
        if spec.transform is not None:
            self.transform = nn.Linear(d, inner)
            self.activation = ACTIVATION_FUNCTIONS[spec.transform]
            self.norm = make_norm(stack.norm, inner)
        elif factorised:
            self.projection = nn.Linear(d, inner, bias=False)
        self.output: TiedOutput | nn.Linear
        if spec.tied:
            self.output = TiedOutput(vocab, bias=spec.bias)
        else:
            self.output = nn.Linear(inner, vocab, bias=spec.bias)
        self.offset: Tensor | None
        self.register_buffer("offset", torch.zeros(vocab) if spec.offset else None)

    def forward(self, hidden_BTD: Tensor, table: TokenTable) -> Tensor:
        """Logits, B × T × V."""
        if self.scale != 1.0:
            hidden_BTD = hidden_BTD * self.scale
        if self.transform is not None:
            assert self.norm is not None
            hidden_BTD = self.norm(self.activation(self.transform(hidden_BTD)))
        if self.projection is not None:
            hidden_BTD = self.projection(hidden_BTD)
        if isinstance(self.output, TiedOutput):
            logits_BTV = table.logits(hidden_BTD, self.output.bias)
        else:
            logits_BTV = self.output(hidden_BTD)
        return logits_BTV if self.offset is None else logits_BTV + self.offset


class Head(nn.Module):
    """The heads that an architecture has; each may be absent."""

    def __init__(self, architecture: Architecture, stack: Stack) -> None:
        super().__init__()
        spec, d = architecture.head, architecture.d_model
        self.language = LanguageHead(architecture, stack) if spec.language is not None else None
        self.pooler: nn.Linear | None = None
        if spec.pooler is not None and spec.pooler.activation is not None:
            self.pooler = nn.Linear(d, d)
            self.activation = ACTIVATION_FUNCTIONS[spec.pooler.activation]
        self.classifier: nn.Linear | None = None
        if spec.classifier is not None:
            self.classifier = nn.Linear(d, spec.classifier.n_labels, bias=spec.classifier.bias)
        self.token = spec.pooler.token if spec.pooler is not None else None
        # One label for every token is a yes-or-no mark: ELECTRA's discriminator, "was this token replaced?"
        self.marks = self.token == "each" and spec.classifier is not None and spec.classifier.n_labels == 1
        self.dropout = nn.Dropout(architecture.dropout.classifier)

    def pool(self, hidden_BTD: Tensor, last_B: Tensor | None) -> Tensor:
        """The state that stands for each sequence, B × D; B × T × D where every token stands for itself.

        Args:
            last_B: the position to read, for poolers that read the last or the end-of-sequence token.
        """
        if self.token == "each":
            picked = hidden_BTD
        elif self.token == "first":
            picked = hidden_BTD[:, 0]
        else:
            assert last_B is not None
            picked = hidden_BTD[torch.arange(len(last_B), device=last_B.device), last_B]
        return picked if self.pooler is None else self.activation(self.pooler(picked))

    def classify(self, pooled: Tensor) -> Tensor:
        """Label logits of pooled states, … × n_labels; B × T where there is one mark for each token."""
        assert self.classifier is not None
        logits: Tensor = self.classifier(self.dropout(pooled))
        return logits.squeeze(-1) if self.marks else logits
