"""A model on several ranks: every rank computes a part of the batch, and all take the same step.

- **DDP** (Li et al. 2020): every rank holds the whole model and its moments. Gradients are averaged in buckets
  while the backward pass still computes others. Nothing else travels.
- **FSDP** (Zhao et al. 2023; in PyTorch `fully_shard`): every rank holds a part of each parameter, of its gradient
  and of its moments: 16 bytes a parameter divided by the number of ranks. A layer's weights are gathered before it
  is computed and let go of afterwards; its gradients are summed straight into the parts. More travels, twice a step
  for each weight. `lathe.train.parallel_shards` says what is gathered together.

Both average over ranks, while a step's gradient is the mean over the targets of all: `Run` weighs each rank's loss
by its targets, and divides by all of them afterwards.

The loss is computed inside the wrapped module, so that a loss function is given the model itself, hooks and all,
whichever way it is spread.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lathe.data.batch import Batch
from lathe.errors import RequestError
from lathe.model.transformer import Transformer
from lathe.train.loss import LossFunction
from lathe.train.ranks import Ranks
from lathe.train.settings import TrainSettings

if TYPE_CHECKING:
    from torch.nn.parallel import DistributedDataParallel


def choose(settings: TrainSettings, ranks: Ranks) -> str:
    """How the work is spread: `none`, `ddp` or `fsdp`.

    Raises:
        RequestError: what was asked needs several processes and there are none, or the other way round.
    """
    asked = settings.parallel
    if asked == "auto":
        return "ddp" if ranks.size > 1 else "none"
    if asked == "none" and ranks.size > 1:
        raise RequestError(f"parallel=none: torchrun started {ranks.size} processes; give auto, ddp or fsdp")
    if asked != "none" and not ranks.grouped:
        raise RequestError(
            f"parallel={asked}: this is one process; start several with torchrun --nproc-per-node N -m lathe train …"
        )
    if asked == "fsdp" and settings.optimizer.kind == "adafactor":
        raise RequestError(
            "parallel=fsdp: adafactor takes means over the rows and columns of whole matrices, and each rank would "
            "hold a part; give parallel=ddp, or optimizer.kind=adamw"
        )
    return asked


class Spread:
    """A model spread over ranks.

    `model` is what is trained. It is the model that was given, or, under FSDP, a sharded copy of it; the given one
    then waits on the CPU, and `publish` brings the weights there.

    Args:
        model: on the device to train on.
    """

    def __init__(self, model: Transformer, settings: TrainSettings, ranks: Ranks) -> None:
        kind = choose(settings, ranks)
        self.given, self.model, self.ranks, self.sharded = model, model, ranks, kind == "fsdp"
        self._ddp: DistributedDataParallel | None = None
        device = model.device
        if self.sharded:
            from lathe.train.parallel_shards import shard

            self.model = copy.deepcopy(model.to("cpu"))
            self._loss = _Loss(self.model)
            shard(self._loss, self.model, device, ranks.size, settings.precision)
            return
        self._loss = _Loss(model, unasked=kind == "ddp")
        if kind == "ddp":
            from torch.nn.parallel import DistributedDataParallel

            # Parameters that no loss asks for (a pooler without a sentence label) are looked for in each step. This
            # also keeps the buckets as they are first laid. Otherwise they are laid anew after the first step, and a
            # resumed run would add up in another order than one that was not interrupted.
            self._ddp = DistributedDataParallel(
                self._loss,
                device_ids=[device] if device.type == "cuda" else None,
                find_unused_parameters=True,
                gradient_as_bucket_view=True,
            )

    def loss(self, batch: Batch, loss_fn: LossFunction) -> tuple[Tensor, int]:
        """The loss of this rank's batch, whose backward pass adds up over the ranks; every rank calls it alike."""
        module: nn.Module = self._loss if self._ddp is None else self._ddp
        found: tuple[Tensor, int] = module(batch, loss_fn)
        return found

    def judge(self, batch: Batch, loss_fn: LossFunction) -> tuple[Tensor, int]:
        """The same without a backward pass; every rank calls it equally often, and `rest` after the last."""
        found: tuple[Tensor, int] = self._loss(batch, loss_fn)
        return found

    def rest(self) -> None:
        """Each rank holds no more than its parts again."""
        if self.sharded:
            from lathe.train.parallel_shards import let_go

            let_go(self._loss)

    @contextmanager
    def adding_up(self, *, last: bool) -> Iterator[None]:
        """Around forward and backward of one batch of several: under DDP, gradients travel with the last alone."""
        with warnings.catch_warnings(), nullcontext() if self._ddp is None or last else self._ddp.no_sync():
            # What a sublayer returns may be a view, on which nothing may be done in place; no layer does.
            warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
            yield

    def whole(self, tensor: Tensor) -> Tensor:
        """The full value of a tensor of the model, its gradients or moments. Every rank calls it."""
        if not self.sharded:
            return tensor
        from lathe.train.parallel_shards import whole

        return whole(tensor)

    def gathered(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Whole tensors under the same names, on the main rank; nothing on the others. Every rank calls it."""
        found: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            full = self.whole(tensor)
            if self.ranks.main:
                found[name] = full if full is tensor else full.cpu()
        return found

    def parts(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This rank's parts of an optimiser's whole tensors, which are named `parameter:what`."""
        if not self.sharded:
            return dict(tensors)
        from lathe.train.parallel_shards import like

        parameters = dict(self.model.named_parameters())
        owners = {key: parameters.get(key.rpartition(":")[0], tensor) for key, tensor in tensors.items()}
        return {key: like(tensor, owners[key]) for key, tensor in tensors.items()}

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Give the model these weights, whole ones by name; what is not trained need not be among them."""
        trained = {name for name, parameter in self.given.named_parameters() if parameter.requires_grad}
        kept = {name: tensor for name, tensor in self.given.state_dict().items() if name not in trained}
        self.given.load_state_dict({**kept, **weights})
        if self.sharded:
            from lathe.train.parallel_shards import like

            given = dict(self.given.named_parameters())
            with torch.no_grad():
                for name, parameter in self.model.named_parameters():
                    parameter.copy_(like(given[name].detach(), parameter))

    def publish(self) -> None:
        """Bring the weights as they are now to the model that was given. Every rank calls it."""
        if self.sharded:
            given = dict(self.given.named_parameters())
            with torch.no_grad():
                for name, parameter in self.model.named_parameters():
                    if parameter.requires_grad:  # nothing else has moved
                        given[name].copy_(self.whole(parameter.detach()))


class _Loss(nn.Module):
    """A model and its loss as one module, which is what is wrapped.

    Args:
        unasked: hold a parameter that no loss asks for. DDP warns where it looks for such and there is none.
    """

    def __init__(self, model: Transformer, *, unasked: bool = False) -> None:
        super().__init__()
        self.model = model
        self.unasked = nn.Parameter(torch.zeros(1, device=model.device)) if unasked else None

    def forward(self, batch: Batch, loss_fn: LossFunction) -> tuple[Tensor, int]:
        """The loss, and how many targets it is the mean of."""
        return loss_fn(self.model, batch)
