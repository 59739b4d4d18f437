from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lathe.architecture import Architecture
from lathe.families import MODULES, objections
from lathe.planner import Plan, plan
from lathe.planner.consequences import SLIMMEST, STOUTEST
from lathe.presets import names, preset
from tests.strategies import architectures


def _about(made: Plan, word: str) -> str:
    return " ".join(each.text for each in made.consequences if each.about == word)


def _proposed(made: Plan, word: str) -> dict[str, Any]:
    return {k: v for each in made.consequences if each.about == word for k, v in each.changes.items()}


class TestHeads:
    def test_a_t5_keeps_its_heads_and_is_told_so(self) -> None:
        made = plan("t5-large", d_model=512)
        assert "Queries are 1,024 wide (16 heads of 64), 2.0 times the stream of 512" in _about(made, "heads")
        assert _proposed(made, "heads") == {"n_heads": 8}
        assert _about(made, "format") == ""  # its file format has a free d_kv

    def test_a_proportion_other_than_one_is_kept(self) -> None:
        assert _proposed(plan("t5-3b", d_model=512), "heads") == {"n_heads": 16}  # 32 of 128 on 1,024: fourfold

    def test_groups_stay_as_large(self) -> None:
        proposed = _proposed(plan("llama-3.1-8b", d_model=2048), "heads")
        assert proposed == {"n_heads": 16, "n_kv_heads": 4}

    def test_heads_that_were_set_by_hand_are_left_alone(self) -> None:
        assert _about(plan("t5-large", d_model=512, n_heads=12), "heads") == ""
        assert _about(plan("t5-large", {"decoder.attention.n_heads": 12}, d_model=512), "heads") != ""

    @pytest.mark.parametrize(("given", "n_heads"), [(4, 16), (8, 16), (32, None)])
    def test_key_and_value_heads_that_were_set_by_hand_stay_as_many(self, given: int, n_heads: int | None) -> None:
        """And what is proposed can be had with them; as many as there are query heads leave nothing to propose."""
        proposed = _proposed(plan("llama-3.2-1b", d_model=1024, n_kv_heads=given), "heads")
        assert proposed == ({} if n_heads is None else {"n_heads": n_heads})
        assert plan("llama-3.2-1b", d_model=1024, n_kv_heads=given, **proposed).after is not None

    def test_stacks_of_their_own_get_their_own(self) -> None:
        made = plan("t5-small", {"encoder.attention.n_heads": 4}, d_model=256)
        assert _proposed(made, "heads") == {"decoder.attention.n_heads": 4}

    def test_a_small_change_of_width_is_no_drift(self) -> None:
        assert _about(plan("t5-large", d_model=1000), "heads") == ""


class TestFormat:
    @pytest.mark.parametrize("name", ["bert-base-uncased", "gpt2", "bart-base", "albert-base", "electra-base"])
    def test_a_width_that_no_longer_fits_the_heads_is_answered(self, name: str) -> None:
        made = plan(name, d_model=512)
        assert f"A stock {made.after.architecture.family} checkpoint cannot hold this" in _about(made, "format")
        assert made.proposal["n_heads"] == 8
        assert objections(made.after.architecture.with_(made.proposal)) == []

    def test_a_width_that_no_head_divides_changes_the_heads_width(self) -> None:
        made = plan("bert-base-uncased", d_model=500)
        fitted = made.after.architecture.with_(made.proposal)
        assert fitted.encoder is not None
        assert fitted.encoder.attention.d_q == 500
        assert objections(fitted) == []

    def test_what_was_asked_for_is_not_undone(self) -> None:
        made = plan("t5-small", d_embed=128, sharing="all")
        assert "It saves in Lathe's own form" in _about(made, "format")
        assert made.proposal == {}

    def test_a_preset_fits_its_own_family(self) -> None:
        for name in names():
            assert _about(plan(name), "format") == "", name


class TestFeedForward:
    def test_the_ratio_drifts_with_the_width(self) -> None:
        made = plan("t5-large", d_model=512)
        assert "4,096 wide, 8.0 times the stream; 4.0 times before" in _about(made, "feed_forward")
        assert _proposed(made, "feed_forward") == {"d_ff": 2048}

    def test_the_proposal_is_a_multiple_of_64(self) -> None:
        assert _proposed(plan("llama-2-7b", d_model=3000), "feed_forward")["d_ff"] % 64 == 0

    def test_a_ratio_that_was_changed_on_purpose_is_told_and_left(self) -> None:
        made = plan("t5-large", d_ff=2048)
        assert "2.0 times the stream; 4.0 times before" in _about(made, "feed_forward")
        assert _proposed(made, "feed_forward") == {}


class TestHead:
    def test_a_head_that_is_untied_costs_a_table(self) -> None:
        made = plan("t5-large", tied=False)
        assert "32.9M parameters more" in _about(made, "head")
        assert made.after.parameters.total - made.before.parameters.total == 32128 * 1024

    def test_a_head_that_is_tied_saves_one(self) -> None:
        assert "32.9M parameters fewer" in _about(plan("flan-t5-large", tied=True), "head")

    def test_a_tied_head_and_a_narrower_stream(self) -> None:
        assert "tied=false takes it exactly and adds 16.4M" in _about(plan("t5-large", d_model=512), "head")
        assert _about(plan("flan-t5-large", d_model=512), "head") == ""
        assert _about(plan("t5-large", d_model=2048), "head") == ""


class TestSharing:
    def test_shared_numbers_never_stand_without_the_word_on_computation(self) -> None:
        for made in (plan("albert-base"), plan("gpt2", sharing="all"), plan("albert-xxlarge", d_model=2048)):
            assert "not computation" in _about(made, "sharing")

    def test_the_model_gets_smaller_and_not_faster(self) -> None:
        made = plan("gpt2", sharing="all")
        assert made.after.forward == made.before.forward
        assert "smaller, not faster" in str(made)

    def test_unsharing(self) -> None:
        assert "no longer share" in _about(plan("albert-base", sharing="none"), "sharing")


class TestEmbedding:
    def test_factorising_beyond_the_break_even_saves_nothing(self) -> None:
        # e < V·d / (V + d), here 748.8
        assert "saves nothing" in _about(plan("albert-base", d_embed=749), "embedding")
        assert "saves nothing" not in _about(plan("albert-base", d_embed=748), "embedding")

    def test_a_table_that_is_most_of_the_model_is_named(self) -> None:
        assert "85% of the parameters are token tables" in _about(plan("mt5-small"), "embedding")
        assert _about(plan("t5-large"), "embedding") == ""


class TestOthers:
    def test_grouping_heads_shrinks_the_cache(self) -> None:
        assert "128 KiB a token in bfloat16 instead of 512 KiB" in _about(plan("llama-2-7b", n_kv_heads=8), "cache")

    def test_ungrouping_heads_merges_none(self) -> None:
        text = _about(plan("llama-3-8b", n_kv_heads=32), "cache")
        assert "serves 1 query head, 4 before" in text
        assert "merged" not in text

    def test_a_deep_and_narrow_model_is_called_so(self) -> None:
        assert "deep and narrow" in _about(plan("t5-large", d_model=256), "proportions")
        assert "shallow and wide" in _about(plan("llama-2-7b", n_layers=2), "proportions")
        assert _about(plan("t5-large", d_model=768), "proportions") == ""

    def test_the_presets_are_what_the_proportions_are_held_against(self) -> None:
        ratios = [a.d_model / stack.n_layers for a in map(preset, names()) for _, stack in a.stacks]
        assert min(ratios) > SLIMMEST
        assert max(ratios) < STOUTEST
        assert min(ratios) - SLIMMEST < 1
        assert STOUTEST - max(ratios) < 1

    def test_a_width_that_fills_no_block_is_named(self) -> None:
        assert "d_model=504 costs about as much" in _about(plan("t5-large", d_model=500), "blocks")
        assert "d_ff=2008" in _about(plan("t5-large", d_ff=2001), "blocks")
        assert _about(plan("gpt2", n_layers=4), "blocks") == ""  # its vocabulary was odd before

    def test_another_kind_is_no_other_size(self) -> None:
        assert "Another activation is another computation" in _about(plan("t5-small", activation="gelu"), "training")
        assert _about(plan("t5-small", d_model=256), "training") == ""

    def test_attention_weights_that_a_cpu_keeps(self) -> None:
        assert "attention weights" in _about(plan("t5-large"), "memory")
        assert _about(plan("llama-3.2-1b"), "memory") == ""

    def test_nothing_is_said_of_a_plain_preset(self) -> None:
        assert plan("llama-3.1-405b").consequences == []


CUTS = [
    ("t5-large", {"d_model": 512}),
    ("t5-3b", {"d_model": 768}),
    ("bert-base-uncased", {"d_model": 500}),
    ("gpt2", {"d_model": 600}),
    ("bart-large", {"d_model": 640}),
    ("albert-xxlarge", {"d_model": 1000}),
    ("electra-small", {"d_model": 200}),
    ("llama-3.1-8b", {"d_model": 3000}),
    ("llama-2-7b", {"d_model": 1111}),
    ("mistral-7b", {"d_model": 2000}),
    ("qwen2-0.5b", {"d_model": 512}),
]


@pytest.mark.parametrize(("name", "changes"), CUTS)
def test_what_is_proposed_leaves_nothing_to_propose(name: str, changes: dict[str, Any]) -> None:
    first = plan(name, changes)
    second = plan(name, {**changes, **first.proposal})
    assert second.proposal == {}
    assert objections(second.after.architecture) == []
    assert second.after.architecture.d_model == changes["d_model"]


def test_what_was_set_by_hand_is_not_to_be_undone() -> None:
    made = plan("bert-base-uncased", {"encoder.positions.kind": "rotary"})
    assert made.proposal == {}
    assert "own form" in _about(made, "format")


def test_what_a_format_wants_of_a_record_is_named_field_by_field() -> None:
    rotary = preset("bert-base-uncased").with_({"encoder.positions.kind": "rotary"})
    made = plan(rotary, d_model=384, d_ff=1536, n_heads=6)
    assert made.proposal == {"encoder.positions.kind": "learned"}
    assert "With encoder.positions.kind=learned it can." in _about(made, "format")


def test_what_cannot_be_typed_is_saved_in_lathes_own_form() -> None:
    for changes in ({}, {"d_ff": 2048}):
        made = plan(preset("bert-base-uncased").with_({"head.pooler": None}), changes)
        assert "own form" in _about(made, "format")


def test_one_field_that_was_set_leaves_its_neighbours_to_be_proposed() -> None:
    rotary = preset("bert-base-uncased").with_({"encoder.positions.kind": "rotary"})
    assert plan(rotary, max_positions=256).proposal == {"encoder.positions.kind": "learned"}


@settings(max_examples=60)
@given(architectures(), st.sampled_from([None, *MODULES]))
def test_every_architecture_of_any_family_can_be_planned_and_cut(
    architecture: Architecture, family: str | None
) -> None:
    made = plan(architecture.with_(family=family), d_model=10, batch=2)
    for each in made.consequences:
        assert each.text.endswith(".")
        assert "\n" not in each.text
    fitted = made.after.architecture.with_(made.proposal)
    if made.proposal and "own form" not in _about(made, "format"):
        assert objections(fitted) == []
