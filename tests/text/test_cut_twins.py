"""Cut tokenizers in every form a family's comes in: stock transformers reads the files as Lathe does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lathe.text import Tokenizer
from lathe.text.cut import cut
from tests.text.samples import KOREAN, trained, vocabulary_files
from tests.text.test_twins import CASES, agree, case_name, sentencepiece_model, write

transformers = pytest.importorskip("transformers")


def smaller(tokenizer: Tokenizer, directory: Path) -> Tokenizer:
    """The tokenizer cut to what some text uses, and a few more, held against stock transformers in its files."""
    used = tokenizer.encode(KOREAN + "The statement is executed with a class.")
    made = cut(tokenizer, {*used, *range(0, tokenizer.vocab_size, 9)}).tokenizer
    assert made.vocab_size < tokenizer.vocab_size
    made.save(directory)
    agree(made, transformers.AutoTokenizer.from_pretrained(directory))
    agree(Tokenizer.load(directory), transformers.AutoTokenizer.from_pretrained(directory))
    return made


# Every other one: between them they have all classes and all kinds of settings.
@pytest.mark.parametrize(("recipe", "tokenizer_class", "settings"), [*CASES[::2], CASES[11]], ids=case_name)
def test_a_vocabulary_file_and_its_settings(
    recipe: tuple[str, dict[str, Any]], tokenizer_class: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    files = vocabulary_files(trained(recipe[0], **recipe[1]))
    config = json.dumps({"tokenizer_class": tokenizer_class, **settings}).encode()
    directory = write({**files, "tokenizer_config.json": config}, tmp_path / "original")
    smaller(Tokenizer.load(directory), tmp_path / "cut")


@pytest.mark.parametrize(
    ("convention", "options"),
    [("t5", {}), ("t5", {"byte_fallback": False}), ("bert", {}), ("llama", {})],
)
def test_what_transformers_saved(convention: str, options: dict[str, Any], tmp_path: Path) -> None:
    trained(convention, **options).save(tmp_path / "trained")
    transformers.AutoTokenizer.from_pretrained(tmp_path / "trained").save_pretrained(tmp_path / "resaved")
    smaller(Tokenizer.load(tmp_path / "resaved"), tmp_path / "cut")


def test_mbart_keeps_its_languages(tmp_path: Path) -> None:
    config = json.dumps({"tokenizer_class": "MBartTokenizer", "src_lang": "ko_KR"}).encode()
    files = {"sentencepiece.bpe.model": sentencepiece_model(), "tokenizer_config.json": config}
    made = smaller(Tokenizer.load(write(files, tmp_path / "mbart")), tmp_path / "cut")
    assert made.token_id("ko_KR") is not None


def test_a_model_without_a_word_on_the_class_beside_its_config(tmp_path: Path) -> None:
    directory = write(vocabulary_files(trained("bert")), tmp_path / "model")
    (directory / "config.json").write_text(json.dumps({"model_type": "bert"}), encoding="utf-8")
    smaller(Tokenizer.load(directory), tmp_path / "cut")


def test_post_processors_and_tokens_of_older_files(tmp_path: Path) -> None:
    document = json.loads(trained("bart").files["tokenizer.json"])
    ids = document["model"]["vocab"]
    document["post_processor"] = {
        "type": "RobertaProcessing",
        "sep": ["</s>", ids["</s>"]],
        "cls": ["<s>", ids["<s>"]],
        "trim_offsets": True,
        "add_prefix_space": False,
    }
    document["model"]["merges"] = [" ".join(merge) for merge in document["model"]["merges"]]
    config = {"tokenizer_class": "BartTokenizer", "mask_token": "<mask>", "pad_token": "<pad>", "sep_token": "</s>"}
    files = {"tokenizer.json": document, "tokenizer_config.json": {**config, "cls_token": "<s>", "bos_token": "<s>"}}
    directory = write({name: json.dumps(data).encode() for name, data in files.items()}, tmp_path / "bart")
    made = smaller(Tokenizer.load(directory), tmp_path / "cut")
    assert made.encode("a")[0] == made.bos_id
