"""What the families that are a decoder alone have in common: their heads and their plainest objections."""

from __future__ import annotations

from typing import NamedTuple

from lathe.architecture import Architecture, Classifier, Head, LanguageHead, Pooler
from lathe.families.base import Check, Config, Objection, given, n_labels


class Classes(NamedTuple):
    """A family's stock classes; the first is the one read when a config names none."""

    language: str
    bare: str
    classification: str


def read_head(config: Config, class_name: str, classes: Classes, *, tied: bool) -> Head:
    """The head that a class puts on.

    Args:
        tied: the stock default of `tie_word_embeddings`.
    """
    if class_name == classes.language:
        return Head(language=LanguageHead(tied=given(config, "tie_word_embeddings", tied)))
    if class_name == classes.classification:
        # The stock class reads the last token that is no pad, whichever side the pads are on.
        return Head(pooler=Pooler(token="last"), classifier=Classifier(n_labels=n_labels(config), bias=False))
    return Head()


def write_class(architecture: Architecture, classes: Classes) -> str:
    """The class whose head is the architecture's."""
    head = architecture.head
    if head.language is not None:
        return classes.language
    return classes.bare if head.classifier is None else classes.classification


def decoder_alone(model_type: str, positions: str) -> Check:
    """The check that there is a decoder, no encoder, and this kind of positions."""

    def check(architecture: Architecture) -> Objection | None:
        if architecture.encoder is not None or architecture.decoder is None:
            parts = " and ".join(name for name, _ in architecture.stacks)
            return Objection(f"it has an {parts}, and a {model_type} is a decoder alone", {})
        kind = architecture.decoder.positions.kind
        if kind != positions:
            return Objection(f"its positions are {kind}, and a {model_type} has {positions} ones", {})
        return None

    return check
