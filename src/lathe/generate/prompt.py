"""What generation starts from: ids and a mask that are whole, checked, and padded on the left.

Rows of one batch differ in length, so short ones hold pads. Lathe's cache gives a pad no slot, so pads may
stand anywhere; they are moved to the left before the first forward, where the last column then is every
row's last token. What comes back to the caller is the prompt as it was given.

Shape suffixes: B batch, T positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lathe.architecture import Architecture
from lathe.errors import RequestError
from lathe.generate.settings import DEFAULT_NEW_TOKENS, Settings
from lathe.model.transformer import check_ids


@dataclass(frozen=True)
class Prompt:
    """Ids, B × T, and a mask, B × T of 1 for a token and 0 for a pad; every row has a token."""

    ids_BT: Tensor
    mask_BT: Tensor

    @property
    def columns(self) -> int:
        """T, pads counted."""
        return self.ids_BT.shape[1]

    @property
    def longest(self) -> int:
        """The most tokens in a row."""
        return int(self.mask_BT.sum(1).max())

    def padded_left(self) -> Prompt:
        """The same rows with their pads on the left, and no column of pads alone."""
        order_BT = self.mask_BT.argsort(dim=1, stable=True)
        ids_BT, mask_BT = self.ids_BT.gather(1, order_BT), self.mask_BT.gather(1, order_BT)
        return Prompt(ids_BT[:, -self.longest :], mask_BT[:, -self.longest :])


def make_prompt(
    name: str, ids_BT: Tensor, mask_BT: Tensor | None, settings: Settings, vocab_size: int, device: torch.device
) -> Prompt:
    """A prompt of ids and a mask as the caller gave them.

    Args:
        name: what the caller calls the ids, for the error's sake.
        mask_BT: made from the pads among the ids where left out, as `transformers` does (5 for decoders, 4 for all).

    Raises:
        RequestError: no tokens, ids outside the vocabulary, or a mask that does not fit them.
    """
    if not isinstance(ids_BT, Tensor):
        raise RequestError(f"{name} is a {type(ids_BT).__name__}: expected a tensor of token ids, batch × length")
    check_ids(ids_BT.cpu(), vocab_size)  # once a call, so wherever they are
    if not ids_BT.numel():
        raise RequestError(f"{name} has shape {tuple(ids_BT.shape)}: expected a prompt of at least one token a row")
    ids_BT = ids_BT.to(device, torch.long)
    if mask_BT is None:
        mask_BT = _mask_of_pads(ids_BT, settings)
    if not isinstance(mask_BT, Tensor) or mask_BT.shape != ids_BT.shape:
        shape = tuple(mask_BT.shape) if isinstance(mask_BT, Tensor) else type(mask_BT).__name__
        raise RequestError(f"the mask of {name} is {shape}: expected its shape, {tuple(ids_BT.shape)}")
    mask_BT = mask_BT.to(device)
    if bool(((mask_BT != 0) & (mask_BT != 1)).any()):
        raise RequestError(f"the mask of {name} holds other numbers than 0 and 1; expected 1 for a token, 0 for a pad")
    empty_B = mask_BT.sum(1) == 0
    if bool(empty_B.any()):
        raise RequestError(f"row {int(empty_B.nonzero()[0])} of {name} is masked as a whole; expected a token a row")
    return Prompt(ids_BT, mask_BT.long())


def _mask_of_pads(ids_BT: Tensor, settings: Settings) -> Tensor:
    pad = settings.pad_token_id
    if pad is None or pad in settings.eos_token_id:
        return torch.ones_like(ids_BT)
    return (ids_BT != pad).long()


def start(batch: int, name: str, token: int | None, device: torch.device) -> Prompt:
    """A prompt of one token a row, for a decoder that was given none."""
    if token is None:
        raise RequestError(f"there is no prompt and no {name} to start from; pass {name}")
    ids_B1 = torch.full((batch, 1), token, device=device)
    return Prompt(ids_B1, torch.ones_like(ids_B1))


def with_start(prompt: Prompt, token: int | None) -> Prompt:
    """A decoder's prompt with the start token in front, unless a row's first token is one already."""
    leading_B1 = prompt.mask_BT.argmax(dim=1, keepdim=True)
    if token is None or bool((prompt.ids_BT.gather(1, leading_B1) == token).any()):
        return prompt
    first_B1 = torch.full_like(prompt.ids_BT[:, :1], token)
    return Prompt(torch.cat((first_B1, prompt.ids_BT), 1), torch.cat((torch.ones_like(first_B1), prompt.mask_BT), 1))


def room(prompt: Prompt, settings: Settings, architecture: Architecture, name: str = "the prompt") -> int:
    """How many tokens to add at most.

    Args:
        name: what the caller calls the prompt, for the error's sake.

    Raises:
        RequestError: the prompt leaves no room, or the positions do not reach.
    """
    assert architecture.decoder is not None
    positions, counted = architecture.decoder.positions, prompt.longest
    if settings.max_new_tokens is not None:
        wanted, limit = settings.max_new_tokens, f"max_new_tokens={settings.max_new_tokens}; raise it"
    elif settings.max_length is not None:
        counted = prompt.columns
        wanted, limit = settings.max_length - counted, f"max_length={settings.max_length}; raise it"
    else:
        wanted, limit = DEFAULT_NEW_TOKENS, ""
        if positions.max_positions is not None:
            wanted = min(wanted, positions.max_positions - counted)
            remedy = "pass max_new_tokens" if positions.limit is None else "use a model with more"
            limit = f"the model's {positions.max_positions} positions; {remedy}"
    if wanted < 1:
        raise RequestError(f"{name} has {counted} tokens, which leaves no room within {limit} or shorten the prompt")
    # The last new token is never read, so it needs no position.
    if positions.limit is not None and prompt.longest + wanted - 1 > positions.limit:
        raise RequestError(
            f"{name} has {prompt.longest} tokens: with {wanted} new ones they are more than this model's "
            f"{positions.limit} positions; at most {max(0, positions.limit - prompt.longest + 1)} new ones fit"
        )
    return wanted
