"""Conversations: what the model reads, where an answer ends, what is forgotten, and what cannot be."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import lathe
from lathe.errors import RequestError
from lathe.generate import generate
from lathe.generate.chat import Chat, without
from lathe.generate.single import Step
from lathe.text import Tokenizer, train_tokenizer

CORPUS = ["the quick brown fox jumps over the lazy dog while seventeen rabbits watch from behind the garden wall"] * 24
HEADERS = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]


def tokenizer(**config: Any) -> Tokenizer:
    """A byte-level tokenizer with Llama 3's marks."""
    files = train_tokenizer(CORPUS, 300, convention="gpt2").files
    settings = {**json.loads(files["tokenizer_config.json"]), "extra_special_tokens": HEADERS, **config}
    # The older file would say again what the settings take back.
    files = {name: data for name, data in files.items() if name != "special_tokens_map.json"}
    return Tokenizer.from_files({**files, "tokenizer_config.json": json.dumps(settings).encode()})


def model(texts: Tokenizer, positions: int = 300) -> lathe.Model:
    sizes = {"vocab_size": texts.vocab_size, "n_layers": 1, "d_model": 16, "d_ff": 16, "n_heads": 2, "d_head": 8}
    tokens = {
        "tokens.eos": [] if texts.eos_id is None else [texts.eos_id],
        "tokens.bos": texts.bos_id,
        "max_positions": positions,
    }
    return lathe.Model(lathe.preset("gpt2").with_({**tokens, **sizes}), seed=1)


def seq2seq() -> tuple[lathe.Model, Tokenizer]:
    texts = train_tokenizer(CORPUS, 310, convention="t5", sentinels=4)
    sizes = {"vocab_size": 310, "n_layers": 1, "d_model": 16, "d_ff": 16, "n_heads": 2, "d_head": 8}
    return lathe.Model(lathe.preset("t5-small").with_(sizes), seed=1), texts


def test_an_answer_is_what_generation_gives_for_the_rendered_conversation() -> None:
    texts = tokenizer()
    made = model(texts)
    chat = Chat(made, texts, template="llama-3", system="be brief", max_new_tokens=6)
    messages = [{"role": "system", "content": "be brief"}]
    for said in ("the fox?", "the dog?"):
        messages.append({"role": "user", "content": said})
        reply = chat.ask(said)
        streamed = "".join(reply)
        ids = torch.tensor([texts.apply_chat_template(messages, chat_template="llama-3", add_generation_prompt=True)])
        end = [texts.eos_id, texts.token_id("<|eot_id|>")]
        expected = generate(made, ids, torch.ones_like(ids), max_new_tokens=6, eos_token_id=end)[0, ids.shape[1] :]
        assert reply.tokens == len(expected)
        assert streamed.strip() == reply.text == texts.decode(expected, errors="replace").strip()
        messages.append({"role": "assistant", "content": reply.text})
        assert chat.messages == messages


def only(texts: Tokenizer, *tokens: str) -> list[int]:
    """Every id but these."""
    kept = {texts.token_id(token) for token in tokens}
    return [number for number in range(texts.vocab_size) if number not in kept]


@pytest.mark.parametrize(
    ("template", "token"), [("llama-3", "<|eot_id|>"), ("llama-2", "<|endoftext|>"), ("vicuna", "<|endoftext|>")]
)
def test_an_answer_ends_with_the_token_that_the_template_writes_after_one(template: str, token: str) -> None:
    texts = tokenizer()
    chat = Chat(model(texts), texts, template=template, max_new_tokens=6, suppress_tokens=only(texts, token))
    reply = chat.ask("the fox?")
    assert "".join(reply) == reply.text == ""
    assert (reply.tokens, reply.ended) == (1, True)
    assert chat.messages[-1] == {"role": "assistant", "content": ""}
    letter = Chat(model(texts), texts, template=template, max_new_tokens=6, suppress_tokens=only(texts, "x"))
    reply = letter.ask("the fox?")
    assert "".join(reply) == "xxxxxx"
    assert not reply.ended


def test_a_template_without_an_end_token_ends_where_the_next_message_would_begin() -> None:
    texts = tokenizer(eos_token=None)
    chat = Chat(
        model(texts),
        texts,
        template="{% for m in messages %}{{ m.content }} xx {% endfor %}",
        max_new_tokens=6,
        suppress_tokens=only(texts, "x"),
    )
    reply = chat.ask("the fox?")
    assert "".join(reply) == ""
    assert (reply.tokens, reply.ended) == (2, True)
    assert Chat(model(texts), texts, template="alpaca").stops == ("\n### Instruction:",)


@pytest.mark.parametrize(
    ("said", "kept", "kept_below"),
    [
        ("the user: of it, Q > A", *["the user: of it, Q > A"] * 2),
        ("it is\nuser: and you", *["it is"] * 2),
        ("user: and you", "user: and you", ""),
        ("\n\nuser: x", *[""] * 2),
    ],
)
def test_what_opens_the_next_message_ends_an_answer_at_the_beginning_of_a_line_alone(
    said: str, kept: str, kept_below: str
) -> None:
    texts = tokenizer(eos_token=None)
    for break_, shown in ((" ", kept), ("\n", kept_below)):
        template = f"{{% for m in messages %}}{{{{ m.role }}}}:{break_}{{{{ m.content }}}}\n{{% endfor %}}"
        chat = Chat(model(texts), texts, template=template + f"assistant:{break_}", max_new_tokens=60)
        assert chat.stops == ("\nuser:",)
        steps = [Step(torch.tensor([n]), torch.zeros(1), torch.tensor([False])) for n in texts.encode(said)]
        chat._chosen = lambda ids, steps=steps: iter(steps)  # type: ignore[method-assign,misc]
        reply = chat.ask("the fox?")
        assert "".join(reply).strip() == reply.text == shown


def test_an_answer_that_begins_with_the_next_message_is_over_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The break before it is the template's, and no part of what an encoder-decoder writes."""
    made, texts = seq2seq()
    source = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    chat = Chat(made, texts, template=source.replace(": ", ":\n") + "assistant:\n", max_new_tokens=60)
    assert chat.stops == ("\nuser:",)
    asked = []

    def chosen(_: Any) -> Any:
        for number in texts.encode("user: the quick brown fox jumps over the lazy dog while", add_special_tokens=False):
            asked.append(number)
            yield Step(torch.tensor([number]), torch.zeros(1), torch.tensor([False]))

    monkeypatch.setattr(chat, "_chosen", chosen)
    reply = chat.ask("the fox?")
    assert "".join(reply) == reply.text == ""
    assert reply.ended
    assert reply.tokens == len(asked) < 12


def test_the_oldest_turns_are_forgotten_and_the_system_message_is_not() -> None:
    texts = tokenizer()
    options: dict[str, Any] = {"suppress_tokens": only(texts, "x"), "max_new_tokens": 4}
    template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    one = len(texts.encode("the dog 1 xxxx ")) + 8
    chat = Chat(model(texts, one + 20), texts, template=template, system="lazy", **options)
    forgotten = []
    for number in range(6):
        reply = chat.ask(f"the dog {number}")
        assert "".join(reply) == "xxxx"
        forgotten.append(reply.forgotten)
        said = [message["content"] for message in chat.messages if message["role"] == "user"]
        assert said == [f"the dog {each}" for each in range(number + 1 - len(said), number + 1)]
        assert chat.messages[0]["content"] == "lazy"
    assert forgotten[0] == 0
    assert sum(forgotten) == 6 - len(chat.turns) > 0
    chat.reset()
    assert chat.messages == [{"role": "system", "content": "lazy"}]
    before = list(chat.turns)
    with pytest.raises(RequestError, match=r"the message is \d+ tokens .* shorten it, or lower max_new_tokens"):
        chat.ask("the dog " * 40)
    assert chat.turns == before


def test_a_prompt_and_an_answer_may_fill_the_positions_to_the_last() -> None:
    texts = tokenizer()
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    made = model(texts, 12)
    for letters, fits in ((9, True), (10, False)):
        chat = Chat(made, texts, template=template, max_new_tokens=4, suppress_tokens=only(texts, "x"))
        message = "".join("zq"[number % 2] for number in range(letters))
        assert len(texts.encode(message)) == letters
        if fits:
            assert "".join(chat.ask(message)) == "xxxx"
        else:
            with pytest.raises(RequestError, match="9 fit beside an answer of 4 in the model's 12 positions"):
                chat.ask(message)


def test_an_answer_that_is_broken_off_stays_in_the_history_as_far_as_it_was_read() -> None:
    texts = tokenizer()
    chat = Chat(model(texts), texts, template="vicuna", suppress_tokens=only(texts, "x"), max_new_tokens=9)
    reply = chat.ask("the fox?")
    pieces = iter(reply)
    seen = next(pieces) + next(pieces)
    reply.close()
    assert reply.text == seen == "xx"
    assert [message["content"] for message in chat.messages] == ["the fox?", "xx"]
    unread = chat.ask("the dog?")
    unread.close()
    assert len(chat.turns) == 1


def test_a_seed_gives_the_same_conversation_and_each_answer_its_own_draws() -> None:
    texts = tokenizer()
    made = model(texts)

    def talk() -> list[str]:
        chat = Chat(made, texts, template="vicuna", do_sample=True, temperature=3.0, seed=5, max_new_tokens=12)
        answers = []
        for _ in range(2):
            answers.append("".join(chat.ask("the fox?")))
            chat.reset()
        return answers

    first = talk()
    assert first == talk()
    assert first[0] != first[1]


def test_an_encoder_decoder_reads_the_conversation_and_writes_the_answer() -> None:
    made, texts = seq2seq()
    chat = Chat(made, texts, template="vicuna", max_new_tokens=5)
    "".join(chat.ask("the fox?"))
    reply = chat.ask("the dog?")
    streamed = "".join(reply)
    messages = chat.messages[:3]
    text = texts.apply_chat_template(messages, chat_template="vicuna", tokenize=False, add_generation_prompt=True)
    ids = torch.tensor([texts.encode(text)])
    assert ids[0, -1] == texts.eos_id
    found = generate(made, ids, torch.ones_like(ids), max_new_tokens=5)[0, 1:]
    assert streamed.strip() == texts.decode(found, errors="replace").strip()
    assert chat.positions is None


@given(st.lists(st.text("ab#", max_size=4)), st.sampled_from([(), ("##",), ("#a", "b#b"), ("ab#",)]))
def test_a_stop_text_is_never_shown_however_it_is_cut(pieces: list[str], stops: tuple[str, ...]) -> None:
    text = "".join(pieces)
    # Up to the piece that completes the first of them: nothing is decoded after it.
    read = next(
        (kept for n in range(len(pieces)) if any(stop in (kept := "".join(pieces[: n + 1])) for stop in stops)), text
    )
    places = [read.find(stop) for stop in stops if stop in read]
    assert "".join(without(iter(pieces), stops)) == (read[: min(places)] if places else text)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "no chat template, as a base model's has none: .*alpaca, vicuna, llama-2, llama-3"),
        ({"template": "vicuna", "num_beams": 2}, "num_beams=2: a chat has one answer"),
        ({"template": "vicuna", "do_sample": True, "num_return_sequences": 2}, "num_return_sequences=2: a chat has"),
        ({"template": "vicuna", "do_sample": True, "seed": [1]}, "pass one number"),
        ({"template": "vicuna", "max_new_tokens": 0}, "max_new_tokens=0: expected a whole number from 1"),
        ({"template": "vicuna", "max_length": 9}, "pass max_new_tokens, for each answer"),
        ({"template": "vicuna", "max_new_tokens": 300}, "the model has 300 positions for the conversation"),
        ({"template": "vicuna", "do_sample": True, "temperature": 0.0}, "temperature=0.0: expected more than 0"),
        ({"template": "vicuna", "warmth": 1}, "warmth"),
        ({"template": "{{ messages[-1].content }}", "system": "x brief"}, "has no place for a system message"),
        ({"template": "{{ 'hello' }}"}, "leaves out what the user says"),
    ],
)
def test_what_cannot_be_is_refused_before_the_first_message(options: dict[str, Any], says: str) -> None:
    texts = tokenizer()
    with pytest.raises(RequestError, match=says):
        Chat(model(texts), texts, **options)


def test_an_empty_message_and_a_model_that_does_not_write_are_refused() -> None:
    texts = tokenizer()
    with pytest.raises(RequestError, match="the message is empty"):
        Chat(model(texts), texts, template="vicuna").ask("  \n")
    sizes = {"vocab_size": texts.vocab_size, "n_layers": 1, "d_model": 16, "d_ff": 16, "n_heads": 2, "d_head": 8}
    encoder = lathe.Model(lathe.preset("bert-base-uncased").with_(sizes), seed=1)
    with pytest.raises(RequestError, match="does not write text and cannot chat"):
        Chat(encoder, texts, template="vicuna")
