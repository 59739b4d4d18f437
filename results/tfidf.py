"""TF-IDF and logistic regression on labelled reviews: what a sentiment model has to beat.

    python results/tfidf.py --train reviews-ko.train.tsv.gz --valid reviews-ko.valid.tsv.gz

Two forms, each with the better of two strengths of regularisation by accuracy on `valid`, which favours the baseline:
words and pairs of words, and runs of one to four characters, which suit Korean better.
"""

from __future__ import annotations

import argparse
import json

from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from lathe.data import read

FORMS = {
    "words": {"ngram_range": (1, 2), "min_df": 2},
    "characters": {"analyzer": "char", "ngram_range": (1, 4), "min_df": 3},
}


def main() -> None:
    """Train and score both forms; print one JSON line for each."""
    words = argparse.ArgumentParser(description="TF-IDF and logistic regression.")
    words.add_argument("--train", required=True)
    words.add_argument("--valid", required=True)
    given = words.parse_args()
    texts, labels = labelled(given.train)
    held_out, wanted = labelled(given.valid)
    for name, form in FORMS.items():
        vectors = TfidfVectorizer(sublinear_tf=True, **form)
        train, valid = vectors.fit_transform(texts), vectors.transform(held_out)
        scores = {
            strength: LogisticRegression(C=strength, max_iter=300).fit(train, labels).score(valid, wanted)
            for strength in (1.0, 4.0)
        }
        best = max(scores, key=lambda strength: scores[strength])
        answer = {"form": name, "features": train.shape[1], "C": best, "accuracy": scores[best]}
        print(json.dumps(answer), flush=True)


def labelled(file: str) -> tuple[list[str], list[int]]:
    """The texts and their labels."""
    rows = list(read(file, fields={"text": "document", "label": "label"}))
    return [row["text"] for row in rows], [int(row["label"]) for row in rows]


if __name__ == "__main__":
    main()
