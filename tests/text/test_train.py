"""Training: every convention, the same bytes twice, sizes kept, and requests that cannot be met."""

from __future__ import annotations

import doctest
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import lathe.text.train
from lathe.errors import RequestError
from lathe.text import train_tokenizer
from lathe.text.conventions import RECIPES
from tests.text.samples import CORPUS, KOREAN, SIZES, trained

SMALL = ["the cat sat on the mat and the dog barked at the cat", "안녕하세요 여러분"] * 4


@pytest.mark.parametrize("convention", RECIPES)
def test_a_vocabulary_has_exactly_the_size_asked_for(convention: str) -> None:
    tokenizer = trained(convention)
    assert tokenizer.vocab_size == len(tokenizer.vocabulary) == SIZES.get(convention, 800)
    roles = {role: getattr(tokenizer, f"{role}_id") for role in RECIPES[convention].tokens}
    assert None not in roles.values()
    assert tokenizer.pad_id is not None
    assert tokenizer.pad_id != tokenizer.eos_id
    first = [tokenizer.token_id(token) for token in RECIPES[convention].control]
    assert first == list(range(len(first)))


@pytest.mark.parametrize(
    ("convention", "options"),
    [("t5", {}), ("t5", {"model": "bpe"}), ("albert", {}), ("llama", {}), ("bert", {}), ("gpt2", {}), ("bart", {})],
)
def test_the_same_corpus_gives_the_same_bytes(convention: str, options: dict[str, Any]) -> None:
    again = train_tokenizer(iter(CORPUS), SIZES.get(convention, 800), convention=convention, **options)
    assert again.files == trained(convention, **options).files


def test_the_same_bytes_in_another_process() -> None:
    code = (
        "import hashlib; from tests.text.samples import trained;"
        "print(hashlib.sha256(trained('t5').files['tokenizer.json']).hexdigest())"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    import hashlib

    assert ran.stdout.strip() == hashlib.sha256(trained("t5").files["tokenizer.json"]).hexdigest()


def test_nothing_of_this_machine_is_in_the_files() -> None:
    for convention in RECIPES:
        for name, data in trained(convention).files.items():
            assert str(Path(sys.prefix)).encode() not in data, name
            assert str(Path.cwd()).encode() not in data, name


def test_training_writes_nothing_to_the_terminal(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "bad").write_bytes(b"to be\n" * 50 + b"\xff\n")
    for convention in ("t5", "bert", "gpt2"):
        train_tokenizer(CORPUS, SIZES.get(convention, 800), convention=convention)
        with pytest.raises(RequestError):
            train_tokenizer(CORPUS, 100_000, convention=convention)
        with pytest.raises(RequestError):
            train_tokenizer(tmp_path / "bad", 800, convention=convention)
    assert capfd.readouterr() == ("", "")


def test_files_and_texts_train_alike(tmp_path: Path) -> None:
    lines = [line + "\n" for text in CORPUS for line in text.splitlines() if line.strip()]
    (tmp_path / "one").write_text("".join(lines[:100]), encoding="utf-8")
    (tmp_path / "two").write_text("".join(lines[100:]), encoding="utf-8")
    for convention in ("t5", "gpt2"):
        size = SIZES.get(convention, 800)
        from_files = train_tokenizer([tmp_path / "one", tmp_path / "two"], size, convention=convention)
        assert from_files.files == train_tokenizer(lines, size, convention=convention).files


def test_korean_alone() -> None:
    tokenizer = train_tokenizer([KOREAN] * 3, 520, sentinels=4, model="bpe")
    text = "오늘은 날씨가 맑다"
    pieces = tokenizer.pieces(tokenizer.encode(text))
    assert tokenizer.decode(tokenizer.encode(text)) == text
    # Words of the corpus are cut into fewer pieces than characters.
    assert len(pieces) < len(text)


def test_lines_that_sentencepiece_would_drop_are_used() -> None:
    # It passes over lines with a NUL or U+2585, and over those of more than 4,192 bytes.
    lines = ["alpha\0beta ▅ gamma", "delta " * 2000]
    tokenizer = train_tokenizer([*lines, *SMALL], 35, byte_fallback=False, sentinels=0, character_coverage=1.0)
    assert tokenizer.unk_id not in tokenizer.encode("alphabetagammadelta")
    assert len(tokenizer.encode("delta", add_special_tokens=False)) <= 2


def test_a_sample_of_the_lines_is_the_same_for_a_seed() -> None:
    lines = [line for text in CORPUS for line in text.splitlines()]
    first, again, other = (
        train_tokenizer(lines, 500, convention="bert", max_lines=100, seed=seed) for seed in (1, 1, 2)
    )
    assert first.files == again.files
    assert first.vocabulary != other.vocabulary


def test_options_reach_the_tokenizer() -> None:
    assert trained("t5", sentinels=3).sentinels == (799, 798, 797)
    cased = trained("bert", lowercase=False)
    assert cased.pieces(cased.encode("The")) != trained("bert").pieces(trained("bert").encode("The"))
    folded = trained("t5", normalisation="nmt_nfkc_cf")
    assert folded.encode("THE WHILE Statement") == folded.encode("the while statement")
    kept = trained("t5", normalisation="identity")
    assert kept.decode(kept.encode("ﬁ")) == "ﬁ"
    assert trained("t5").decode(trained("t5").encode("ﬁ")) == "fi"
    everything = train_tokenizer(["a" * 999 + "ꥠ"] * 20, 8, sentinels=0, byte_fallback=False, character_coverage=1.0)
    assert everything.unk_id not in everything.encode("ꥠ")


def test_the_files_that_a_familys_own_tokenizers_have() -> None:
    for convention, recipe in RECIPES.items():
        files = trained(convention).files
        assert recipe.file in files
        config = json.loads(files["tokenizer_config.json"])
        special = json.loads(files["special_tokens_map.json"])
        for role, token in recipe.tokens.items():
            for written in (config[f"{role}_token"], special[f"{role}_token"]):
                assert written == token or written["content"] == token
        assert ("token_type_ids" in config["model_input_names"]) == (convention in ("bert", "electra", "albert"))


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"vocab_size": 5000}, r"more than this corpus can fill: the largest that fits is \d+"),
    ({"vocab_size": 5000, "model": "bpe"}, r"the largest that fits is \d+"),
    ({"vocab_size": 5000, "convention": "bert"}, r"the largest that fits is \d+"),
    ({"vocab_size": 5000, "convention": "gpt2"}, r"the largest that fits is \d+"),
    ({"vocab_size": 300}, r"too small: special tokens, sentinels, bytes, characters take \d+; .*byte_fallback=False"),
    ({"vocab_size": 20, "byte_fallback": False, "sentinels": 0}, r"too small: special tokens, characters take \d+; .*"),
    ({"vocab_size": 90}, "special tokens and sentinels alone take 103"),
    ({"vocab_size": 10, "convention": "bert"}, "too small"),
    ({"vocab_size": 200, "convention": "gpt2"}, "too small"),
    ({"vocab_size": 0}, "vocab_size=0: expected a whole number from 1"),
    ({"vocab_size": -1}, "vocab_size=-1"),
    ({"vocab_size": 10**9}, "vocab_size=1000000000"),
    ({"vocab_size": "abc"}, "vocab_size='abc'"),
    ({"vocab_size": True}, "vocab_size=True"),
    ({"convention": "t6"}, "convention='t6': expected one of t5, bert"),
    ({"model": "word"}, "model='word': expected unigram or bpe"),
    ({"model": "unigram", "convention": "bert"}, "model='unigram': expected wordpiece"),
    ({"normalisation": "nfc"}, "normalisation='nfc': expected nmt_nfkc"),
    ({"normalisation": "nfkc", "convention": "bart"}, "normalisation='nfkc' has no effect with convention='bart'"),
    ({"byte_fallback": True, "convention": "gpt2"}, "byte_fallback=True has no effect"),
    ({"byte_fallback": 1}, "byte_fallback=1: expected true or false"),
    ({"lowercase": True}, "lowercase=True has no effect with convention='t5'"),
    ({"strip_accents": "yes", "convention": "bert"}, "strip_accents='yes': expected true or false"),
    ({"sentinels": 3, "convention": "llama"}, "sentinels=3 has no effect"),
    ({"sentinels": -1}, "sentinels=-1: expected at least 0"),
    ({"character_coverage": 0.5}, "character_coverage=0.5: expected 0.98 to 1"),
    ({"character_coverage": 0.99, "convention": "gpt2"}, "character_coverage=0.99 has no effect"),
    ({"max_lines": 0}, "max_lines=0: expected at least 1"),
    ({"max_lines": 1.5}, "max_lines=1.5: expected a whole number"),
    ({"seed": 3}, "seed=3 has no effect without max_lines"),
]


@pytest.mark.parametrize(("arguments", "said"), REFUSED)
def test_requests_that_cannot_be_met_get_one_line(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said) as caught:
        train_tokenizer(SMALL, **{"vocab_size": 404, **arguments})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("convention", RECIPES)
def test_the_largest_size_that_is_named_fits(convention: str) -> None:
    with pytest.raises(RequestError) as caught:
        train_tokenizer(SMALL, 100_000, convention=convention)
    largest = int(str(caught.value).split("fits is ")[1].split(";")[0])
    assert train_tokenizer(SMALL, largest, convention=convention).vocab_size == largest
    with pytest.raises(RequestError, match=f"the largest that fits is {largest};"):
        train_tokenizer(SMALL, largest + 1, convention=convention)


@pytest.mark.parametrize("convention", ["t5", "llama", "bert", "gpt2"])
def test_the_least_size_that_is_named_fits(convention: str) -> None:
    with pytest.raises(RequestError) as caught:
        train_tokenizer(SMALL, 110 if convention == "t5" else 9, convention=convention)
    least = int(str(caught.value).split("take ")[1].split(";")[0])
    assert train_tokenizer(SMALL, least, convention=convention).vocab_size == least


@pytest.mark.parametrize("convention", ["t5", "bert"])
def test_text_of_which_normalisation_leaves_nothing(convention: str) -> None:
    with pytest.raises(RequestError, match="the corpus is empty: normalisation leaves none"):
        train_tokenizer(["\x01\x02"], 400, convention=convention)


def test_an_error_of_the_callers_own_comes_through() -> None:
    def texts() -> Any:
        yield "fine"
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        train_tokenizer(texts(), 400)


def test_the_example_in_the_documentation() -> None:
    assert doctest.testmod(lathe.text.train).failed == 0
