"""`lathe generate`: what it prints, what it passes on, and its one line where it cannot."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import lathe
from lathe.adapt import LoraSettings, add_lora, save_adapter
from lathe.generate.text import complete
from lathe.text import train_tokenizer

CORPUS = [
    "the quick brown fox jumps over the lazy dog while seventeen rabbits watch from behind the garden wall",
    "to be or not to be that is the question whether tis nobler in the mind to suffer slings and arrows",
] * 12


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny GPT-2 with a tokenizer, saved."""
    tokenizer = train_tokenizer(CORPUS, 300, convention="gpt2")
    sizes = {"vocab_size": 300, "n_layers": 1, "d_model": 16, "d_ff": 16, "n_heads": 2, "d_head": 8}
    tokens = {"tokens.eos": [tokenizer.eos_id], "tokens.bos": tokenizer.bos_id, "max_positions": 64}
    model = lathe.Model(lathe.preset("gpt2").with_({**tokens, **sizes}), seed=1, tokenizer=tokenizer)
    path = tmp_path_factory.mktemp("models") / "gpt2"
    model.save(path)
    return path


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny T5 with a tokenizer, saved, whose stored settings ask for beams."""
    tokenizer = train_tokenizer(CORPUS, 320, convention="t5", sentinels=4)
    sizes = {"vocab_size": 320, "n_layers": 1, "d_model": 16, "d_ff": 16, "n_heads": 2, "d_head": 8}
    stored = {"num_beams": 4, "max_new_tokens": 5, "guidance_scale": 2.0}
    model = lathe.Model(lathe.preset("t5-small").with_(sizes), seed=1, tokenizer=tokenizer, generation=stored)
    path = tmp_path_factory.mktemp("models") / "t5"
    model.save(path)
    return path


def test_it_prints_the_prompt_and_what_follows(cli, gpt2: Path) -> None:
    ran = cli("generate", gpt2, "--prompt", "the quick", "--max-new-tokens", "4")
    assert ran.code == 0
    assert ran.out.startswith("the quick")
    assert "4 tokens in" in ran.err
    assert ran.out == cli("generate", gpt2, "--prompt", "the quick", "--max-new-tokens", "4").out


def test_json_holds_every_text_and_nothing_else_is_printed(cli, gpt2: Path) -> None:
    ran = cli("generate", gpt2, "--prompt", "to be", "--prompt", "fox", "--max-new-tokens", "3", "--json")
    answer = json.loads(ran.out)
    assert [each["prompt"] for each in answer["texts"]] == ["to be", "fox"]
    assert not answer["sampled"]
    assert {"text", "ids", "ended", "tokens"} <= answer["texts"][0].keys()
    printed = cli("generate", gpt2, "--prompt", "to be", "--max-new-tokens", "3").out
    assert printed == "to be" + answer["texts"][0]["text"] + "\n"


def test_a_temperature_samples_and_the_seed_it_reports_gives_the_same_text(cli, gpt2: Path) -> None:
    words = ("generate", gpt2, "--prompt", "to be", "--temperature", "2.0", "--num-return-sequences", "2", "--json")
    first = json.loads(cli(*words).out)
    assert first["sampled"]
    again = json.loads(cli(*words, "--seed", str(first["seed"])).out)
    assert again == first
    assert first["texts"][0]["ids"] != first["texts"][1]["ids"]


def test_prompts_come_from_a_file_too(cli, gpt2: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("to be\nfox\n", encoding="utf-8")
    answer = json.loads(cli("generate", gpt2, "--file", tmp_path / "prompts.txt", "--json").out)
    assert [each["prompt"] for each in answer["texts"]] == ["to be", "fox"]


def test_any_setting_is_a_word_and_the_best_beams_come_with_their_scores(cli, gpt2: Path) -> None:
    words = ("generate", gpt2, "num_beams=3", "num_return_sequences=2", "--prompt", "to be", "max_new_tokens=4")
    answer = json.loads(cli(*words, "--json").out)
    best, second = answer["texts"]
    assert best["score"] > second["score"]
    assert len(best["log_probs"]) == best["tokens"]
    ran = cli(*words)
    assert ran.out.startswith("to be\n  1  ")
    assert f"{best['score']:.3f}" in ran.out.splitlines()[1]
    banned = [[each] for each in best["ids"]]
    more = (f"bad_words_ids={json.dumps(banned)}", "--json")
    assert not set(json.loads(cli(*words, *more).out)["texts"][0]["ids"]) & set(best["ids"])


@pytest.mark.parametrize(
    ("words", "sampled"),
    [
        ([], False),
        (["top_k=5"], True),
        (["top_k=none"], True),
        (["--greedy", "top_k=none"], False),
        (["--sample"], True),
    ],
)
def test_a_setting_of_sampling_samples_whatever_its_value(cli, gpt2: Path, words: list[str], sampled: bool) -> None:
    answer = json.loads(cli("generate", gpt2, "--prompt", "to be", "--max-new-tokens", "2", *words, "--json").out)
    assert answer["sampled"] is sampled


def test_a_stop_string_ends_the_text_and_a_stream_prints_the_same(cli, gpt2: Path) -> None:
    words = ("generate", gpt2, "--prompt", "to be", "eos_token_id=none", "max_new_tokens=8")
    whole = cli(*words).out
    stop = json.dumps([whole[len("to be") :].strip()[1:3]])
    stopped = cli(*words, f"stop_strings={stop}")
    assert stopped.code == 0
    assert whole.startswith(stopped.out.rstrip("\n"))
    assert len(stopped.out) < len(whole)
    assert cli(*words, "--stream").out == whole


def test_every_step_is_explained_as_tables_and_as_data(cli, gpt2: Path) -> None:
    words = ("generate", gpt2, "--prompt", "to be", "max_new_tokens=2", "--explain")
    ran = cli(*words, "no_repeat_ngram_size=1")
    assert ran.out.startswith("row 0, token 1: ")
    assert "ruled out by no_repeat_ngram_size" in ran.out
    assert ran.out.splitlines()[-1].startswith("to be")
    steps = json.loads(cli(*words, "num_beams=2", "--json").out)["steps"]
    assert [step["step"] for step in steps] == [1, 2]
    assert {"parent", "piece", "log_prob", "score", "fate"} <= steps[0]["candidates"][0].keys()


def stdin(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content), encoding="utf-8"))


def test_prompts_come_from_stdin_and_have_to_be_text(cli, gpt2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stdin(monkeypatch, b"\xef\xbb\xbfto be\n\nfox\n")
    answer = json.loads(cli("generate", gpt2, "--file", "-", "--json").out)
    assert [each["prompt"] for each in answer["texts"]] == ["to be", "fox"]
    stdin(monkeypatch, b"to be\nfo\xff\n")
    ran = cli("generate", gpt2, "--file", "-")
    assert ran.code == 2
    assert ran.err == "lathe: stdin is not UTF-8: line 2, byte 3 of the line is 0xff; convert it with iconv -t UTF-8\n"
    ran = cli("generate", gpt2, "--prompt", "fo\udcff")
    assert ran.code == 2
    assert "is not UTF-8" in ran.err


@pytest.mark.parametrize(
    ("name", "row"),
    # The last of the positions is not read at all, and would change nothing.
    [("decoder.attention.0.q.weight", 0), ("decoder.input.positions.weight", 63)],
)
def test_a_weight_that_is_no_number_is_named(cli, gpt2: Path, tmp_path: Path, name: str, row: int) -> None:
    model = lathe.load(gpt2)
    with torch.no_grad():
        model.get_parameter(name)[row, 0] = torch.nan
    model.save(tmp_path / "damaged")
    ran = cli("generate", tmp_path / "damaged", "--prompt", "to be")
    assert ran.code == 2
    assert ran.out == ""
    assert ran.err.count("\n") == 1
    assert f"the weight {name} holds 1 values" in ran.err


def test_the_prompts_of_a_file_take_turns_and_give_what_they_give_alone(cli, gpt2: Path, tmp_path: Path) -> None:
    lines = ["to be", "the quick brown fox", "or", "slings and arrows"]
    (tmp_path / "prompts.txt").write_text("\n".join(lines) + "\n")
    how = ("--max-new-tokens", "5", "--json")
    for slots in ([], ["--slots", "1"], ["--slots", "3"]):
        found = json.loads(cli("generate", gpt2, "--file", tmp_path / "prompts.txt", *slots, *how).out)["texts"]
        assert [each["prompt"] for each in found] == lines
        for line, each in zip(lines, found):
            (alone,) = json.loads(cli("generate", gpt2, "--prompt", line, *how).out)["texts"]
            assert (each["text"], each["ids"]) == (alone["text"], alone["ids"])


def test_turns_are_refused_where_there_are_none(cli, gpt2: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("to be\n")
    file = ("--file", tmp_path / "prompts.txt")
    for words, message in (
        (["--prompt", "to be", "--slots", "2"], "--slots 2: the prompts of --file"),
        ([*file, "--slots", "2", "--explain"], "--slots 2: the prompts of --file"),
        ([*file, "--slots", "0"], "slots=0: expected at least 1"),
        ([*file, "--slots", "-1"], "slots=-1: expected at least 1"),
    ):
        ran = cli("generate", gpt2, *words)
        assert (ran.code, ran.out) == (2, "")
        assert message in ran.err


@pytest.fixture(scope="module")
def draft(gpt2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A narrower model of the same tokenizer."""
    parent = lathe.load(gpt2)
    sizes = {"d_model": 8, "d_ff": 8, "n_heads": 1}
    path = tmp_path_factory.mktemp("models") / "draft"
    lathe.Model(parent.architecture.with_(sizes), seed=2, tokenizer=parent.tokenizer).save(path)
    return path


def test_with_a_draft_the_text_is_the_models_and_what_it_was_good_for_is_said(cli, gpt2: Path, draft: Path) -> None:
    words = ("generate", gpt2, "--prompt", "to be", "--prompt", "the quick brown", "--max-new-tokens", "9")
    plain, drafted = cli(*words), cli(*words, "--draft", draft, "--num-draft-tokens", "3")
    assert (drafted.code, drafted.out) == (0, plain.out)
    assert "drafted tokens accepted (" in drafted.err
    assert "times as fast a token as without the draft" in drafted.err
    answer = json.loads(cli(*words, "--draft", gpt2, "--json").out)
    assert answer["draft"].keys() == {"model", "proposed", "accepted", "passes", "speed_up"}
    assert answer["draft"]["proposed"] == answer["draft"]["accepted"] > 0
    assert answer["draft"]["speed_up"] > 0
    assert [each["ids"] for each in answer["texts"]] == [
        each["ids"] for each in json.loads(cli(*words, "--json").out)["texts"]
    ]


def test_drafts_that_cannot_be_are_one_line(cli, gpt2: Path, draft: Path, t5: Path, tmp_path: Path) -> None:
    tokenizer = train_tokenizer([line.upper() for line in CORPUS], 300, convention="gpt2")
    sizes = {"vocab_size": 300, "n_layers": 1, "d_model": 8, "d_ff": 8, "n_heads": 1, "d_head": 8}
    tokens = {"tokens.eos": [tokenizer.eos_id], "tokens.bos": tokenizer.bos_id}
    lathe.Model(lathe.preset("gpt2").with_({**sizes, **tokens}), tokenizer=tokenizer).save(tmp_path / "other")
    for words, message in (
        (["--draft", t5], "the draft has a vocabulary of 320 tokens and the model one of 300"),
        (["--draft", tmp_path / "other"], "the draft's tokenizer has other tokens than the model's"),
        (["--num-draft-tokens", "3"], "--num-draft-tokens 3: there is no draft"),
        (["--draft", draft, "--num-draft-tokens", "0"], "num_draft_tokens=0: expected a whole number"),
        (["--draft", draft, "--stream"], "--draft writes all prompts in one batch"),
        (["--draft", draft, "--explain"], "--draft writes all prompts in one batch"),
        (["--draft", draft, "num_beams=2"], "num_beams=2 with a draft"),
        (["--draft", tmp_path / "none"], "none"),
    ):
        ran = cli("generate", gpt2, "--prompt", "to be", *words)
        assert (ran.code, ran.out) == (2, "")
        assert ran.err.count("\n") == 1
        assert message in ran.err


def test_a_batch_that_no_memory_holds_is_refused_with_the_bytes_it_needs(cli, t5: Path) -> None:
    ran = cli("generate", t5, "--prompt", "to be", "num_beams=1000", "max_new_tokens=1000000000")
    assert ran.code == 2
    assert ran.out == ""
    assert "1,000 rows of 1,000,000,000 tokens does not fit into memory: it needs 116 TiB" in ran.err


@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_an_empty_prompt_is_refused_whatever_the_tokenizer_sets_around_it(
    cli, name: str, request: pytest.FixtureRequest
) -> None:
    for words in (["generate", "--prompt"], ["look", "--text"]):
        ran = cli(words[0], request.getfixturevalue(name), words[1], "")
        assert (ran.code, ran.out) == (2, "")
        assert "holds no token; expected some text" in ran.err.splitlines()[-1]


def test_an_encoder_decoder_prints_what_it_makes_of_the_prompt(cli, t5: Path) -> None:
    """With the beams that its stored settings ask for, and says what of them is left out."""
    one = cli("generate", t5, "--prompt", "to be", "--special-tokens")
    assert one.code == 0
    assert "asks for guidance_scale=2.0, which Lathe does not do" in one.err
    assert one.out == cli("generate", t5, "num_beams=4", "--prompt", "to be", "--special-tokens").out
    assert "to be\n→" not in one.out
    two = cli("generate", t5, "--prompt", "to be", "--prompt", "fox")
    assert "to be\n→" in two.out
    assert "fox\n→" in two.out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "there is nothing to start from"),
        (["--prompt", ""], "prompt 1 is '' and holds no token"),
        (["--prompt", "a", "--max-new-tokens", "0"], "max_new_tokens=0"),
        (["--prompt", "a", "--max-new-tokens", "many"], "many"),
        (["--prompt", "a", "--temperature", "0"], "temperature=0.0: expected more than 0"),
        (["--prompt", "a", "--temperature", "nan"], "temperature=nan"),
        (["--prompt", "a", "--top-k", "0"], "top_k=0"),
        (["--prompt", "a", "top_k=0"], "top_k=0"),
        (["--prompt", "a", "temperature=0"], "temperature=0.0: expected more than 0"),
        (["--prompt", "a", "top_p=0"], "top_p=0.0"),
        (["--prompt", "a", "top_p=0.5", "--top-p", "0.5"], "top_p is set twice"),
        (["--prompt", "a", "num_beam=2"], "unknown setting 'num_beam'"),
        (["--prompt", "a", "num_beams=2", "num_return_sequences=3"], "expected at most num_beams=2"),
        (["--prompt", "a", "length_penalty=2"], "there are no beams"),
        (["--prompt", "a", "stop_strings=5"], "stop_strings=5: expected a list, each of it a word"),
        (["--prompt", "a", "bad_words_ids=[[1,300]]"], "bad_words_ids=300: expected an id from 0 to 299"),
        (["--prompt", "a", "--stream", "--json"], "--stream prints one prompt's text"),
        (["--prompt", "to be " * 90], "64 positions"),
        (["--prompt", "a", "--top-p", "1.5"], "top_p=1.5"),
        (["--prompt", "a", "--greedy", "--top-p", "0.5"], "top_p=0.5: nothing is sampled"),
        (["--prompt", "a", "--num-return-sequences", "2"], "num_return_sequences=2: without sampling"),
        (["--prompt", "a", "--seed", "-1"], "seed=-1"),
        (["--prompt", "a", "--max-new-tokens", "90"], "64 positions"),
        (["--prompt", "a", "--device", "abacus"], "--device abacus: there is no such device"),
        (["--file", "no-such-file"], "no-such-file"),
    ],
)
def test_bad_requests_are_one_line_and_exit_2(cli, gpt2: Path, words: list[str], says: str) -> None:
    ran = cli("generate", gpt2, *words)
    assert ran.code == 2
    assert ran.out == ""
    assert ran.err.count("\n") == 1
    assert says in ran.err


def test_a_file_that_is_not_utf_8_is_one_line(cli, gpt2: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_bytes(b"to be\n\xff\xfe\n")
    ran = cli("generate", gpt2, "--file", tmp_path / "prompts.txt")
    assert ran.code == 2
    assert "UTF-8" in ran.err


def test_a_model_without_a_tokenizer_says_so(cli, tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"vocab_size": 300, "n_layers": 1, "d_model": 16, "d_ff": 16, "n_heads": 2, "d_head": 8}
    lathe.Model(lathe.preset("gpt2").with_({"tokens.eos": [], "tokens.bos": None, **sizes})).save(tmp_path / "bare")
    ran = cli("generate", tmp_path / "bare", "--prompt", "a")
    assert ran.code == 2
    assert "has no tokenizer" in ran.err


def test_an_adapter_that_gives_shared_layers_their_own_part_writes(cli, gpt2: Path, tmp_path: Path) -> None:
    of_one_layer = lathe.load(gpt2)
    architecture = of_one_layer.architecture.with_(n_layers=2, sharing="all")
    lathe.Model(architecture, seed=1, tokenizer=of_one_layer.tokenizer).save(tmp_path / "base")
    apart = lathe.Model(architecture.with_(sharing="none"), seed=1)
    add_lora(apart, LoraSettings(rank=2), seed=1)
    with torch.no_grad():
        for name, parameter in apart.named_parameters():
            if name.endswith(".up"):
                parameter.normal_()
    save_adapter(apart, tmp_path / "adapter", base_model=str(tmp_path / "base"))
    words = ("--prompt", "to be", "--max-new-tokens", "4", "--json")
    ran = cli("generate", tmp_path / "adapter", *words)
    assert ran.code == 0, ran.err
    beside = cli("generate", tmp_path / "base", "--adapter", tmp_path / "adapter", *words)
    texts = [json.loads(each.out)["texts"] for each in (ran, beside)]
    assert texts[0] == texts[1]
    adapted = lathe.load(tmp_path / "adapter")
    assert adapted.tokenizer is not None
    assert texts[0][0]["ids"] == complete(adapted, adapted.tokenizer, ["to be"], max_new_tokens=4)[0].ids


def test_a_list_that_is_set_twice_is_refused(cli, gpt2: Path) -> None:
    for second in ("bad_words_ids=[[7]]", "bad_words_ids=[none]"):
        ran = cli("generate", gpt2, "--prompt", "to be", "bad_words_ids=[[5]]", second)
        assert (ran.code, ran.out) == (2, "")
        assert "bad_words_ids is set twice" in ran.err
