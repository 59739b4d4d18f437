"""How close written texts are to reference texts: exact match, BLEU, chrF and chrF++, as `sacrebleu` counts them.

- `exact_match`: the share of outputs that are their reference, character for character, blanks at the ends aside.
- `bleu` (Papineni et al. 2002): how many runs of one to four words of the outputs stand in their references, over
  the corpus as a whole, with a penalty for outputs that are too short. What a word is follows from `bleu_tokenize`;
  scores under different ones cannot be compared.
- `chrf` (Popović 2015): the F-score, with recall counted twice, over runs of one to six characters. It needs no
  words, so it also judges languages that join them (Korean) or set no blanks (Chinese, Japanese).
- `chrf++` (Popović 2017): the same with single words and pairs of them counted in.

The last three go from 0 to 100. Each comes with sacrebleu's signature, the settings that another paper or tool must
share for its score to be comparable (Post 2018).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lathe.errors import RequestError

# sacrebleu's ways to cut a text into words that need no download and no other package.
BLEU_TOKENIZERS = ("13a", "intl", "char", "zh", "none")


@dataclass(frozen=True)
class TextScores:
    """Scores of a set of outputs; `signatures` says how `bleu`, `chrf` and `chrf++` were counted."""

    exact_match: float
    bleu: float
    chrf: float
    chrf_plus_plus: float
    signatures: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """The scores by the names that an answer has them under."""
        scores = {"exact_match": self.exact_match, "bleu": self.bleu, "chrf": self.chrf, "chrf++": self.chrf_plus_plus}
        return {**scores, "signatures": self.signatures}


def score_texts(outputs: Sequence[str], references: Sequence[str], *, bleu_tokenize: str = "13a") -> TextScores:
    """Compare each output with its one reference.

    Args:
        bleu_tokenize: one of `BLEU_TOKENIZERS`. `13a` splits at blanks and punctuation; `char` makes every character
            a word, for languages without blanks.

    Raises:
        RequestError: nothing to compare, or not one reference for each output.
    """
    from sacrebleu.metrics import BLEU, CHRF

    if not outputs or len(outputs) != len(references):
        raise RequestError(f"{len(outputs)} outputs and {len(references)} references: expected as many, and some")
    ours, wanted = list(outputs), [list(references)]
    # force: sacrebleu would warn of outputs that end in " .", as tokenised text does; ours is what the model wrote.
    metrics = {"bleu": BLEU(tokenize=bleu_tokenize, force=True), "chrf": CHRF(), "chrf++": CHRF(word_order=2)}
    scores = {name: float(metric.corpus_score(ours, wanted).score) for name, metric in metrics.items()}
    same = sum(output.strip() == reference.strip() for output, reference in zip(outputs, references))
    return TextScores(
        exact_match=same / len(outputs),
        bleu=scores["bleu"],
        chrf=scores["chrf"],
        chrf_plus_plus=scores["chrf++"],
        signatures={name: str(metric.get_signature()) for name, metric in metrics.items()},
    )
