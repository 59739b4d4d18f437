"""Stop strings: wherever they begin and end, and in the texts that `transformers` stops with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from lathe.generate.stops import StopStrings
from tests.generate.test_text import CORPUS, PROMPTS, small


def test_a_text_counts_where_the_last_token_completes_it() -> None:
    """Begun in the middle of a token, ended before the last one does, over several tokens, and not twice."""
    _, tokenizer = small("gpt2")
    text = CORPUS[0][:40]
    ids = tokenizer.encode(text)
    for first in range(len(text) - 3):
        stop = StopStrings(tokenizer, ["never", text[first : first + 4]])
        ended = [n for n in range(1, len(ids) + 1) if stop.completed(ids[:n]) is not None]
        whole = [tokenizer.decode(ids[:n]) for n in range(len(ids) + 1)]
        expected = [
            n for n in range(1, len(ids) + 1) if whole[n].count(stop.strings[1]) > whole[n - 1].count(stop.strings[1])
        ]
        assert ended == expected
        assert expected


def test_half_a_character_hides_no_text_and_is_none() -> None:
    _, tokenizer = small("gpt2")
    ids = tokenizer.encode("the quick — fox")
    stop = StopStrings(tokenizer, ["—"])
    assert [stop.completed(ids[:n]) for n in range(1, len(ids) + 1)].count("—") == 1


@pytest.mark.parametrize("stop", ["한", "글", "글한", "한글한", "글 한", "be 한", "o 한글"])
def test_characters_that_are_spelled_byte_by_byte_are_found_at_their_last_byte(stop: str) -> None:
    """However long the row of bytes that they stand in, and not once more while the next one is half written."""
    _, tokenizer = small("llama-3.1-8b")
    text = "to 한글한글한글한글 한 be 한글 글"
    ids = tokenizer.encode(text)
    assert sum(piece.startswith("<0x") for piece in tokenizer.pieces(ids)) > 30
    found = [n for n in range(1, len(ids) + 1) if StopStrings(tokenizer, [stop]).completed(ids[:n]) is not None]
    ends = [end for end in range(1, len(text) + 1) if text[:end].endswith(stop)]
    assert found == [len(tokenizer.encode(text[:end])) for end in ends]
    rows = torch.tensor([ids[:n] for n in (found[-1],)])
    assert StopStrings(tokenizer, [stop]).ends(rows, torch.tensor([0])).tolist() == [True]
    assert StopStrings(tokenizer, [stop]).ends(rows[:, :-1], torch.tensor([0])).tolist() == [False]


def test_pads_and_rows_are_told_apart() -> None:
    _, tokenizer = small("gpt2")
    one, two = tokenizer.encode("to be"), tokenizer.encode("the quick brown")
    width = max(len(one), len(two))
    ids = torch.tensor([[0] * (width - len(each)) + each for each in (one, two)])
    pads = torch.tensor([width - len(one), width - len(two)])
    assert StopStrings(tokenizer, ["be", "nothing"]).ends(ids, pads).tolist() == [True, False]
    assert StopStrings(tokenizer, ["rown"]).ends(ids, pads).tolist() == [False, True]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("beams", [{}, {"num_beams": 3}], ids=str)
def test_texts_end_where_those_of_transformers_do(tmp_path: Path, beams: dict[str, Any]) -> None:
    model, tokenizer = small("gpt2")
    model.tokenizer = tokenizer
    with torch.no_grad():
        for parameter in model.parameters():  # sharp enough that the text does not repeat one token
            parameter.add_(
                0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
            )
    tokenizer.save(tmp_path)
    stock = transformers.AutoTokenizer.from_pretrained(tmp_path)
    theirs = model.to_transformers()
    settings: dict[str, Any] = {"max_new_tokens": 12, "eos_token_id": None, "pad_token_id": 0, **beams}
    stopped = 0
    for prompt in PROMPTS:
        ids = torch.tensor([tokenizer.encode(prompt)])
        free = tokenizer.decode(model.generate(ids, **settings)[0, ids.shape[1] :], errors="replace")
        for at in range(0, len(free) - 2, 3):
            if "\ufffd" in free[at : at + 2]:
                continue
            given = {**settings, "stop_strings": [free[at : at + 2]]}
            ours = model.generate(ids, **given)
            expected = theirs.generate(ids, tokenizer=stock, **given)
            assert torch.equal(ours, expected)
            stopped += ours.shape[1] < ids.shape[1] + 12
    assert stopped > 3
