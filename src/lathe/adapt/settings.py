"""Every number and choice of an adapter, typed; an unknown key is refused with the line that says what was expected.

LoraSettings(rank=8, alpha=16, targets="heads,kv_heads")
LoraSettings.from_dict({"rank": 8, "rslora": True})
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from lathe.errors import RequestError
from lathe.spec import Spec, share, size


@dataclass(frozen=True, kw_only=True)
class LoraSettings(Spec):
    """One adapter.

    `targets` is a comma-separated list. Each term is `all-linear`; a role, `reader` or `writer`; an axis of the
    blueprint, `heads`, `kv_heads`, `ffn`, `residual`, `embed`; both, `reader:ffn`; or a pattern of module names,
    `*.attention.*.q`. Heads (the output table, a pooler, a classifier) are reached by name alone.

    `whole` names more layers in the same way. They get a weight and a bias of the adapter's own, which start as the
    base's and are trained as they are: right for a layer that is new, which a small product could not make up for.
    """

    rank: int = size(2**16, default=8)
    alpha: float = 16.0  # the update is multiplied by alpha / rank
    dropout: float = share()  # on what the adapter reads, in training
    targets: str = "all-linear"
    rslora: bool = False  # multiply by alpha / √rank instead
    dora: bool = False  # learn each output row's length apart from its direction
    whole: str | None = None  # layers trained whole beside the adapter; PEFT's modules_to_save

    def check(self) -> None:
        if self.alpha <= 0:
            raise RequestError(f"alpha={self.alpha}: expected more than 0")
        for name, terms in (("targets", self.terms), ("whole", self.whole_terms)):
            if not all(terms):
                raise RequestError(
                    f"{name}={getattr(self, name)!r}: expected terms with commas between, such as heads,ffn"
                )

    @property
    def terms(self) -> list[str]:
        """The terms of `targets`."""
        return [term.strip() for term in self.targets.split(",")]

    @property
    def whole_terms(self) -> list[str]:
        """The terms of `whole`."""
        return [] if self.whole is None else [term.strip() for term in self.whole.split(",")]

    @property
    def scale(self) -> float:
        """What the update B·A is multiplied by."""
        return scale_of(self.alpha, self.rank, rslora=self.rslora)


def scale_of(alpha: float, rank: int, *, rslora: bool) -> float:
    """LoRA's alpha / rank (Hu et al. 2021, §4.1), or rsLoRA's alpha / √rank (Kalajdzievski 2023, §3)."""
    return alpha / (math.sqrt(rank) if rslora else rank)
