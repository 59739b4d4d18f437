"""Objectives over whole records: pairs to translate, texts to label; and every objective by its name."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from lathe.errors import RequestError
from lathe.objectives import OBJECTIVES, Classification, Masked, Seq2Seq, SpecialTokens, objective
from lathe.presets import preset

RNG = np.random.default_rng(0)


def test_a_pair_has_the_marks_that_the_tokenizer_has(special: SpecialTokens):
    record = {"source": np.array([10, 11, 12]), "target": np.array([20, 21])}
    both = Seq2Seq(special=special).sample(record, RNG)
    assert (both.input_ids.tolist(), both.labels.tolist()) == ([5, 10, 11, 12, 1], [5, 20, 21, 1])
    t5 = Seq2Seq(special=replace(special, bos=None)).sample(record, RNG)
    assert (t5.input_ids.tolist(), t5.labels.tolist()) == ([10, 11, 12, 1], [20, 21, 1])


def test_long_pairs_are_shortened_where_that_was_asked(special: SpecialTokens):
    objective_ = Seq2Seq(special=special, max_source=6, max_target=5)
    record = {"source": np.arange(10, 30), "target": np.arange(30, 50)}
    sample = objective_.sample(record, RNG)
    assert (sample.input_ids.tolist(), sample.labels.tolist()) == ([5, 10, 11, 12, 13, 1], [5, 30, 31, 32, 1])
    widths = objective_.record_widths({"source": np.array([20, 1]), "target": np.array([20, 0])})
    assert [side.tolist() for side in widths] == [[6, 3], [5, 2]]


FRAMED: dict[str, Any] = {"front": (2,), "middle": (3,), "back": (3,), "token_types": True}


def test_a_labelled_text_is_the_tokenizers_row(special: SpecialTokens):
    sample = Classification(special=replace(special, **FRAMED), n_labels=3).sample(
        {"text": np.array([10, 11]), "label": np.array([2])}, RNG
    )
    assert sample.input_ids.tolist() == [2, 10, 11, 3]
    assert sample.token_type_ids is not None
    assert sample.token_type_ids.tolist() == [0] * 4
    assert sample.numbers == {"labels": 2}


def test_a_labelled_pair_has_two_types_and_the_longer_text_gives_way(special: SpecialTokens):
    framed = Classification(special=replace(special, **FRAMED), n_labels=2, pairs=True, max_length=9)
    record = {"text": np.arange(10, 20), "pair": np.array([30, 31]), "label": np.array([0])}
    sample = framed.sample(record, RNG)
    assert sample.input_ids.tolist() == [2, 10, 11, 12, 13, 3, 30, 31, 3]
    assert sample.token_type_ids is not None
    assert sample.token_type_ids.tolist() == [0, 0, 0, 0, 0, 0, 1, 1, 1]
    assert framed.record_widths({"text": np.array([10, 1]), "pair": np.array([2, 1])})[0].tolist() == [9, 5]


def test_rows_without_marks_or_types_are_the_text(special: SpecialTokens):
    sample = Classification(special=special, n_labels=2).sample({"text": np.array([10]), "label": np.array([1])}, RNG)
    assert sample.input_ids.tolist() == [10]
    assert sample.token_type_ids is None


def test_a_classifier_of_other_labels_is_refused(special: SpecialTokens):
    bert = preset("bert-base-uncased", head="classification").with_(n_labels=2)
    Classification(special=special, n_labels=2).fit(bert)
    with pytest.raises(RequestError, match="the data has 3 labels and the model's classifier 2; set n_labels=3"):
        Classification(special=special, n_labels=3).fit(bert)
    with pytest.raises(RequestError, match="no classifier of its own"):
        Classification(special=special, n_labels=2).fit(preset("bert-base-uncased", head="masked"))


def test_a_label_out_of_range_is_named(special: SpecialTokens):
    with pytest.raises(RequestError, match="record 3: label 2 is out of range; expected 0 to 1"):
        Classification(special=special, n_labels=2).check_labels(np.array([0, 1, 2, -1]))


def test_every_objective_has_its_name(special: SpecialTokens):
    needed = {"classification": {"n_labels": 2}}
    for name, kind in OBJECTIVES.items():
        assert type(objective(name, special, **needed.get(name, {}))) is kind
    made = objective("masked", replace(special, continues=(50,)), whole_words=True, rate=0.2)
    assert isinstance(made, Masked)
    assert (made.whole_words, made.rate) == (True, 0.2)


def test_an_unknown_name_or_setting_is_one_line(special: SpecialTokens):
    with pytest.raises(RequestError, match=r"unknown objective 'sentance_order': expected one of .*did you mean"):
        objective("sentance_order", special)
    with pytest.raises(RequestError, match="unknown field 'spans'"):
        objective("denoising", special, spans=3)
    with pytest.raises(RequestError, match="field 'n_labels' is missing"):
        objective("classification", special)
