"""Records to token ids: fields, breaks, labels, tasks; and what is read off a tokenizer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lathe.data import Task, pairs, special_tokens, tokenise, tokenise_records
from lathe.data.segments import segment_spans
from lathe.data.words import continuing, frame
from lathe.errors import RequestError
from lathe.presets import preset
from lathe.text.tokenizer import Tokenizer
from lathe.text.train import train_tokenizer

TEXTS = ["the quick brown fox jumps over the lazy dog", "running trains, training runs; jumping and jumped!"] * 20


def test_every_field_is_tokenised_and_a_label_is_a_number(wordpiece: Tokenizer):
    records = [{"text": "the fox", "pair": "a dog", "label": "1"}, {"text": "jumps", "pair": "", "label": "0"}]
    corpus = tokenise_records(wordpiece, records)
    assert corpus.names == ("text", "pair", "label")
    for name in ("text", "pair"):
        for i, record in enumerate(records):
            assert corpus.fields[name].row(i).tolist() == wordpiece.encode(record[name], add_special_tokens=False)
    assert corpus.labels is not None
    assert corpus.labels.tolist() == [1, 0]
    named = tokenise_records(wordpiece, [{"text": "a", "label": "bad"}] * 3, labels=["good", "bad"])
    assert named.labels is not None
    assert named.labels.tolist() == [1, 1, 1]


def segments(text: str, kind: str) -> list[str]:
    return [text[start:stop].strip() for start, stop in segment_spans(text, kind)]


def test_breaks_are_where_sentences_end(wordpiece: Tokenizer):
    text = "The fox jumps. The lazy dog runs!\nOver"
    corpus = tokenise(wordpiece, [text, "", "fox"], breaks="sentence")
    counts = [len(wordpiece.encode(s, add_special_tokens=False)) for s in segments(text, "sentence")]
    assert len(counts) == 3
    assert corpus.breaks is not None
    assert [corpus.breaks.row(i).tolist() for i in range(3)] == [np.cumsum(counts).tolist(), [], [1]]
    assert corpus.fields["text"].row(0).tolist() == wordpiece.encode(text, add_special_tokens=False)


SENTENCES = "First one here. Second one there!\nThird at last? 첫째 문장이다. 둘째 문장."


SIZES = {"bart": 290, "gpt2": 290, "llama": 320, "t5": 405, "albert": 306, "bert": 59}


@pytest.mark.parametrize("convention", SIZES)
def test_breaks_take_nothing_from_the_text(convention: str):
    tokenizer = train_tokenizer([SENTENCES] * 9, SIZES[convention], convention=convention)
    corpus = tokenise(tokenizer, [SENTENCES], breaks="sentence")
    ids = corpus.fields["text"].row(0)
    assert ids.tolist() == tokenizer.encode(SENTENCES, add_special_tokens=False)
    assert corpus.breaks is not None
    ends = corpus.breaks.row(0).tolist()
    parts = [tokenizer.decode(ids[start:stop].tolist()).strip() for start, stop in zip([0, *ends], ends)]
    same = SENTENCES.lower() if convention in ("bert", "albert") else SENTENCES
    plain = [part.replace(" ", "") for part in parts]
    assert plain == [part.replace(" ", "") for part in segments(same, "sentence")]


def test_white_space_has_no_sentence(wordpiece: Tokenizer):
    corpus = tokenise(train_tokenizer([SENTENCES], 270, convention="gpt2"), [" \n ", "a"], breaks="sentence")
    assert corpus.fields["text"].row(0).tolist() == []


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [
        ("line", ["One. Two!", "“Three?” Four", "재밌다… 정말"]),
        ("paragraph", ["One. Two!\n“Three?” Four", "재밌다… 정말"]),
        ("sentence", ["One.", "Two!", "“Three?”", "Four", "재밌다…", "정말"]),
    ],
)
def test_segments(kind: str, wanted: list[str]):
    assert segments("One. Two!\n“Three?” Four\n \n재밌다… 정말\n", kind) == wanted


def test_tasks_make_pairs_of_one_record():
    records = [{"en": "Hello", "ko": "안녕"}]
    made = list(pairs(records, Task("to Korean: ", "en", "ko"), Task("to English: ", "ko", "en")))
    assert made == [
        {"source": "to Korean: Hello", "target": "안녕"},
        {"source": "to English: 안녕", "target": "Hello"},
    ]
    with pytest.raises(RequestError, match="record 1: there is no field 'fr'; it has en, ko"):
        list(pairs(records, Task("", "en", "fr")))
    with pytest.raises(RequestError, match="need a task"):
        list(pairs(records))


@pytest.mark.parametrize(
    ("records", "settings", "words"),
    [
        ([], {}, "holds no document"),
        (
            [{"text": "a"}, {"text": "a", "label": "0"}],
            {},
            "record 2 has the fields text, label and the first one text",
        ),
        (
            [{"text": "a", "label": "0"}, {"text": "a", "label": "good"}],
            {},
            "record 2: label 'good' is no class number",
        ),
        ([{"text": "a", "label": "2"}], {"labels": ["0", "1"]}, "record 1: label '2'; expected one of 0, 1"),
        ([{"source": "a", "target": "b"}], {"breaks": "line"}, "breaks='line' is for the field 'text'"),
        ([{"text": "a"}], {"breaks": "lines"}, "unknown kind of segment 'lines'.*did you mean 'line'"),
    ],
)
def test_records_that_cannot_be_used_get_one_line(
    wordpiece: Tokenizer, records: list[dict[str, str]], settings: dict[str, Any], words: str
):
    with pytest.raises(RequestError, match=words):
        tokenise_records(wordpiece, records, **settings)


def test_pieces_that_go_on_with_a_word(wordpiece: Tokenizer):
    for tokenizer in (wordpiece, train_tokenizer(TEXTS, 300, convention="gpt2")):
        special, text = set(continuing(tokenizer)), "the running, jumped"
        ids = tokenizer.encode(text, add_special_tokens=False)
        words: list[str] = []
        for number in ids:
            piece = tokenizer.decode([number]).strip()
            if words and number in special:
                words[-1] += piece.removeprefix("##")
            else:
                words.append(piece)
        # Without a space before it, byte-level BPE cannot tell the first word from the end of one.
        assert words == ["the", "running", ",", "jumped"] or words[1:] == ["running", ",", "jumped"]
        assert special, "nothing goes on with a word: the test shows nothing"


@pytest.mark.parametrize("convention", ["t5", "bert", "albert", "gpt2", "llama", "bart"])
def test_marks_put_around_texts_are_the_tokenizers_own(convention: str):
    sizes = {"t5": 412, "bert": 75, "albert": 312, "gpt2": 300, "llama": 320, "bart": 300}
    tokenizer = train_tokenizer(TEXTS, sizes[convention], convention=convention)
    found = frame(tokenizer)
    assert found is not None
    front, middle, back = (list(marks) for marks in found)
    first, second = (tokenizer.encode(text, add_special_tokens=False) for text in ("the fox", "a dog"))
    assert front + first + back == tokenizer.encode("the fox")
    assert front + first + middle + second + back == tokenizer.encode("the fox", "a dog")


def test_special_tokens_say_what_the_tokenizer_and_the_model_have(wordpiece: Tokenizer):
    bert = special_tokens(wordpiece, preset("bert-base-uncased"))
    assert (bert.front, bert.middle, bert.back) == ((bert.cls,), (bert.sep,), (bert.sep,))
    assert bert.token_types
    assert not special_tokens(wordpiece, preset("bert-base-uncased").with_(token_types=1)).token_types
