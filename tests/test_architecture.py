from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lathe.architecture import (
    ALIASES,
    Architecture,
    Attention,
    Embedding,
    FeedForward,
    Norm,
    Positions,
    RotaryScaling,
    Sharing,
    Stack,
    Tokens,
)
from lathe.errors import RequestError
from lathe.presets import preset
from tests.strategies import architectures, sharings


@settings(max_examples=20)
@given(architectures(dropout=True))
def test_json_gives_back_the_same_architecture(architecture: Architecture) -> None:
    assert Architecture.from_json(architecture.to_json()) == architecture
    assert json.loads(architecture.to_json()) == architecture.to_dict()


@settings(max_examples=20)
@given(architectures())
def test_an_architecture_is_hashable_and_equal_to_its_copy(architecture: Architecture) -> None:
    copy = architecture.with_()
    assert copy == architecture
    assert hash(copy) == hash(architecture)


@settings(max_examples=20)
@given(architectures())
def test_every_field_can_be_set_to_what_it_holds(architecture: Architecture) -> None:
    for path, value in _leaves(architecture):
        assert architecture.with_({path: value}) == architecture, path


def _leaves(record: Any, path: str = "") -> list[tuple[str, Any]]:
    if not dataclasses.is_dataclass(record):
        return [(path, record)]
    found = [] if not path else [(path, record)]
    for field in dataclasses.fields(record):
        found += _leaves(getattr(record, field.name), f"{path}.{field.name}".lstrip("."))
    return found


class TestWith:
    def test_a_short_name_sets_every_stack(self) -> None:
        changed = preset("t5-small").with_(n_layers=4, d_ff=100)
        assert [stack.n_layers for _, stack in changed.stacks] == [4, 4]
        assert [stack.feed_forward.d_ff for _, stack in changed.stacks] == [100, 100]

    def test_a_path_sets_one_stack(self) -> None:
        changed = preset("t5-small").with_({"encoder.n_layers": 4})
        assert [stack.n_layers for _, stack in changed.stacks] == [4, 6]

    def test_a_smaller_vocabulary_forgets_the_ids_it_lost_and_keeps_the_others(self) -> None:
        small = preset("bart-base").with_(vocab_size=1000).tokens
        assert (small.pad, small.bos, small.eos, small.mask) == (1, 0, (2,), None)
        assert preset("gpt2").with_(vocab_size=1000).tokens.eos == ()

    def test_the_original_stays(self) -> None:
        before = preset("gpt2")
        before.with_(d_model=64)
        assert before == preset("gpt2")

    def test_several_changes_are_judged_together(self) -> None:
        changed = preset("llama-2-7b").with_(n_heads=6, n_kv_heads=3)
        assert changed.decoder is not None
        assert changed.decoder.attention.n_kv_heads == 3

    def test_sharing_is_set_by_its_word_by_a_record_or_by_its_parts(self) -> None:
        albert = preset("albert-base")
        assert albert.with_(sharing="groups:3").encoder == albert.with_(sharing=Sharing.parse("groups:3")).encoder
        assert albert.with_({"encoder.sharing.groups": 3}) == albert.with_(sharing="groups:3")

    def test_none_takes_a_part_away(self) -> None:
        assert preset("albert-base").with_(d_embed=None).width == 768
        assert preset("gpt2").with_({"head.language": None}).head.language is None

    @pytest.mark.parametrize("name", sorted(ALIASES))
    def test_every_short_name_stands_for_fields_that_exist(self, name: str) -> None:
        whole = preset("t5-small", head="classification").with_({"head.language": {"tied": True}})
        assert whole.paths(name) == list(ALIASES[name])

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"d_model": 0}, "d_model=0: expected a whole number from 1 to"),
            ({"d_model": -1}, "d_model=-1: expected a whole number from 1 to"),
            ({"d_model": "abc"}, "d_model='abc': expected a whole number"),
            ({"d_model": 10**9}, "d_model=1000000000: expected a whole number from 1 to"),
            ({"d_model": 512.5}, "d_model=512.5: expected a whole number"),
            ({"d_modle": 512}, "unknown field 'd_modle'"),
            ({"d_modle": 512}, "did you mean 'd_model'?"),
            ({"hidden_size": 512}, "'hidden_size': here it is called d_model"),
            ({"encoder_ffn_dim": 512}, "here it is called encoder.feed_forward.d_ff"),
            ({"encoder.n_layer": 4}, "did you mean 'n_layers'?"),
            ({"encoder.attention.foo": 4}, "unknown field 'encoder.attention.foo'"),
            ({"d_model.x": 4}, "d_model"),
            ({"": 4}, "unknown field ''"),
            ({".": 4}, "unknown field"),
            ({"n_layers": 0}, "encoder.n_layers=0: expected a whole number"),
            ({"n_heads": 12, "n_kv_heads": 5}, "n_kv_heads=5: expected a divisor of n_heads=12"),
            ({"vocab_size": 9, "tokens.eos": (9,)}, "tokens.eos[0]=9: expected an id below vocab_size=9"),
            ({"sharing": "some"}, "sharing='some': expected none, all"),
            ({"sharing": "groups:4"}, "6 layers cannot be split into 4 equal group(s)"),
            ({"activation": "gelo"}, "activation='gelo': expected one of relu, gelu"),
            ({"encoder": None}, "decoder.cross_attention=true: there is no encoder to attend to"),
            ({"decoder.cross_attention": False}, "the encoder would go unread"),
            ({"encoder.cross_attention": True}, "an encoder has nothing to attend to"),
            ({"encoder": None, "decoder": None}, "needs an encoder, a decoder or both"),
            ({"n_labels": 3}, "this architecture has no head.classifier.n_labels to set"),
            ({"head.classifier.n_labels": 3}, "this architecture has no head.classifier"),
            ({"head.classifier": {"n_labels": 2}}, "a classifier reads a pooled state; add head.pooler"),
            ({"head": "masked"}, "head='masked': expected fields of Head"),
            ({"encoder.sharing.groups": 2}, "nothing is shared"),
        ],
    )
    def test_a_change_that_cannot_be_is_one_line(self, changes: dict[str, Any], message: str) -> None:
        with pytest.raises(RequestError) as raised:
            preset("t5-small").with_(changes)
        assert message in str(raised.value)
        assert "\n" not in str(raised.value)


class TestJson:
    @pytest.mark.parametrize("text", ["", "{", "d_model: 3", "[1, 2]", "3", "null", '"t5"', "9" * 5000, "[" * 100_000])
    def test_text_that_is_no_architecture_is_one_line(self, text: str) -> None:
        with pytest.raises(RequestError) as raised:
            Architecture.from_json(text)
        assert "\n" not in str(raised.value)

    def test_an_unknown_field_is_named(self) -> None:
        plain = preset("gpt2").to_dict()
        plain["decoder"]["attention"]["rotary"] = True
        with pytest.raises(RequestError, match=r"unknown field 'decoder\.attention\.rotary'"):
            Architecture.from_dict(plain)

    def test_a_missing_field_is_named(self) -> None:
        plain = preset("gpt2").to_dict()
        del plain["decoder"]["attention"]
        with pytest.raises(RequestError, match="decoder: the field 'attention' is missing"):
            Architecture.from_dict(plain)


class TestSharing:
    @given(st.integers(1, 12).flatmap(lambda n: st.tuples(st.just(n), sharings(n))))
    def test_the_written_form_reads_back(self, drawn: tuple[int, Sharing]) -> None:
        assert Sharing.parse(str(drawn[1])) == drawn[1]

    @given(st.integers(1, 12).flatmap(lambda n: st.tuples(st.just(n), sharings(n))))
    def test_every_set_of_weights_is_used(self, drawn: tuple[int, Sharing]) -> None:
        n_layers, sharing = drawn
        stack = _stack(n_layers, sharing)
        assert {stack.attention_index(i) for i in range(n_layers)} == set(range(stack.n_attentions))
        assert {stack.feed_forward_index(i) for i in range(n_layers)} == set(range(stack.n_feed_forwards))

    @pytest.mark.parametrize(
        ("word", "attention", "feed_forward"),
        [
            ("none", [0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5]),
            ("all", [0] * 6, [0] * 6),
            ("attention", [0] * 6, [0, 1, 2, 3, 4, 5]),
            ("ffn", [0, 1, 2, 3, 4, 5], [0] * 6),
            ("groups:2", [0, 0, 0, 1, 1, 1], [0, 0, 0, 1, 1, 1]),
            ("cycle:2", [0, 1, 0, 1, 0, 1], [0, 1, 0, 1, 0, 1]),
            ("groups:2,cycle:3", [0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5]),
            ("feed_forward:groups:3", [0, 1, 2, 3, 4, 5], [0, 0, 1, 1, 2, 2]),
        ],
    )
    def test_which_layer_uses_which_weights(self, word: str, attention: list[int], feed_forward: list[int]) -> None:
        stack = _stack(6, Sharing.parse(word))
        assert [stack.attention_index(i) for i in range(6)] == attention
        assert [stack.feed_forward_index(i) for i in range(6)] == feed_forward

    @pytest.mark.parametrize(
        "word", ["", "some", "groups", "groups:0", "groups:-1", "groups:x", "cycle:1.5", "all:x:2"]
    )
    def test_another_word_is_refused(self, word: str) -> None:
        with pytest.raises(RequestError, match="expected none, all, attention"):
            Sharing.parse(word)

    def test_groups_of_nothing_are_refused(self) -> None:
        with pytest.raises(RequestError, match="nothing is shared"):
            Sharing(groups=2)


def _stack(n_layers: int, sharing: Sharing) -> Stack:
    return Stack(
        n_layers=n_layers,
        attention=Attention(n_heads=1, d_head=2),
        feed_forward=FeedForward(d_ff=4),
        sharing=sharing,
    )


class TestParts:
    def test_an_rms_norm_has_no_bias(self) -> None:
        assert not Norm(kind="rms").bias

    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda: Norm(eps=1.0), "eps=1.0: expected a small number"),
            (lambda: Norm(eps=-1e-5), "eps=-1e-05: expected a small number"),
            (lambda: Positions(kind="learned"), "learned positions need a whole number"),
            (lambda: Positions(kind="rotary"), "rotary positions need a whole number"),
            (lambda: Positions(kind="spiral"), "kind='spiral': expected one of none, learned"),
            (lambda: Positions(kind="rotary", max_positions=8, theta=0.0), "theta=0.0: expected more than 0"),
            (
                lambda: Positions(kind="learned", max_positions=8, scaling=RotaryScaling(kind="linear", factor=2.0)),
                "only rotary positions scale",
            ),
            (lambda: RotaryScaling(kind="linear", factor=0.5), "factor=0.5: expected 1 or more"),
            (
                lambda: RotaryScaling(kind="llama3", factor=8.0, low_freq_factor=4.0, high_freq_factor=4.0),
                "high_freq_factor=4.0: expected more than low_freq_factor=4.0",
            ),
            (lambda: Embedding(vocab_size=0), "vocab_size=0: expected a whole number"),
            (lambda: Tokens(pad=-1), "pad=-1: expected a whole number from 0"),
        ],
    )
    def test_a_part_that_cannot_be_is_one_line(self, make: Any, message: str) -> None:
        with pytest.raises(RequestError) as raised:
            make()
        assert message in str(raised.value)
        assert "\n" not in str(raised.value)

    def test_rotary_positions_want_an_even_head(self) -> None:
        with pytest.raises(RequestError, match="d_head=63: rotary positions turn pairs, so it must be even"):
            preset("llama-3-8b").with_(d_head=63)

    def test_only_a_causal_stack_has_a_window(self) -> None:
        with pytest.raises(RequestError, match="only a causal stack has a window"):
            preset("bert-base-uncased").with_(window=4)

    def test_relative_buckets_need_distances_to_hold(self) -> None:
        with pytest.raises(RequestError, match="n_buckets=3: expected 4 or more"):
            preset("t5-small").with_({"encoder.positions.n_buckets": 3})
        with pytest.raises(RequestError, match="max_distance=128: expected more than 128"):
            preset("t5-small").with_({"decoder.positions.n_buckets": 256})
        assert preset("t5-small").with_({"encoder.positions.n_buckets": 256}).encoder is not None

    def test_only_tables_limit_the_length(self) -> None:
        assert Positions(kind="learned", max_positions=8).limit == 8
        assert Positions(kind="rotary", max_positions=8).limit is None
