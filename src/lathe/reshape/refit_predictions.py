"""A masked-LM head's transform, led from its least-squares fit to the parent's predictions.

The fit gives the old vector as nearly as a map through a GELU and a norm can, every direction of it counting alike.
What counts is what the table makes of it. So the transform, its norm and the output's bias take some steps of Adam
(Kingma & Ba 2015) down the divergence from the parent's distribution, on rows that are kept from the walk: the layers
below do not run again, which makes it seconds. It starts at the fit and its rate falls to zero, so it stays near it.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor

from lathe.model.embedding import TokenTable
from lathe.model.heads import LanguageHead

_STEPS = 120
_ROWS = 256
_RATE = 2e-3


def follow_predictions(
    child: LanguageHead, table: TokenTable, x_ND: Tensor, parent: LanguageHead, parents_table: TokenTable, h_ND: Tensor
) -> dict[str, Tensor]:
    """The child's head after its steps, by the names that the tensors have in the head; the head itself is left.

    Args:
        table, parents_table: each model's token table.
        x_ND: the child's last stream, row by row.
        h_ND: the parent's on the same tokens.
    """
    head, own = copy.deepcopy(child), table.weight
    x_ND, h_ND = x_ND.to(own), h_ND.to(own)
    moving = {name: tensor for name, tensor in head.named_parameters() if name != "output.weight"}
    for tensor in moving.values():
        tensor.requires_grad_(True)
    optimiser = torch.optim.Adam(moving.values(), lr=_RATE)
    generator = torch.Generator().manual_seed(0)
    for step in range(_STEPS):
        rows = torch.randperm(len(x_ND), generator=generator)[:_ROWS].to(x_ND.device)
        with torch.no_grad():
            wanted = parent(h_ND[rows][None], parents_table).log_softmax(-1)
        for group in optimiser.param_groups:
            group["lr"] = _RATE * 0.5 * (1 + math.cos(math.pi * step / _STEPS))
        with torch.enable_grad():
            given = head(x_ND[rows][None], table).log_softmax(-1)
            loss = (wanted.exp() * (wanted - given)).sum(-1).mean()
            optimiser.zero_grad()
            loss.backward()
        optimiser.step()
    return {name: tensor.detach().to("cpu", torch.float64) for name, tensor in moving.items()}
