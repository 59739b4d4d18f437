from __future__ import annotations

import logging
from typing import Any

import pytest

import lathe
from lathe.checkpoint.load import GENERATION_KEYS
from lathe.errors import RequestError
from lathe.generate import Settings
from lathe.generate.settings import NEUTRAL, NO_TOKEN

GPT2 = lathe.preset("gpt2")
T5 = lathe.preset("t5-small")


def resolve(given: dict[str, Any] | None = None, stored: dict[str, Any] | None = None) -> Settings:
    return Settings.resolve(GPT2, given or {}, stored)


def test_the_architectures_tokens_serve_where_nothing_else_is_said() -> None:
    settings = Settings.resolve(T5, {})
    assert (settings.pad_token_id, settings.eos_token_id, settings.decoder_start_token_id) == (0, (1,), 0)
    assert not settings.do_sample
    assert settings.max_new_tokens is settings.max_length is None


def test_a_call_goes_before_the_stored_settings_and_those_before_the_tokens() -> None:
    stored = {"eos_token_id": [5, 6], "do_sample": True, "temperature": 0.5, "top_p": 0.9, "max_new_tokens": 7}
    settings = resolve({"temperature": 2.0}, stored)
    assert settings.eos_token_id == (5, 6)
    assert (settings.temperature, settings.top_p, settings.top_k, settings.max_new_tokens) == (2.0, 0.9, 50, 7)
    assert resolve({"eos_token_id": 9}, stored).eos_token_id == (9,)
    assert resolve({}, {"eos_token_id": None}).eos_token_id == (50256,)


def test_none_turns_a_setting_off() -> None:
    settings = resolve(
        {"eos_token_id": None, "top_k": None, "top_p": None, "temperature": None, "do_sample": True},
        {"top_k": 3, "top_p": 0.5, "temperature": 0.5},
    )
    assert (settings.eos_token_id, settings.top_k, settings.top_p, settings.temperature) == ((), None, 1.0, 1.0)
    assert settings.filler == 0


def test_greedy_choice_drops_the_stored_sampling_and_refuses_the_callers() -> None:
    settings = resolve({"do_sample": False}, {"do_sample": True, "temperature": 0.5, "top_p": 0.3})
    assert (settings.do_sample, settings.temperature, settings.top_p) == (False, 1.0, 1.0)
    for name, value in (("temperature", 0.5), ("top_k", 4), ("top_p", 0.5), ("min_p", 0.1), ("typical_p", 0.5)):
        with pytest.raises(RequestError, match=f"{name}={value}: nothing is sampled; pass do_sample=True"):
            resolve({name: value})


def test_the_length_asked_for_goes_before_the_other_one_stored() -> None:
    assert resolve({"max_length": 9}, {"max_new_tokens": 4}).max_new_tokens is None
    settings = resolve({"max_new_tokens": 4}, {"max_length": 9})
    assert (settings.max_new_tokens, settings.max_length) == (4, None)
    settings = resolve({"min_length": 60, "max_new_tokens": 80}, {"max_length": 50})
    assert (settings.min_length, settings.max_new_tokens) == (60, 80)
    with pytest.raises(RequestError, match="were both given"):
        resolve({"max_new_tokens": 4, "max_length": 9})


@pytest.mark.parametrize(
    ("given", "stored", "says"),
    [
        ({"min_length": 60}, {"max_length": 50}, "min_length=60: expected at most max_length=50, which is stored"),
        ({"max_new_tokens": 3}, {"min_new_tokens": 5}, "max_new_tokens=3: expected at least min_new_tokens=5, which"),
    ],
)
def test_a_length_that_does_not_go_with_a_stored_one_says_so(
    given: dict[str, Any], stored: dict[str, Any], says: str
) -> None:
    with pytest.raises(RequestError, match=says):
        resolve(given, stored)


def test_settings_of_transformers_that_do_nothing_are_let_through() -> None:
    resolve({"num_beams": 1, "use_cache": True, "repetition_penalty": 1.0, "return_dict_in_generate": None})
    stored = {"num_beams": 1, "early_stopping": True, "length_penalty": 2.0, "_from_model_config": True}
    assert resolve({}, {**stored, "transformers_version": "4.57.0", "top_k": 0, "do_sample": True}).top_k is None


def test_stored_settings_that_change_no_token_are_passed_over() -> None:
    """As fine-tuning with gradient checkpointing leaves `use_cache`, and the first Llama files have no padding."""
    stored = {"use_cache": False, "output_scores": True, "return_dict_in_generate": True, "pad_token_id": -1}
    assert resolve({}, stored).pad_token_id is None


def test_a_stored_id_outside_the_vocabulary_says_where_it_is() -> None:
    with pytest.raises(RequestError, match=r"eos_token_id=60000: .* it is stored with the model: pass another eos"):
        resolve({}, {"eos_token_id": [2, 60000]})
    assert resolve({"eos_token_id": 2}, {"eos_token_id": [2, 60000]}).eos_token_id == (2,)


def test_settings_of_older_configs_are_all_that_there_are() -> None:
    held_by_the_architecture = {"eos_token_id", "pad_token_id", "bos_token_id"}
    known = {*Settings.field_names(), *NEUTRAL} - NO_TOKEN - held_by_the_architecture - {"seed"}
    assert known == set(GENERATION_KEYS)


def test_stored_settings_that_lathe_does_not_do_are_refused_by_name_and_can_be_turned_off() -> None:
    stored = {"penalty_alpha": 0.6, "guidance_scale": 3, "early_stopping": True}
    with pytest.raises(RequestError) as error:
        resolve({}, stored)
    assert "ask for penalty_alpha=0.6, guidance_scale=3" in str(error.value)
    assert "pass penalty_alpha=None, guidance_scale=1.0" in str(error.value)
    assert not resolve({"penalty_alpha": None, "guidance_scale": 1.0}, stored).do_sample


def test_stored_beams_are_searched_with_and_turned_off_with_all_that_belongs_to_them() -> None:
    stored = {"num_beams": 4, "length_penalty": 2.0, "early_stopping": True, "no_repeat_ngram_size": 3}
    settings = resolve({}, stored)
    assert (settings.num_beams, settings.length_penalty, settings.early_stopping) == (4, 2.0, True)
    settings = resolve({"num_beams": 1}, stored)
    assert (settings.num_beams, settings.length_penalty, settings.early_stopping) == (1, 1.0, False)
    assert settings.no_repeat_ngram_size == 3
    assert resolve({"num_beams": None}, stored).num_beams == 1
    for name, value in (("length_penalty", 2.0), ("early_stopping", True), ("num_beam_groups", 2)):
        with pytest.raises(RequestError, match=f"{name}={value}: there are no beams; pass num_beams or leave it out"):
            resolve({name: value})


def test_a_single_token_or_text_stands_for_a_list_of_one() -> None:
    settings = resolve({"suppress_tokens": 7, "stop_strings": "end", "bad_words_ids": [[3, 4]]})
    assert (settings.suppress_tokens, settings.stop_strings, settings.bad_words_ids) == ((7,), ("end",), ((3, 4),))


def test_stored_settings_that_nobody_knows_are_passed_over_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="lathe"):
        resolve({}, {"of_the_future": 3})
    assert "of_the_future" in caplog.text


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"temprature": 0.5}, "unknown setting 'temprature'"),
        ({"temprature": 0.5}, "did you mean 'temperature'?"),
        ({"penalty_alpha": 0.4}, "penalty_alpha=0.4: not supported"),
        ({"num_beams": 0}, "num_beams=0: expected a whole number from 1"),
        ({"num_beams": 2, "num_return_sequences": 3}, "num_return_sequences=3: expected at most num_beams=2"),
        ({"num_beams": 4, "early_stopping": "always"}, "early_stopping='always': expected true, false or never"),
        ({"num_beams": 4, "length_penalty": float("nan")}, "length_penalty=nan: expected a number"),
        ({"num_beams": 4, "num_beam_groups": 3, "diversity_penalty": 1.0}, "expected a divisor of num_beams=4"),
        ({"num_beams": 4, "num_beam_groups": 2}, "groups need a penalty above 0"),
        ({"num_beams": 4, "diversity_penalty": 1.0}, "a penalty needs groups"),
        (
            {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 1.0, "do_sample": True},
            "groups of beams do not sample",
        ),
        ({"do_sample": True, "min_p": 1.5}, "min_p=1.5: expected a number from 0 to 1"),
        ({"do_sample": True, "min_p": -0.1}, "min_p=-0.1"),
        (
            {"do_sample": True, "epsilon_cutoff": 1.0},
            "epsilon_cutoff=1.0: expected at least 0, which cuts nothing, and below 1",
        ),
        (
            {"do_sample": True, "eta_cutoff": -0.1},
            "eta_cutoff=-0.1: expected at least 0, which cuts nothing, and below 1",
        ),
        ({"eta_cutoff": 0.01}, "eta_cutoff=0.01: nothing is sampled"),
        ({"force_words_ids": [[5]]}, "force_words_ids=[[5]]: not supported; leave it out"),
        ({"constraints": ["x"]}, "constraints=['x']: not supported"),
        ({"do_sample": True, "typical_p": 0.0}, "typical_p=0.0: expected more than 0 and at most 1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0: expected more than 0; 1 is no penalty"),
        ({"encoder_repetition_penalty": -1}, "encoder_repetition_penalty=-1.0"),
        ({"frequency_penalty": float("inf")}, "frequency_penalty=inf: expected a number"),
        ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size=-1"),
        ({"bad_words_ids": [5]}, "bad_words_ids=[5]: expected a list, each of it a list, each of it a whole number"),
        ({"bad_words_ids": [[]]}, "bad_words_ids holds an empty list"),
        ({"bad_words_ids": [[3, 50257]]}, "bad_words_ids=50257: expected an id from 0 to 50,256"),
        ({"suppress_tokens": [-1]}, "suppress_tokens=-1: expected an id from 0 to"),
        ({"begin_suppress_tokens": [60000]}, "begin_suppress_tokens=60000"),
        ({"forced_eos_token_id": 4, "suppress_tokens": [4]}, "forced_eos_token_id=4 is among suppress_tokens"),
        ({"stop_strings": [""]}, "stop_strings holds an empty text"),
        ({"stop_strings": [5]}, "stop_strings=[5]: expected a list, each of it a word"),
        ({"use_cache": False}, "use_cache=False: not supported"),
        ({"do_sample": True, "temperature": 0.0}, "temperature=0.0: expected more than 0; for the likeliest"),
        ({"do_sample": True, "temperature": -1.0}, "temperature=-1.0"),
        ({"do_sample": True, "temperature": float("nan")}, "temperature=nan: expected a number"),
        ({"do_sample": True, "temperature": float("inf")}, "temperature=inf: expected a number"),
        ({"do_sample": True, "temperature": "hot"}, "temperature='hot': expected a number"),
        ({"do_sample": True, "top_p": 0.0}, "top_p=0.0: expected more than 0 and at most 1"),
        ({"do_sample": True, "top_p": 1.5}, "top_p=1.5"),
        ({"do_sample": True, "top_p": float("nan")}, "top_p=nan: expected a number"),
        ({"do_sample": True, "top_k": 0}, "top_k=0: expected a whole number from 1"),
        ({"do_sample": True, "top_k": -3}, "top_k=-3"),
        ({"do_sample": True, "top_k": 2.5}, "top_k=2.5: expected a whole number"),
        ({"do_sample": "yes"}, "do_sample='yes': expected true or false"),
        ({"max_new_tokens": 0}, "max_new_tokens=0: expected a whole number from 1"),
        ({"max_new_tokens": -4}, "max_new_tokens=-4"),
        ({"max_new_tokens": "many"}, "max_new_tokens='many'"),
        ({"max_new_tokens": True}, "max_new_tokens=True"),
        ({"max_new_tokens": 2, "min_new_tokens": 3}, "min_new_tokens=3: expected at most max_new_tokens=2"),
        ({"max_length": 2, "min_length": 3}, "min_length=3: expected at most max_length=2"),
        ({"num_return_sequences": 2}, "num_return_sequences=2: without sampling"),
        ({"num_return_sequences": 0, "do_sample": True}, "num_return_sequences=0"),
        ({"seed": -1}, "seed=-1: expected a whole number from 0"),
        ({"seed": [1, 2**63]}, f"seed={2**63}"),
        ({"seed": "one"}, "seed='one'"),
        ({"eos_token_id": 50257}, "eos_token_id=50257: expected an id from 0 to 50,256"),
        ({"eos_token_id": [3, -1]}, "eos_token_id=-1"),
        ({"eos_token_id": "end"}, "eos_token_id='end'"),
        ({"pad_token_id": 60000}, "pad_token_id=60000"),
        ({"forced_bos_token_id": 60000}, "forced_bos_token_id=60000"),
    ],
)
def test_bad_settings_are_one_line(given: dict[str, Any], says: str) -> None:
    with pytest.raises(RequestError) as error:
        resolve(given)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_of_the_two_least_lengths_one_holds() -> None:
    stored = {"min_length": 56}
    settings = resolve({"min_new_tokens": 5}, stored)
    assert (settings.min_new_tokens, settings.min_length) == (5, 0)
    assert resolve({}, stored).min_length == 56
    assert resolve({"min_new_tokens": 0}, stored).min_length == 0
    assert resolve({"min_new_tokens": None}, stored).min_length == 56
    settings = resolve({"min_length": 9}, {"min_new_tokens": 5})
    assert (settings.min_new_tokens, settings.min_length) == (0, 9)
    settings = resolve({}, {"min_new_tokens": 5, "min_length": 56})  # as in transformers
    assert (settings.min_new_tokens, settings.min_length) == (5, 0)
    with pytest.raises(RequestError, match="min_new_tokens and min_length were both given"):
        resolve({"min_new_tokens": 5, "min_length": 9})


@pytest.mark.parametrize(
    ("given", "stored"),
    [
        ({"do_sample": False}, {"do_sample": True, "num_return_sequences": 2}),
        ({"num_beams": 1}, {"num_beams": 4, "num_return_sequences": 3}),
        ({"num_beams": 2}, {"num_beams": 4, "num_return_sequences": 3}),
    ],
)
def test_a_stored_number_of_answers_that_does_not_go_is_told_as_such(given, stored) -> None:
    with pytest.raises(RequestError, match=r"num_return_sequences=\d, which is stored with the model: .*=1 as well"):
        resolve(given, stored)
    assert resolve({**given, "num_return_sequences": 1}, stored).num_return_sequences == 1
    assert resolve({}, stored).num_return_sequences > 1
