"""A shared stack and its layers' remainders: nearer to the parent with the rank, and the files that PEFT reads."""

from __future__ import annotations

import pytest
import torch

from lathe.adapt import load_adapter, save_adapter, set_active
from lathe.errors import RequestError
from lathe.presets import preset
from lathe.reshape.share import share
from lathe.reshape.share_remainder import with_remainder
from lathe.reshape.state import State
from tests.reshape.test_share import outputs
from tests.reshape.test_width import build, rebuilt

SIZES = {"d_model": 12, "n_layers": 2, "n_heads": 2, "d_head": 6, "d_ff": 16, "vocab_size": 40}


def parent():
    """A T5, which has no biases, with norms that are equal in every layer: at full rank nothing is lost."""
    model = build(preset("t5-small").with_(SIZES))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.fill_(0.8)
    return model


def test_the_remainder_takes_the_shared_stack_back_to_its_parent():
    model = parent()
    away = [(outputs(with_remainder(model, "all", rank)) - outputs(model)).norm() for rank in (2, 8, 12)]
    assert away[2] < 1e-6 * outputs(model).norm()
    assert away[2] < away[1] < away[0]


def test_the_shared_file_and_the_adapter_give_the_model_back(tmp_path):
    model = parent()
    relaxed = with_remainder(model, "all", 4)
    wanted = outputs(relaxed)
    save_adapter(relaxed, tmp_path / "remainder", name="remainder")
    set_active(relaxed, None)
    base = State(relaxed.architecture, {n: t for n, t in relaxed.state_dict().items() if ".adapters." not in n})
    for name, _ in model.architecture.stacks:
        base, step = share(base, name, "all")
        assert step.exact
    for name, _ in model.architecture.stacks:
        base, _ = share(base, name, "none")
    again = rebuilt(base)
    load_adapter(again, tmp_path / "remainder", name="remainder")
    torch.testing.assert_close(outputs(again), wanted, rtol=1e-4, atol=1e-5)


def test_a_rank_that_is_too_large_is_refused():
    with pytest.raises(RequestError, match="rank=13: expected 1 to 12"):
        with_remainder(parent(), "all", 13)
