"""Ids, roles and decoded text held against stock transformers, for every form a family's tokenizer comes in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import pytest

from lathe.text import Tokenizer
from tests.text.samples import CORPUS, SENTENCES, trained, vocabulary_files

transformers = pytest.importorskip("transformers")

TOKEN = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "__type": "AddedToken"}
T5 = ("t5", {"byte_fallback": False})
ALBERT = ("albert", {"byte_fallback": False})
SENTINELS = [f"<extra_id_{number}>" for number in range(10)]

# A recipe to train with, the class that the settings name, and what else they say.
CASES: list[tuple[tuple[str, dict[str, Any]], str, dict[str, Any]]] = [
    (T5, "T5Tokenizer", {}),
    (T5, "T5Tokenizer", {"extra_ids": 0}),
    (T5, "T5TokenizerFast", {"extra_ids": 10, "additional_special_tokens": SENTINELS}),
    (T5, "T5Tokenizer", {"extra_ids": 0, "extra_special_tokens": ["<new>"]}),
    (ALBERT, "AlbertTokenizer", {}),
    (ALBERT, "AlbertTokenizer", {"do_lower_case": False, "keep_accents": True}),
    (ALBERT, "AlbertTokenizer", {"mask_token": {"content": "[MASK]", **TOKEN, "lstrip": True}}),
    (("bert", {}), "BertTokenizer", {}),
    (("bert", {}), "BertTokenizerFast", {"do_lower_case": False}),
    (("bert", {}), "BertTokenizer", {"strip_accents": False, "tokenize_chinese_chars": False}),
    (("bert", {}), "BertTokenizer", {"clean_up_tokenization_spaces": True}),
    (("electra", {}), "ElectraTokenizer", {"do_lower_case": False}),
    (("gpt2", {}), "GPT2Tokenizer", {}),
    (("gpt2", {}), "GPT2Tokenizer", {"add_prefix_space": True}),
    (("gpt2", {}), "GPT2Tokenizer", {"add_bos_token": True, "pad_token": "[PAD]"}),
    (("gpt2", {}), "GPT2Tokenizer", {"unk_token": {"content": "<|endoftext|>", **TOKEN}}),
    (("gpt2", {}), "Qwen2Tokenizer", {"eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]}),
    (("bart", {}), "BartTokenizer", {}),
    (("bart", {}), "RobertaTokenizer", {"mask_token": {"content": "<mask>", **TOKEN, "lstrip": True}}),
    (("llama", {}), "LlamaTokenizer", {}),
    (("llama", {}), "LlamaTokenizer", {"add_bos_token": True, "add_eos_token": True, "legacy": True}),
    (("llama", {}), "LlamaTokenizer", {"add_prefix_space": False, "pad_token": "<pad>"}),
    (
        ("llama", {}),
        "LlamaTokenizer",
        {
            "added_tokens_decoder": {"800": {"content": "<|im_start|>", "normalized": False, "special": True}},
            "additional_special_tokens": ["<|im_start|>"],
            "bos_token": {"content": "<s>", **TOKEN},
        },
    ),
]


def case_name(value: Any) -> str | None:
    return json.dumps(value)[:60] if isinstance(value, dict) else value[0] if isinstance(value, tuple) else None


@pytest.mark.parametrize(("recipe", "tokenizer_class", "settings"), CASES, ids=case_name)
def test_a_vocabulary_file_and_its_settings(
    recipe: tuple[str, dict[str, Any]], tokenizer_class: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    files = vocabulary_files(trained(recipe[0], **recipe[1]))
    config = json.dumps({"tokenizer_class": tokenizer_class, **settings}).encode()
    directory = write({**files, "tokenizer_config.json": config}, tmp_path / "original")
    stock = transformers.AutoTokenizer.from_pretrained(directory)
    agree(Tokenizer.load(directory), stock)
    # The tokenizer.json that transformers makes of it, and what Lathe saves.
    stock.save_pretrained(tmp_path / "resaved")
    agree(Tokenizer.load(tmp_path / "resaved"), transformers.AutoTokenizer.from_pretrained(tmp_path / "resaved"))
    Tokenizer.load(directory).save(tmp_path / "saved")
    agree(Tokenizer.load(directory), transformers.AutoTokenizer.from_pretrained(tmp_path / "saved"))


@pytest.mark.parametrize("model_type", ["t5", "mt5", "albert", "bert", "electra", "gpt2", "bart"])
def test_a_vocabulary_file_beside_the_models_config(model_type: str, tmp_path: Path) -> None:
    convention = "t5" if model_type == "mt5" else model_type
    options = {"byte_fallback": False} if convention in ("t5", "albert") else {}
    directory = write(vocabulary_files(trained(convention, **options)), tmp_path / "model")
    (directory / "config.json").write_text(json.dumps({"model_type": model_type}), encoding="utf-8")
    tokenizer = Tokenizer.load(directory)
    agree(tokenizer, transformers.AutoTokenizer.from_pretrained(directory))
    # Without that file it is still what it was.
    tokenizer.save(tmp_path / "alone")
    agree(tokenizer, transformers.AutoTokenizer.from_pretrained(tmp_path / "alone"))
    agree(Tokenizer.load(tmp_path / "alone"), transformers.AutoTokenizer.from_pretrained(directory))


@pytest.mark.parametrize("settings", [{}, {"src_lang": "ko_KR"}])
def test_mbart_in_both_languages(settings: dict[str, Any], tmp_path: Path) -> None:
    config = json.dumps({"tokenizer_class": "MBartTokenizer", **settings}).encode()
    files = {"sentencepiece.bpe.model": sentencepiece_model(), "tokenizer_config.json": config}
    directory = write(files, tmp_path / "mbart")
    stock = transformers.AutoTokenizer.from_pretrained(directory)
    agree(Tokenizer.load(directory), stock)
    stock.save_pretrained(tmp_path / "resaved")
    agree(Tokenizer.load(tmp_path / "resaved"), stock)


@pytest.mark.parametrize(
    ("convention", "options"),
    [
        ("t5", {}),
        ("t5", {"byte_fallback": False, "sentinels": 7}),
        ("t5", {"model": "bpe", "sentinels": 0}),
        ("t5", {"normalisation": "identity"}),
        ("albert", {}),
        ("albert", {"byte_fallback": False, "strip_accents": True, "lowercase": False}),
        ("bert", {}),
        ("bert", {"lowercase": False, "strip_accents": True}),
        ("electra", {}),
        ("bart", {}),
        ("gpt2", {}),
        ("llama", {}),
        ("llama", {"model": "unigram"}),
        ("llama", {"byte_fallback": False}),
    ],
)
def test_what_lathe_trains(convention: str, options: dict[str, Any], tmp_path: Path) -> None:
    tokenizer = trained(convention, **options)
    tokenizer.save(tmp_path)
    agree(tokenizer, transformers.AutoTokenizer.from_pretrained(tmp_path))
    agree(Tokenizer.load(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path))
    # Beside a model, whose type transformers would otherwise go by.
    (tmp_path / "config.json").write_text(json.dumps({"model_type": convention}), encoding="utf-8")
    agree(tokenizer, transformers.AutoTokenizer.from_pretrained(tmp_path))


def test_a_byte_level_tokenizer_json_under_the_class_of_llama(tmp_path: Path) -> None:
    files = trained("gpt2").files
    config = json.dumps({"tokenizer_class": "LlamaTokenizer", "bos_token": "<|endoftext|>"}).encode()
    directory = write({"tokenizer.json": files["tokenizer.json"], "tokenizer_config.json": config}, tmp_path / "model")
    agree(Tokenizer.load(directory), transformers.AutoTokenizer.from_pretrained(directory))


def test_added_tokens_of_the_older_files(tmp_path: Path) -> None:
    files = vocabulary_files(trained("llama"))
    size = trained("llama").vocab_size
    settings = {
        "tokenizer_config.json": {"tokenizer_class": "LlamaTokenizer"},
        "added_tokens.json": {"<b>": size + 1, "<a>": size},
        "special_tokens_map.json": {
            "pad_token": "<a>",
            "bos_token": {"content": "<s>", "lstrip": False, "normalized": False},
        },
    }
    directory = write({**files, **{name: json.dumps(data).encode() for name, data in settings.items()}}, tmp_path / "m")
    tokenizer = Tokenizer.load(directory)
    agree(tokenizer, transformers.AutoTokenizer.from_pretrained(directory))
    assert (tokenizer.pad_id, tokenizer.token_id("<b>"), tokenizer.vocab_size) == (size, size + 1, size + 2)


@pytest.mark.parametrize("convention", ["t5", "bert", "gpt2", "llama", "bart"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_batches(convention: str, side: Literal["left", "right"], tmp_path: Path) -> None:
    tokenizer = trained(convention)
    tokenizer.save(tmp_path)
    stock = transformers.AutoTokenizer.from_pretrained(tmp_path)
    texts = ["A short one.", "오늘은 날씨가 아주 맑아서 아침 일찍 산책을 나갔다.", "", "The statement is executed."]
    pairs = ["and another text, a good deal longer", "하나", "더", "and"]
    for others in (None, pairs):
        ours, theirs = tokenizer(texts, others, padding_side=side), call(stock, texts, others, side, padding=True)
        same_batch(ours, theirs)
        for length in (3, 5, 6, 7, 12, 40):
            if length >= stock.num_special_tokens_to_add(others is not None):
                ours = tokenizer(
                    texts, others, padding="max_length", truncation=True, max_length=length, padding_side=side
                )
                theirs = call(stock, texts, others, side, padding="max_length", truncation=True, max_length=length)
                same_batch(ours, theirs)


def call(stock: Any, texts: list[str], pairs: list[str] | None, side: str, **options: Any) -> Any:
    return stock(texts, pairs, padding_side=side, return_tensors="pt", **options)


def same_batch(ours: Any, theirs: Any) -> None:
    assert set(ours) == set(theirs)
    for name in ours:
        assert ours[name].tolist() == theirs[name].tolist(), name


def agree(tokenizer: Tokenizer, stock: Any) -> None:
    """Hold everything that both can say of the sentences against each other."""
    assert tokenizer.vocab_size == len(stock)
    for role in ("pad", "bos", "eos", "unk", "mask", "cls", "sep"):
        assert getattr(tokenizer, f"{role}_id") == getattr(stock, f"{role}_token_id"), role
    # A file can flag a token as special that no role and no list names; decoding leaves it out all the same.
    flagged = {number for number, token in stock.added_tokens_decoder.items() if token.special}
    assert tokenizer.special_ids == set(stock.all_special_ids) | flagged
    assert tokenizer.padding_side == stock.padding_side
    for sentence in SENTENCES:
        ids = tokenizer.encode(sentence)
        assert ids == stock.encode(sentence), sentence
        assert tokenizer.pieces(ids) == stock.convert_ids_to_tokens(ids)
        bare = tokenizer.encode(sentence, add_special_tokens=False)
        assert bare == stock.encode(sentence, add_special_tokens=False), sentence
        assert tokenizer.encode(sentence, "and b") == stock.encode(sentence, "and b"), sentence
        for skip in (True, False):
            decoded = tokenizer.decode(ids, skip_special_tokens=skip)
            assert decoded == stock.decode(ids, skip_special_tokens=skip), sentence


def write(files: dict[str, bytes], directory: Path) -> Path:
    directory.mkdir()
    for name, data in files.items():
        (directory / name).write_bytes(data)
    return directory


def sentencepiece_model() -> bytes:
    """A model with SentencePiece's own first pieces, <unk>, <s>, </s>, as mBART's has."""
    import io

    import sentencepiece

    result = io.BytesIO()
    lines = (line for text in CORPUS for line in text.splitlines() if line)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines, model_writer=result, vocab_size=600, minloglevel=3
    )
    return result.getvalue()
