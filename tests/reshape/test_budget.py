"""A budget is met, by sizes that were measured, and never worse than by the best single axis."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import lathe
from lathe.blueprint import count
from lathe.errors import RequestError
from lathe.families import objections
from lathe.reshape import budget_cost
from lathe.reshape.budget import plan_budget
from lathe.reshape.budget_axes import Terms, offered, smallest
from lathe.reshape.budget_cost import BudgetSettings, ByteCost, LatencyCost, read_budget
from lathe.reshape.budget_trial import RowsProbe, TextProbe
from lathe.reshape.resize import resize
from lathe.reshape.text import Documents, TextSettings
from lathe.text.train import train_tokenizer

TINY = {"d_model": 16, "n_layers": 2, "n_heads": 2, "d_head": 8, "d_ff": 24, "vocab_size": 64}
NO_IDS: dict[str, Any] = {"tokens.eos": [], "tokens.bos": None, "tokens.pad": None, "tokens.decoder_start": None}


def rows(seed: int = 0) -> list[torch.Tensor]:
    return [torch.randint(2, 60, (10, 16), generator=torch.Generator().manual_seed(seed))]


SMALL = {"d_model": 64, "n_layers": 3, "n_heads": 4, "d_head": 16, "d_ff": 96, "vocab_size": 800}


@pytest.mark.parametrize("preset", ["bert-base-uncased", "t5-small", "gpt2", "llama-3.1-8b"])
def test_what_is_offered_fits_the_family_and_saves(preset: str):
    source = lathe.preset(preset).with_({**SMALL, **NO_IDS, "n_kv_heads": None})
    axes, without = offered(source, Terms(least_vocabulary=200))
    fields = {axis.field for axis in axes}
    assert {"embedding.vocab_size", "d_model"} <= fields
    assert "embedding rank" in without
    for axis in axes:
        assert axis.sizes == tuple(sorted(axis.sizes, reverse=True))
        for size in {axis.sizes[0], axis.sizes[-1]}:
            made = Terms().architecture(source, {axis.field: size})
            assert made is not None
            assert not objections(made)
            assert count(made) < count(source)
    least = Terms().architecture(source, smallest(source, axes, Terms()))
    assert least is not None
    assert count(least) < count(source) / 4


def test_heads_that_would_have_to_grow_are_offered_only_in_the_own_form():
    source = lathe.preset("bert-base-uncased").with_({**SMALL, "tokens.mask": None})
    assert {"query heads", "embedding rank"} <= set(offered(source, Terms())[1])
    own = {axis.label for axis in offered(source, Terms(own_form=True))[0]}
    assert "embedding rank" in own


def test_depth_saves_time_where_layers_share_their_weights_and_nothing_else():
    source = lathe.preset("albert-base-v2").with_({**SMALL, **NO_IDS, "tokens.mask": None})
    labels = [{axis.label for axis in offered(source, Terms(timed=timed))[0]} for timed in (False, True)]
    assert labels[1] - labels[0] == {"depth"}


def test_sizes_that_are_given_are_no_axes():
    axes, without = offered(lathe.preset("gpt2").with_({**SMALL, **NO_IDS}), Terms(fixed=(("d_ff", 48),)))
    assert without["feed-forward"] == "its size was given"
    assert all("d_ff" not in axis.field for axis in axes)


@pytest.mark.parametrize("preset", ["gpt2", "t5-small", "bart-base", None])
def test_bytes_are_those_of_the_file(preset: str | None, tmp_path: Path):
    architecture = lathe.preset(preset or "gpt2").with_({**TINY, **NO_IDS, "tokens.mask": None})
    if preset is None:
        architecture = architecture.with_(d_head=5)  # only Lathe's own form holds it
    for dtype in (torch.float32, torch.bfloat16):
        lathe.Model(architecture, seed=0, dtype=dtype).save(tmp_path / str(dtype))
        assert ByteCost(dtype).of(architecture) == (tmp_path / str(dtype) / "model.safetensors").stat().st_size
    lathe.Model(architecture, seed=0).save(tmp_path / "shards", max_shard_bytes=9000)
    files = list((tmp_path / "shards").glob("*.safetensors"))
    assert len(files) > 2
    assert ByteCost(torch.float32, 9000).of(architecture) == sum(file.stat().st_size for file in files)


@pytest.mark.parametrize("preset", ["gpt2", "t5-small", "bert-base-uncased"])
def test_an_architecture_is_timed_once(preset: str):
    architecture = lathe.preset(preset).with_({**TINY, **NO_IDS, "tokens.mask": None})
    cost = LatencyCost(architecture, torch.device("cpu"), torch.float32)
    assert cost.of(architecture) == cost.of(architecture) > 0


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ({"max_parameters": "30M"}, ("parameters", 30_000_000)),
        ({"max_bytes": "40MB", "budget.effort": 3}, ("bytes", 40_000_000)),
        ({"max_bytes": "1.5GiB"}, ("bytes", 1.5 * 2**30)),
        ({"max_bytes": 4096}, ("bytes", 4096)),
        ({"max_latency": 12.5}, ("milliseconds", 12.5)),
    ],
)
def test_a_budget_is_read_as_people_write_it(words, expected):
    found = read_budget(words)
    assert found is not None
    assert (found.name, found.limit) == expected


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ({"max_parameters": "few"}, "max_parameters='few': expected a count"),
        ({"max_bytes": "40 apples"}, "max_bytes='40 apples': expected bytes"),
        ({"max_bytes": "1M", "max_latency": 3.0}, "max_bytes and max_latency are two budgets: give one"),
        ({"max_latency": -1.0}, "max_latency=-1: expected more than 0 milliseconds"),
        ({"budget.effort": 3}, "there is no budget"),
        ({"max_bytes": "1M", "budget.efort": 3}, "did you mean 'effort'"),
        ({"max_bytes": "1M", "budget.effort": 99}, "effort=99"),
    ],
)
def test_a_budget_that_cannot_be_is_one_line(words, line: str):
    with pytest.raises(RequestError) as error:
        read_budget(words)
    assert line in str(error.value)
    assert "\n" not in str(error.value)


def _field(word: str) -> tuple[str, int]:
    name, _, size = word.partition("=")
    return name, int(size)


@pytest.mark.parametrize("preset", ["gpt2", "t5-small"])
def test_the_plan_meets_the_budget_and_is_the_best_of_all_that_was_measured(preset: str):
    source = lathe.preset(preset).with_({**TINY, **NO_IDS, "n_layers": 3, "tokens.decoder_start": 0})
    source = source if preset == "t5-small" else source.with_({"tokens.decoder_start": None})
    model = lathe.Model(source, seed=0)
    both = preset == "t5-small"
    batches = [{"input_ids": ids, **({"decoder_input_ids": ids} if both else {})} for ids in rows()]
    limit = int(0.6 * count(source))
    settings = BudgetSettings(parameters=limit, effort=1)
    plan = plan_budget(model, RowsProbe(model, batches), settings)
    made = Terms().architecture(source, plan.changes)
    assert made is not None
    assert count(made) == plan.after <= limit
    assert plan.loss_before == pytest.approx(0.0, abs=1e-6)
    within = [trial for trial in plan.trials if trial["cost"] <= limit and trial["loss"] is not None]
    assert plan.loss == min(trial["loss"] for trial in within)
    assert plan.best_alone is None or plan.loss <= plan.best_alone.loss
    tried = [repr(sorted(trial["sizes"].items())) for trial in plan.trials]
    assert len(tried) == len(set(tried))
    assert len(tried) <= 1 + 2 * len(plan.rows) + 3
    assert sum(row.saved for row in plan.rows) == plan.before - plan.after
    assert plan_budget(model, RowsProbe(model, batches), settings).to_dict() == plan.to_dict()
    assert source.with_(dict(_field(word) for word in plan.written.split())) == source.with_(plan.changes)
    assert plan.written in str(plan)
    assert "Best single axis" in str(plan) or "No single axis" in str(plan)


def test_a_budget_that_cannot_be_met_says_the_least_possible():
    model = lathe.Model(lathe.preset("gpt2").with_({**TINY, **NO_IDS}), seed=0)
    probe = RowsProbe(model, [{"input_ids": ids} for ids in rows()])
    with pytest.raises(RequestError, match=r"max_parameters=10: the least possible is [0-9,]+ parameters \(.*d_model="):
        plan_budget(model, probe, BudgetSettings(parameters=10))
    with pytest.raises(RequestError, match=r"max_bytes=.* which is within it: nothing to cut"):
        plan_budget(model, probe, BudgetSettings(bytes=10**9))


class Calls(TorchDispatchMode):
    """A clock that tells how many operations have run: the work of a model, the same on every machine."""

    calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        return func(*args, **(kwargs or {}))

    def perf_counter(self) -> float:
        """Milliseconds, in seconds."""
        return self.calls / 1000


def test_milliseconds_are_met_by_what_was_timed(monkeypatch: pytest.MonkeyPatch):
    model = lathe.Model(lathe.preset("gpt2").with_({**TINY, **NO_IDS, "n_layers": 4}), seed=0)
    probe = RowsProbe(model, [{"input_ids": ids} for ids in rows()])
    with Calls() as clock:
        monkeypatch.setattr(budget_cost, "time", clock)
        timed = LatencyCost(model.architecture, torch.device("cpu"), torch.float32)
        one, four = (timed.of(model.architecture.with_(n_layers=number)) for number in (1, 4))
        assert 1 < one < four
        plan = plan_budget(model, probe, BudgetSettings(milliseconds=(one + four) / 2, effort=1))
    assert plan.before == pytest.approx(four)
    assert one <= plan.after <= (one + four) / 2
    assert plan.changes["decoder.n_layers"] < 4
    assert plan.unit == "milliseconds"
    assert "threads" in plan.timed


def words(number: int, seed: int) -> list[str]:
    chance = random.Random(seed)
    some = [
        "the",
        "a",
        "lathe",
        "turns",
        "wood",
        "metal",
        "stone",
        "to",
        "size",
        "that",
        "is",
        "asked",
        "foxes",
        "jump",
    ]
    return [" ".join(chance.choices(some, k=20)) for _ in range(number)]


def test_a_loss_is_counted_for_each_token_of_the_source_whatever_the_vocabulary():
    tokenizer = train_tokenizer(words(60, 0), 280, convention="gpt2")
    ids = {"pad": tokenizer.pad_id, "bos": tokenizer.bos_id, "eos": [tokenizer.eos_id] if tokenizer.eos_id else []}
    tokens = {**lathe.preset("gpt2").tokens.to_dict(), **ids}
    source = lathe.preset("gpt2").with_({**TINY, "vocab_size": tokenizer.vocab_size, "tokens": tokens})
    model = lathe.Model(source, seed=0, tokenizer=tokenizer)
    text = TextSettings(file="text.txt", length=32)
    held = Documents.of(words(4, 1))
    probe = TextProbe(model, tokenizer, Documents.of(words(20, 2)), held, text, text, tokens=10**6)
    assert probe.is_whole()
    cut = resize(model, {"vocab_size": 258}, calibrate=probe.batches(whole=True), tokenizer=tokenizer)
    smaller = lathe.Model(cut.architecture, cut.tensors, tokenizer=cut.tokenizer)
    assert cut.tokenizer is not None
    of_source, of_cut = (
        sum(map(len, each.encode_batch(list(held.texts), add_special_tokens=False)))
        for each in (tokenizer, cut.tokenizer)
    )
    assert of_cut > of_source
    # Both models know nothing, so a token costs about the logarithm of its vocabulary.
    assert probe.loss(model, tokenizer) == pytest.approx(math.log(tokenizer.vocab_size), rel=0.1)
    expected = math.log(258) * of_cut / of_source
    assert probe.loss(smaller, cut.tokenizer) == pytest.approx(expected, rel=0.1)


def test_a_word_that_can_no_longer_be_read_costs_a_guess_for_each_token_that_it_had():
    tokenizer = train_tokenizer(words(60, 0), 60, convention="bert")
    source = lathe.preset("bert-base-uncased", head="masked").with_(
        {**TINY, "vocab_size": tokenizer.vocab_size, "max_positions": 64, "tokens.mask": tokenizer.mask_id}
    )
    model = lathe.Model(source, seed=0, tokenizer=tokenizer)
    text = TextSettings(file="text.txt", length=32)
    held = Documents.of(words(4, 1))
    probe = TextProbe(model, tokenizer, Documents.of(words(20, 2)), held, text, text, tokens=10**6)
    cut = resize(model, {"vocab_size": 12}, calibrate=probe.batches(whole=True), tokenizer=tokenizer)
    smaller = lathe.Model(cut.architecture, cut.tensors, tokenizer=cut.tokenizer)
    assert cut.tokenizer is not None
    encoded = cut.tokenizer.encode_batch(list(held.texts), add_special_tokens=False)
    unread = sum(number == cut.tokenizer.unk_id for ids in encoded for number in ids)
    assert unread > 10
    assert probe.loss(smaller, cut.tokenizer) > 0.9 * math.log(tokenizer.vocab_size)


def test_from_python_a_budget_is_one_argument_and_the_plan_can_be_had_alone():
    source = lathe.preset("t5-small").with_({**TINY, "n_layers": 1, "d_ff": 16})
    model, limit = lathe.Model(source, seed=0).train(), int(0.7 * count(source))
    plan = lathe.plan_budget(model, calibrate=rows(), max_parameters=limit, effort=1, method="select", d_ff=12)
    said = str(plan)
    assert " with d_ff=12.\n" in said
    assert f"from {plan.loss_before:.4f} with d_ff=12" in said
    assert "Given: d_ff=12; what the rest costs is measured from there." in said
    assert "its size was given" not in said
    assert "the source's" not in said.split("Budget")[0]
    assert plan.after <= limit
    assert plan.changes["d_ff"] == 12
    cut = lathe.resize(model, calibrate=rows(), max_parameters=limit, method="truncate")
    assert count(cut.architecture) <= limit
    assert model.training
    with pytest.raises(RequestError, match="give max_parameters"):
        lathe.plan_budget(model, calibrate=rows())
