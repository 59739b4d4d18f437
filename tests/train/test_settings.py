"""Settings that cannot be are refused with the line that says what was expected."""

from __future__ import annotations

import pytest

from lathe.errors import RequestError
from lathe.train import TrainSettings


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({}, "no end: give steps, tokens or seconds"),
        ({"steps": 0}, "steps=0: expected a whole number from 1"),
        ({"steps": 1, "learning_rate": 1.0}, "unknown field 'learning_rate'"),
        ({"steps": 1, "optimizer": {"lrr": 1.0}}, r"unknown field 'optimizer.lrr'.*did you mean 'lr'"),
        ({"steps": 1, "optimizer": {"lr": 0.0}}, "lr=0.0: expected more than 0"),
        ({"steps": 1, "optimizer": {"lr": "fast"}}, "lr='fast': expected a number"),
        ({"steps": 1, "optimizer": {"clip": -1.0}}, "clip=-1.0"),
        ({"steps": 1, "optimizer": {"weight_decay": -0.1}}, "weight_decay=-0.1"),
        ({"steps": 1, "schedule": {"kind": "step"}}, "expected one of cosine, linear"),
        ({"steps": 1, "precision": "fp8"}, "expected one of fp32, bf16"),
        ({"steps": 1, "dropout": 1.0}, "dropout=1.0: expected a probability"),
        ({"seconds": -2.0}, "seconds=-2.0: expected more than 0"),
    ],
)
def test_what_cannot_be_is_refused(values: dict, words: str):
    with pytest.raises(RequestError, match=words):
        TrainSettings.from_dict(values)


def test_settings_survive_their_json_form():
    settings = TrainSettings.from_dict({"steps": 5, "optimizer": {"lr": 1, "clip": None}, "dropout": 0.1})
    assert settings.optimizer.lr == 1.0
    assert TrainSettings.from_dict(settings.to_dict()) == settings
