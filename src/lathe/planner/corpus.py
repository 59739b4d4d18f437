"""Is there enough text for this many parameters?

Hoffmann et al. (2022, §3, Table 3) trained over 400 decoders and found that a given amount of computation is
spent best on about 20 tokens for each parameter ("Chinchilla"). A model with fewer has more capacity than its
text can fill, and learns the text itself instead of the language: it over-fits. Muennighoff et al. (2023, §6)
found how far reading the same text again helps: up to 4 epochs almost as much as new text, with quickly
falling returns after that and next to none beyond about 16.

Both were measured on decoders trained from nothing. A model that is fine-tuned or healed already knows most
of what it needs, and gets by on far less.
"""

from __future__ import annotations

from dataclasses import dataclass

from lathe.planner.quantities import count_text

CHINCHILLA = 20.0
GOOD_EPOCHS, LAST_EPOCHS = 4, 16


@dataclass(frozen=True)
class CorpusAdvice:
    """How a corpus relates to a model trained on it from nothing.

    Attributes:
        tokens: the corpus, each token counted once.
        tokens_per_parameter: against the 20 of Chinchilla.
        epochs_to_chinchilla: how often the corpus would have to be read to reach 20.
        best_parameters: the parameters for which the corpus, read once, is 20 tokens each.
        risk: of over-fitting: low, moderate, high or very high.
        reason: why, in a sentence or two.
    """

    tokens: int
    tokens_per_parameter: float
    epochs_to_chinchilla: float
    best_parameters: int
    risk: str
    reason: str


def corpus_advice(parameters: int, tokens: int) -> CorpusAdvice:
    """Judge a corpus of `tokens` for a model of `parameters` (unique ones: shared weights see every layer's use)."""
    ratio = tokens / parameters
    epochs = CHINCHILLA / ratio
    best = max(1, round(tokens / CHINCHILLA))
    risk, reason = _judge(ratio, epochs, best)
    return CorpusAdvice(tokens, ratio, epochs, best, risk, reason)


def _judge(ratio: float, epochs: float, best: int) -> tuple[str, str]:
    if epochs <= 1:
        return "low", "There is more text than the model can learn by heart; one epoch uses it well."
    times = f"{epochs:,.0f}" if epochs >= 10 else f"{epochs:.1f}"
    if epochs <= GOOD_EPOCHS:
        return "moderate", (
            f"Reading the corpus {times} times reaches 20 tokens a parameter, and up to {GOOD_EPOCHS} epochs teach "
            "almost as much as new text. Watch the validation loss and stop when it rises."
        )
    if epochs <= LAST_EPOCHS:
        return "high", (
            f"It would take {times} epochs to reach 20 tokens a parameter; beyond {GOOD_EPOCHS} each repetition "
            f"teaches less. About {count_text(best)} to {count_text(GOOD_EPOCHS * best)} parameters would fit this "
            "corpus; or raise dropout and stop early."
        )
    return "very high", (
        f"It would take {times} epochs to reach 20 tokens a parameter, and beyond about {LAST_EPOCHS} repetition "
        f"teaches next to nothing: the model can learn the corpus by heart. About {count_text(best)} to "
        f"{count_text(GOOD_EPOCHS * best)} parameters would fit it; or start from a trained model and fine-tune."
    )
