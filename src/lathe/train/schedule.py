"""The learning rate as a pure function of the step and of how much of the budget is spent.

A warm-up rises linearly to the peak, because Adam's second moments are noise in the first steps. Then

- `cosine`        half a cosine down to the floor (Loshchilov & Hutter 2017)
- `linear`        a straight line down to the floor (BERT §A.2)
- `inverse_sqrt`  √(warmup / step), which knows no end (Vaswani et al. 2017, §5.3; T5 §3.1.2)
- `wsd`           the peak for most of the run, then down as 1 − √x (Hu et al. 2024, §4; Hägele et al. 2024)
- `constant`      the peak

The fall runs over the share of the budget that the warm-up leaves, whether the budget is of steps, tokens or
seconds, so a schedule needs no number of steps that nobody knows.
"""

from __future__ import annotations

import math

from lathe.train.settings import ScheduleSettings


def rate(settings: ScheduleSettings, step: int, progress: float) -> float:
    """The share of the peak learning rate for a step.

    Args:
        step: how many steps are done.
        progress: which share of the budget they spent, 0 to 1.
    """
    if step < settings.warmup:
        return (step + 1) / settings.warmup
    if settings.kind == "inverse_sqrt":
        start = max(settings.warmup, 1)
        return math.sqrt(start / max(step + 1, start))
    # What the warm-up spent: exact for a budget of steps, the mean so far for one of tokens or seconds.
    spent = settings.warmup * progress / step if step else 0.0
    place = (progress - spent) / (1.0 - spent) if spent < 1.0 else 1.0
    return settings.floor + (1.0 - settings.floor) * _fall(settings, min(max(place, 0.0), 1.0))


def _fall(settings: ScheduleSettings, place: float) -> float:
    if settings.kind == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * place))
    if settings.kind == "linear":
        return 1.0 - place
    if settings.kind == "wsd" and place > 1.0 - settings.decay:
        return 1.0 - math.sqrt((place - 1.0 + settings.decay) / settings.decay)
    return 1.0
