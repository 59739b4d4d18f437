"""Next-token prediction: marks, and the label that nothing stands before."""

from __future__ import annotations

import numpy as np
import pytest

from lathe.errors import RequestError
from lathe.objectives import IGNORED, Causal, SpecialTokens
from lathe.presets import preset


def test_marks_are_those_that_the_tokenizer_has(special: SpecialTokens):
    rng = np.random.default_rng(0)
    text = np.array([10, 11, 12])
    both = Causal(special=special).sample({"text": text}, rng)
    assert both.input_ids.tolist() == [5, 10, 11, 12, 1]
    assert both.labels.tolist() == [IGNORED, 10, 11, 12, 1]
    end = Causal(special=SpecialTokens(vocab_size=20, eos=1)).sample({"text": text}, rng)
    assert end.input_ids.tolist() == [10, 11, 12, 1]
    assert end.labels.tolist() == [IGNORED, 11, 12, 1]


def test_a_window_fills_the_row(special: SpecialTokens):
    objective = Causal(special=special)
    assert objective.widths(np.array([objective.window(64)]))[0].tolist() == [64]


def test_a_model_of_another_shape_is_refused(special: SpecialTokens):
    with pytest.raises(RequestError, match="trains a model with decoder; this one has encoder and decoder"):
        Causal(special=special).fit(preset("t5-small"))


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(special: SpecialTokens):
    with pytest.raises(RequestError, match=r"1,000 tokens and the model's vocabulary is 300"):
        Causal(special=special).fit(preset("gpt2").with_({"tokens.bos": None, "tokens.eos": []}, vocab_size=300))
