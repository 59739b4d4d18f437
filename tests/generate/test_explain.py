"""The explanation says what was done: its numbers are the decoding's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import lathe
from lathe.generate.explain import Explanation, lines
from lathe.generate.text import Completion, complete
from lathe.text import Tokenizer
from tests.generate.test_text import PROMPTS, small


@pytest.fixture(scope="module", params=["gpt2", "t5-small"])
def made(request: pytest.FixtureRequest) -> tuple[lathe.Model, Tokenizer]:
    return small(request.param)


def explained(
    made: tuple[lathe.Model, Tokenizer], prompts: list[str], **settings: Any
) -> tuple[list[Completion], list[dict[str, Any]]]:
    model, tokenizer = made
    explanation = Explanation(tokenizer, top=4)
    found = complete(model, tokenizer, prompts, watch=explanation, eos_token_id=None, **settings)
    return found, explanation.steps


def test_watching_changes_nothing_and_names_every_token_chosen(made: tuple[lathe.Model, Tokenizer]) -> None:
    found, steps = explained(made, PROMPTS, max_new_tokens=4)
    # What is watched runs through the modules; nothing but rounding may come of that.
    plain = complete(*made, PROMPTS, max_new_tokens=4, eos_token_id=None)
    assert [text.ids for text in found] == [text.ids for text in plain]
    for text, other in zip(found, plain, strict=True):
        assert text.log_probs == pytest.approx(other.log_probs, rel=1e-5)
    for row, text in enumerate(found):
        own = [step for step in steps if step["row"] == row]
        assert [step["chosen"] for step in own] == text.ids
        assert [step["step"] for step in own] == [1, 2, 3, 4]
        for step, log_prob in zip(own, text.log_probs):
            (chosen,) = [each for each in step["candidates"] if each["token"] == step["chosen"]]
            assert chosen["fate"] == "chosen: the likeliest left"
            assert chosen["probability"] == pytest.approx(torch.tensor(log_prob).exp().item(), rel=1e-4)
            assert step["candidates"][0] == chosen
            assert {each["fate"] for each in step["candidates"][1:]} == {"less likely"}


def test_a_token_falls_by_the_first_filter_that_rules_it_out(made: tuple[lathe.Model, Tokenizer]) -> None:
    free, _ = explained(made, PROMPTS[:1], max_new_tokens=1)
    first = free[0].ids[0]
    settings: dict[str, Any] = {"do_sample": True, "temperature": 2.0, "top_k": 2, "seed": 3}
    _, (step,) = explained(made, PROMPTS[:1], max_new_tokens=1, suppress_tokens=[first], **settings)
    assert step["left"] == 2
    assert list(step["candidates"][0]["after"]) == ["suppress_tokens", "temperature", "top_k"]
    fates = {each["token"]: each["fate"] for each in step["candidates"]}
    assert fates[first] == "ruled out by suppress_tokens"
    assert sorted(fates.values()) == sorted(
        ["ruled out by suppress_tokens", "drawn", "not drawn", *["ruled out by top_k"] * (len(fates) - 3)]
    )
    (chosen,) = [each for each in step["candidates"] if each["fate"] == "drawn"]
    assert step["drawn"]["from"] <= step["drawn"]["number"] < step["drawn"]["to"]
    assert step["drawn"]["to"] - step["drawn"]["from"] == pytest.approx(chosen["after"]["top_k"], abs=1e-6)
    shown = "\n".join(lines([step]))
    assert "suppress_tokens" in shown
    assert "ruled out by top_k" in shown


def test_the_tree_leads_to_the_texts(made: tuple[lathe.Model, Tokenizer]) -> None:
    """Each kept candidate is the beam that the next step continues, and the best one finished is the text."""
    found, steps = explained(made, PROMPTS[:2], max_new_tokens=3, num_beams=2, length_penalty=0.0)
    for row, text in enumerate(found):
        own = [step for step in steps if step["row"] == row]
        assert [step["step"] for step in own] == [1, 2, 3]
        for step in own[:-1]:
            assert sorted(each["fate"] for each in step["candidates"])[:2] == ["dropped", "dropped"]
        beams: dict[int, list[int]] = {0: []}
        scores = {0: 0.0}
        for step in own:
            texts = {n: [*beams[each["parent"]], each["token"]] for n, each in enumerate(step["candidates"])}
            for each in step["candidates"]:
                assert each["score"] == pytest.approx(scores[each["parent"]] + each["log_prob"], abs=1e-4)
            ended = {n: each for n, each in enumerate(step["candidates"]) if each["fate"] == "finished"}
            kept = {each["fate"]: n for n, each in enumerate(step["candidates"]) if each["fate"].startswith("kept")}
            beams = {number: texts[kept[f"kept as beam {number}"]] for number in range(len(kept))}
            scores = {number: step["candidates"][kept[f"kept as beam {number}"]]["score"] for number in beams}
        best = max(ended, key=lambda n: ended[n]["score"])
        assert texts[best] == text.ids
        assert ended[best]["score"] == pytest.approx(text.score, abs=1e-4)
    assert "└─" in "\n".join(lines(steps))
