"""Whether a loss is still one to learn from: stop at a NaN, and at a spike that does not belong.

A run that diverges wastes everything after the moment it did, and its last checkpoints with it. A loss that
is not finite is fatal at once. A loss far above the mean of the last steps is a bad batch or too high a
learning rate; both want a person.
"""

from __future__ import annotations

import math
from collections import deque

from lathe.errors import LatheError

_RECENT = 50


class Health:
    """Judges each step's loss and gradient before the weights move.

    Args:
        spike: how far above the recent mean a loss may lie, in nats; None: anywhere.
    """

    def __init__(self, spike: float | None) -> None:
        self.spike = spike
        self.recent: deque[float] = deque(maxlen=_RECENT)

    def check(self, step: int, loss: float, gradient_norm: float, batch: str) -> None:
        """Raise `LatheError` that names the step and the batch where training should stop."""
        where = f"at step {step} ({batch}); the weights are those before the step"
        if not math.isfinite(loss):
            raise LatheError(f"the loss is {loss} {where}: lower the learning rate, or look at that batch")
        if not math.isfinite(gradient_norm):
            raise LatheError(f"the gradient's norm is {gradient_norm} {where}: lower the learning rate")
        if self.spike is not None and len(self.recent) == _RECENT:
            mean = sum(self.recent) / _RECENT
            if loss > mean + self.spike:
                raise LatheError(
                    f"the loss is {loss:.3f} {where}, {loss - mean:.1f} nats above the mean of the last {_RECENT} "
                    "steps: lower the learning rate, look at that batch, or set spike=none to go on regardless"
                )
        self.recent.append(loss)
