"""Another vocabulary: no kept logit moves, new pieces are means of old ones, and stock transformers opens both."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lathe
from lathe.architecture import Architecture, Head, LanguageHead
from lathe.errors import RequestError
from lathe.reshape import resize
from lathe.reshape.vocabulary import Vocabulary, renumbered_settings, settings_ids
from lathe.text import Tokenizer
from lathe.text.cut import Pieces
from tests.reshape.test_width import build
from tests.strategies import architectures
from tests.text.samples import CORPUS, KOREAN, SENTENCES, trained

SMALL = {"d_model": 32, "n_heads": 2, "d_head": 16, "d_ff": 48, "n_layers": 1}
FAMILIES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "t5": ("t5", {"byte_fallback": False}, {"vocab_size": 832}),  # more rows than tokens, as in the published ones
    "flan-t5": ("t5", {}, {"vocab_size": 832, "tied": False}),
    "bert": ("bert", {}, {}),
    "electra": ("electra", {}, {"d_embed": 16}),
    "albert": ("albert", {"byte_fallback": False}, {"d_embed": 16}),
    "bart": ("bart", {}, {}),
    "gpt2": ("gpt2", {}, {}),
    "llama": ("llama", {}, {}),
}
PRESETS = {
    "t5": "t5-small",
    "flan-t5": "flan-t5-small",
    "bert": "bert-base-uncased",
    "electra": "electra-small",
    "albert": "albert-base",
    "bart": "bart-base",
    "gpt2": "gpt2",
    "llama": "llama-2-7b",
}
LINES = KOREAN.splitlines()


@cache
def model(name: str) -> lathe.Model:
    """A tiny model of a family with drawn weights and the ids of a tokenizer trained for it."""
    convention, options, sizes = FAMILIES[name]
    tokenizer = trained(convention, **options)
    eos = tokenizer.eos_id if tokenizer.eos_id is not None else tokenizer.sep_id
    tokens = {
        "tokens.pad": tokenizer.pad_id,
        "tokens.bos": tokenizer.bos_id,
        "tokens.eos": () if eos is None else (eos,),
        "tokens.mask": tokenizer.mask_id,
    }
    base = lathe.preset(PRESETS[name])
    if base.tokens.decoder_start is not None:
        tokens["tokens.decoder_start"] = tokenizer.pad_id if convention == "t5" else eos
    if base.head.language is None:  # their masked-LM classes
        assert base.encoder is not None
        head = Head(language=LanguageHead(transform=base.encoder.feed_forward.activation, bias=True))
        base = base.with_(head=head)
    small = {**SMALL, "vocab_size": tokenizer.vocab_size, **sizes}
    if base.decoder is not None and base.encoder is None and base.decoder.attention.kv_heads != 1:
        small["n_kv_heads"] = None
    made = lathe.Model(base.with_(tokens, **small), seed=0, tokenizer=tokenizer)
    generator = torch.Generator().manual_seed(1)
    for tensor in made.state_dict().values():  # biases and the offset too, so that they count
        tensor.add_(0.05 * torch.randn(tensor.shape, generator=generator))
    return made


def logits(of: lathe.Model, text: str) -> torch.Tensor:
    assert of.tokenizer is not None
    ids = torch.tensor([of.tokenizer.encode(text)])
    both = {"decoder_input_ids": ids} if of.encoder is not None and of.decoder is not None else {}
    with torch.no_grad():
        return of(input_ids=ids, **both).logits[0]


def names_of(tokenizer: Tokenizer | None, architecture: Architecture) -> dict[str, Any]:
    """The tokens that the architecture's ids stand for."""
    assert tokenizer is not None
    tokens = architecture.tokens
    ids = {"pad": tokens.pad, "bos": tokens.bos, "mask": tokens.mask, "start": tokens.decoder_start}
    named = {name: None if number is None else tokenizer.pieces([number]) for name, number in ids.items()}
    return {**named, "eos": tokenizer.pieces(tokens.eos)}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_cut_changes_no_logit_on_text_that_needs_no_dropped_piece(name: str, tmp_path: Path) -> None:
    source = model(name)
    small = lathe.resize(source, vocabulary=LINES)
    assert source.tokenizer is not None
    assert small.tokenizer is not None
    assert small.architecture.embedding.vocab_size == small.tokenizer.vocab_size < source.tokenizer.vocab_size
    assert small.tokenizer.sentinels == tuple(
        small.tokenizer.token_id(f"<extra_id_{number}>") for number in range(len(source.tokenizer.sentinels))
    )
    assert names_of(small.tokenizer, small.architecture) == names_of(source.tokenizer, source.architecture)
    assert [step.exact for step in small.steps] == [True]
    kept = source.tokenizer.vocabulary
    columns = [kept[token] for token in small.tokenizer.pieces(range(small.tokenizer.vocab_size))]
    for line in [*LINES[:4], " ".join(LINES[9:12])]:
        torch.testing.assert_close(logits(small, line), logits(source, line)[:, columns], rtol=0, atol=1e-6)
    same_in_stock(small, tmp_path)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_size_and_calibration_text_are_enough(name: str) -> None:
    source = model(name)
    assert source.tokenizer is not None
    text = [source.tokenizer([line]).input_ids for line in LINES]
    size = source.tokenizer.vocab_size - 60
    small = lathe.resize(source, vocab_size=size, calibrate=text)
    assert small.tokenizer is not None
    assert small.tokenizer.vocab_size == small.architecture.embedding.vocab_size == size
    assert set(small.tokenizer.vocabulary) < set(source.tokenizer.vocabulary)
    assert small.steps[0].detail["text"] > 0.9


@pytest.mark.parametrize("name", FAMILIES)
def test_growth_keeps_every_logit_and_starts_new_pieces_from_means(name: str, tmp_path: Path) -> None:
    source = model(name)
    assert source.tokenizer is not None
    large = lathe.resize(source, vocabulary=Vocabulary(words=["훈민정음", "hippopotamus"], multiple_of=64))
    assert large.tokenizer is not None
    known = source.tokenizer.vocab_size
    size = large.architecture.embedding.vocab_size
    assert size % 64 == 0
    assert size >= large.tokenizer.vocab_size > known
    text = LINES[2]
    assert large.tokenizer.encode(text) == source.tokenizer.encode(text)
    torch.testing.assert_close(logits(large, text)[:, :known], logits(source, text)[:, :known], rtol=0, atol=1e-6)
    before, after = (
        each.encode("a hippopotamus", add_special_tokens=False) for each in (source.tokenizer, large.tokenizer)
    )
    new, parts = after[-1], before[len(after) - 1 :]
    assert new >= known
    for tensor in ("embedding.tokens.weight", "head.language.output.weight", "head.language.offset"):
        if tensor in source.tensors():
            mean = source.tensors()[tensor][parts].mean(0)
            torch.testing.assert_close(large.tensors()[tensor][new], mean, rtol=0, atol=1e-6)
    if size > large.tokenizer.vocab_size:
        row = large.tensors()["embedding.tokens.weight"][-1]
        torch.testing.assert_close(row, source.tensors()["embedding.tokens.weight"].mean(0), rtol=0, atol=1e-6)
    if name in ("t5", "bert", "bart", "llama"):  # one of each kind of tokenizer and head
        same_in_stock(large, tmp_path)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_cut_leaves_room_for_new_words(name: str, tmp_path: Path) -> None:
    source, words = model(name), ["훈민정음", "hippopotamus"]
    assert source.tokenizer is not None
    size = source.tokenizer.vocab_size - 40
    small = lathe.resize(source, vocab_size=size, vocabulary=Vocabulary(LINES, words=words))
    assert small.tokenizer is not None
    assert small.architecture.embedding.vocab_size == small.tokenizer.vocab_size == size
    assert all(len(small.tokenizer.encode(f"a {word}", add_special_tokens=False)) <= 3 for word in words)
    alone = lathe.resize(source, vocab_size=size, vocabulary=LINES)
    assert alone.tokenizer is not None
    assert len(set(small.tokenizer.vocabulary) - set(alone.tokenizer.vocabulary)) >= 2
    if name in ("bert", "llama"):
        same_in_stock(small, tmp_path)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_least_size_with_new_words_is_said(name: str) -> None:
    source, asked = model(name), Vocabulary(LINES, words=["훈민정음", "hippopotamus"])
    assert source.tokenizer is not None
    size = len(Pieces(source.tokenizer, settings_ids(source.generation)).required) + 1
    with pytest.raises(RequestError, match=r"is too small: .*, the new words and .* take \d+; ask for that") as refused:
        lathe.resize(source, vocab_size=size, vocabulary=asked)
    least = int(str(refused.value).partition(" take ")[2].partition(";")[0])
    assert lathe.resize(source, vocab_size=least, vocabulary=asked).architecture.embedding.vocab_size == least


@pytest.mark.parametrize("name", ["t5", "bert", "llama"])
def test_pieces_are_learnt_until_the_size_is_reached(name: str) -> None:
    source = model(name)
    text = ["세종대왕은 훈민정음을 만들었다. 훈민정음 해례본 hippopotamus hippopotami"] * 3
    large = lathe.resize(source, vocab_size=830 if name != "bert" else 920, vocabulary=text)
    assert large.tokenizer is not None
    assert source.tokenizer is not None
    assert large.tokenizer.vocab_size == large.architecture.embedding.vocab_size
    assert source.tokenizer.unk_id not in large.tokenizer.encode(text[0])


def test_a_multiple_needs_neither_text_nor_tokenizer() -> None:
    source = lathe.Model(model("gpt2").architecture, model("gpt2").tensors())
    padded = lathe.resize(source, vocabulary=Vocabulary(multiple_of=64))
    assert padded.architecture.embedding.vocab_size == 512
    assert padded.architecture.tokens == source.architecture.tokens
    ids = torch.tensor([[3, 70, 401]])
    with torch.no_grad():
        torch.testing.assert_close(padded(ids).logits[..., :500], source(ids).logits)
        assert (padded(ids).logits.argmax(-1) < 500).all()


def test_rows_without_a_token_go_first_and_need_no_text() -> None:
    source = model("t5")
    assert source.tokenizer is not None
    small = lathe.resize(source, vocab_size=source.tokenizer.vocab_size)
    assert small.tokenizer is source.tokenizer
    assert small.steps[0].exact


@settings(max_examples=8)
@given(architecture=architectures(), data=st.data())
def test_kept_ids_without_a_tokenizer(architecture: Architecture, data: st.DataObject) -> None:
    vocab = architecture.embedding.vocab_size
    ids = data.draw(st.sets(st.integers(0, vocab - 1), min_size=1))
    source = build(architecture)
    done = resize(source, {}, vocabulary=Vocabulary(ids=sorted(ids)))
    assert done.vocabulary is not None
    new = done.vocabulary.ids
    assert ids <= new.keys()
    small = lathe.Model(done.architecture, done.tensors, dtype=torch.float64)
    text = torch.tensor([sorted(new)[:4]])
    moved = torch.tensor([[new[number] for number in sorted(new)[:4]]])
    both = architecture.encoder is not None and architecture.decoder is not None
    with torch.no_grad():
        before = source(text, **({"decoder_input_ids": text} if both else {}))
        after = small(moved, **({"decoder_input_ids": moved} if both else {}))
    if before.logits is not None and architecture.head.language is not None:
        torch.testing.assert_close(after.logits, before.logits[..., sorted(new)], rtol=1e-9, atol=1e-9)


def test_settings_are_numbered_anew() -> None:
    found = {
        "eos_token_id": [2, 5],
        "pad_token_id": 0,
        "bos_token_id": None,
        "bad_words_ids": [[5, 7]],
        "forced_decoder_ids": [[1, 5]],
        "force_words_ids": [[9], [[5, 7]]],
        "sequence_bias": [[[8, 5], 50.0], [[7], -2]],
        "task_specific_params": {"translation": {"decoder_start_token_id": 11, "num_beams": 5}},
        "max_length": 7,
    }
    assert settings_ids(found) == {0, 2, 5, 7, 8, 9, 11}
    assert renumbered_settings(found, {0: 0, 5: 1, 7: 2, 8: 3, 9: 4, 11: 5}) == {
        "eos_token_id": [1],
        "pad_token_id": 0,
        "bos_token_id": None,
        "bad_words_ids": [[1, 2]],
        "forced_decoder_ids": [[1, 1]],
        "force_words_ids": [[4], [[1, 2]]],
        "sequence_bias": [[[3, 1], 50.0], [[2], -2]],
        "task_specific_params": {"translation": {"decoder_start_token_id": 5, "num_beams": 5}},
        "max_length": 7,
    }


@pytest.mark.parametrize("name", ["t5", "bert", "gpt2"])
def test_of_a_batch_its_text_alone_is_counted(name: str) -> None:
    """No padding, no marks around it, and where tokens were hidden the ones that stood there."""
    source = model(name)
    assert source.tokenizer is not None
    special, unknown = source.tokenizer.special_ids, None if name == "gpt2" else source.tokenizer.unk_id
    alone = source.tokenizer.encode_batch(SENTENCES, add_special_tokens=False)
    text = Counter(each for ids in alone for each in ids if each == unknown or each not in special)
    rows = source.tokenizer(SENTENCES)  # padded
    batch = {"input_ids": rows.input_ids, "attention_mask": rows.attention_mask}
    if name == "t5":  # the same again as what is written
        labels = rows.input_ids.masked_fill(rows.attention_mask == 0, -100)
        batch |= {"decoder_input_ids": rows.input_ids.roll(1, dims=1), "labels": labels}
    if name == "bert":  # every third token of the text is hidden, by the mask or by any other token
        is_text = ~torch.isin(rows.input_ids, torch.tensor(sorted(special)))
        hidden = is_text & (torch.arange(rows.input_ids.shape[1]) % 3 == 1)
        batch["labels"] = rows.input_ids.masked_fill(~hidden, -100)
        batch["input_ids"] = rows.input_ids.masked_fill(hidden, 40).masked_fill(
            hidden & (rows.input_ids % 2 == 0), source.architecture.tokens.mask or 0
        )
    least = len(Pieces(source.tokenizer).required)
    small = lathe.resize(source, vocab_size=least + 20, calibrate=[batch])
    assert small.tokenizer is not None
    left = set(small.tokenizer.vocabulary)
    pieces = {number: token for token, number in source.tokenizer.vocabulary.items()}
    kept = sum(times for number, times in text.items() if pieces[number] in left)
    assert 0.2 < kept / text.total() < 1
    assert small.steps[0].detail["text"] == pytest.approx(kept / text.total(), abs=1e-9)


def test_a_model_whose_tokenizer_lacks_one_of_its_tokens_says_the_least_that_works() -> None:
    source = model("llama")
    assert source.tokenizer is not None
    wide = source.architecture.with_({"vocab_size": source.tokenizer.vocab_size + 4})
    own = lathe.Model(wide.with_({"tokens.pad": source.tokenizer.vocab_size + 2}), seed=0, tokenizer=source.tokenizer)
    with pytest.raises(RequestError, match="vocab_size=100 is too small") as error:
        lathe.resize(own, vocab_size=100, vocabulary=LINES)
    least = int(str(error.value).split("take ")[1].split(";")[0])
    with pytest.raises(RequestError, match=f"vocab_size={least - 1} is too small: .* take {least};"):
        lathe.resize(own, vocab_size=least - 1, vocabulary=LINES)
    assert lathe.resize(own, vocab_size=least, vocabulary=LINES).architecture.embedding.vocab_size == least


def test_generation_settings_keep_their_tokens() -> None:
    source = model("bart")
    assert source.tokenizer is not None
    number = source.tokenizer.token_id("Ġthe")
    source = lathe.Model(
        source.architecture, source.tensors(), tokenizer=source.tokenizer, generation={"forced_bos_token_id": number}
    )
    small = lathe.resize(source, vocabulary=["책"])
    assert small.tokenizer is not None
    assert small.tokenizer.pieces([small.generation["forced_bos_token_id"]]) == ["Ġthe"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"vocab_size": 100, "vocabulary": LINES},
            r"vocab_size=100 is too small: .* take 2\d\d; ask for",
        ),
        ({"vocab_size": 400}, "which of 500 tokens to keep is seen from text; give it"),
        (
            {"vocab_size": 900},
            r"vocab_size=900: the model has 500; new tokens need words=\[…\], or a text",
        ),
        ({"vocab_size": 900, "vocabulary": Vocabulary(words=["hippo"])}, "give a text to learn them"),
        ({"vocabulary": Vocabulary(words=["hippo", "hippo"])}, "'hippo' and 'hippo' are the same piece"),
        ({"vocabulary": Vocabulary(ids=[4, 600])}, "ids holds 600: expected ids from 0 to 499"),
        ({"vocabulary": Vocabulary(ids=[4]), "vocab_size": 300}, "ids says already which tokens to keep"),
        ({"vocabulary": []}, "the corpus is empty"),
        ({"vocabulary": Vocabulary()}, "asks for nothing"),
        ({"vocab_size": 400, "vocabulary": Vocabulary(LINES, words=["the"])}, "'the' is a piece of this tokenizer"),
    ],
)
def test_what_cannot_be_had_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        lathe.resize(model("gpt2"), **changes)


def test_a_text_without_a_tokenizer_is_refused() -> None:
    source = lathe.Model(model("gpt2").architecture, model("gpt2").tensors())
    with pytest.raises(RequestError, match="no tokenizer to read text with"):
        lathe.resize(source, vocabulary=LINES)
    small = lathe.resize(source, vocab_size=40, calibrate=[torch.tensor([[7, 30, 499]])])
    assert small.architecture.embedding.vocab_size == 40


@pytest.mark.parametrize("name", ["bert", "t5"])
def test_text_that_the_tokenizer_cannot_read_is_refused(name: str) -> None:
    """A T5's sets a bare space before each word that is unknown."""
    with pytest.raises(RequestError, match="reads 100% of the corpus as unknown"):
        lathe.resize(model(name), vocabulary=["ქართული ენა"])


@pytest.mark.parametrize(
    "asked", [{"multiple_of": 0}, {"multiple_of": True}, {"words": "one"}, {"ids": [1], "words": ["a"]}]
)
def test_a_request_that_cannot_be_is_refused(asked: dict[str, Any]) -> None:
    with pytest.raises(RequestError):
        Vocabulary(**asked)


def test_lathe_resize_cuts_the_vocabulary_and_heals_from_a_parent_that_has_the_same(
    cli: Callable[..., Any], tmp_path: Path
) -> None:
    source = model("gpt2")
    assert source.tokenizer is not None
    number = source.tokenizer.token_id("Ġthe")
    lathe.Model(
        source.architecture, source.tensors(), tokenizer=source.tokenizer, generation={"forced_eos_token_id": number}
    ).save(tmp_path / "source")
    text = tmp_path / "text.txt"
    text.write_text("".join(CORPUS), encoding="utf-8")
    words = ["vocab_size=400", "d_ff=40", "calibrate.tokens=3000", "calibrate.length=64", "heal.steps=2"]
    ran = cli("resize", tmp_path / "source", tmp_path / "cut", *words, "--calibrate", text, "--heal", text)
    assert ran.code == 0, ran.err
    small = lathe.load(tmp_path / "cut")
    assert small.tokenizer is not None
    assert small.tokenizer.vocab_size == small.architecture.embedding.vocab_size == 400
    assert small.tokenizer.pieces([small.generation["forced_eos_token_id"]]) == ["Ġthe"]
    assert "cut vocabulary 500 → 400" in ran.out


def same_in_stock(made: lathe.Model, directory: Path) -> None:
    """Save it, and hold stock transformers' tokenizer and model against it."""
    transformers = pytest.importorskip("transformers")
    assert made.save(directory / "made").stock
    assert made.tokenizer is not None
    stock = transformers.AutoTokenizer.from_pretrained(directory / "made")
    for text in [*LINES[:3], *SENTENCES, "hippopotamus 훈민정음"]:
        assert stock.encode(text) == made.tokenizer.encode(text), text
    again = lathe.load(directory / "made")
    kind = getattr(transformers, again.config["architectures"][0])
    theirs, info = kind.from_pretrained(directory / "made", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = torch.tensor([made.tokenizer.encode(LINES[0])])
    both = {"decoder_input_ids": ids} if made.encoder is not None and made.decoder is not None else {}
    with torch.no_grad():
        found = theirs.eval()(input_ids=ids, **both).logits[0]
    torch.testing.assert_close(found, logits(again, LINES[0]), rtol=1e-4, atol=1e-4)
