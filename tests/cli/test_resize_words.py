"""What words of `lathe resize` ask of a vocabulary and of shared layers, and what `lathe.resize` then saves."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
import transformers

import lathe
from lathe.reshape.share_remainder import with_remainder
from lathe.text.train import train_tokenizer
from tests.cli.test_resize import SIZES, documents

IDS = torch.tensor([[5, 6, 7, 8, 9, 10]])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small BERT with its tokenizer, text, and text with words that are new to it."""
    folder = tmp_path_factory.mktemp("words")
    (folder / "text.txt").write_text("\n".join(documents(60, 0)), encoding="utf-8")
    (folder / "new.txt").write_text("hippo lathe zebra quokka turns wood\n" * 40, encoding="utf-8")
    rows = "\n".join(json.dumps({"said": f"the zebra turns {n} quokkas"}) for n in range(40))
    (folder / "new.jsonl").write_text(rows, encoding="utf-8")
    tokenizer = train_tokenizer(documents(60, 0), 90, convention="bert")
    base = lathe.preset("bert-base-uncased", head="masked")
    tokens = {**base.tokens.to_dict(), "pad": tokenizer.pad_id, "mask": tokenizer.mask_id}
    sizes = {**SIZES, "max_positions": 64, "vocab_size": tokenizer.vocab_size, "tokens": tokens}
    model = lathe.Model(base.with_(sizes), seed=0, tokenizer=tokenizer)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    model.save(folder / "bert")
    return folder


@pytest.fixture
def here(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with the model and the text in it."""
    for path in made.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def answer(cli: Callable, *words: str) -> dict:
    ran = cli("resize", *words, "--device", "cpu", "--json")
    assert ran.code == 0, ran.err
    return dict(json.loads(ran.out))


def test_a_vocabulary_grows_from_a_text_and_from_words_and_replays_to_the_same_bytes(cli: Callable, here: Path):
    words = ["vocab_size=100", "words=[hippopotamus,42]", "multiple_of=8"]
    found = answer(cli, "bert", "grown", *words, "vocabulary=new.txt")
    assert found["changes"] == {
        "vocab_size": 100,
        "vocabulary": "new.txt",
        "words": ["hippopotamus", "42"],
        "multiple_of": 8,
    }
    assert found["reload"]["missing"] == found["reload"]["unexpected"] == []
    grown = lathe.load("grown")
    assert grown.architecture.embedding.vocab_size == 104
    stock = transformers.AutoTokenizer.from_pretrained("grown")
    assert stock.tokenize("hippopotamus 42") == ["hippopotamus", "42"]
    assert len(stock) == 100
    old, ids = lathe.load("bert"), IDS
    torch.testing.assert_close(grown(ids).logits[..., :90], old(ids).logits, rtol=1e-5, atol=1e-5)
    Path("moved.text").write_bytes(Path("new.txt").read_bytes())
    answer(cli, "bert", "again", "--recipe", "grown", "vocabulary=moved.text")
    for file in ("model.safetensors", "tokenizer.json", "config.json"):
        assert Path("grown", file).read_bytes() == Path("again", file).read_bytes()
    other = cli("resize", "bert", "third", "--recipe", "grown", "vocabulary=text.txt")
    assert (other.code, "text.txt is not what the recipe was made with" in other.err) == (2, True)


def test_a_vocabulary_keeps_what_a_column_uses(cli: Callable, here: Path):
    text, more = ["vocabulary=new.jsonl", "vocabulary.field=said"], "heal.field=said"
    found = answer(cli, "bert", "fewer", *text, "calibrate=text.txt", "d_ff=16", "heal=new.jsonl", "heal.steps=2", more)
    size = lathe.load("fewer").architecture.embedding.vocab_size
    assert size < 90
    assert found["steps"][-1]["heals"]  # from the source with the same few tokens
    assert [f"cut vocabulary 90 → {size}" in step["name"] for step in found["steps"]].count(True) == 1


def test_what_shared_layers_differ_by_is_an_adapter_that_peft_opens(cli: Callable, here: Path):
    own = ["--own-form", "--data", "text.txt"]
    found = answer(cli, "bert", "shared", "sharing=all", "remainder=4", *own)
    assert [step["exact"] for step in found["steps"]] == [False, False]
    assert found["steps"][1]["parameters"] == found["result"]["parameters"] > found["steps"][0]["parameters"]
    assert 0 < found["steps"][1]["detail"]["encoder.feed_forward.0"] < 1
    source = lathe.load("bert")
    wanted = with_remainder(source, "all", 4)(IDS).logits
    relaxed = lathe.load("shared/remainder")  # names no base: it is the directory's that it lies in
    torch.testing.assert_close(relaxed(IDS).logits, wanted, rtol=1e-5, atol=1e-5)
    assert relaxed.tokenizer is not None
    assert not torch.allclose(lathe.load("shared")(IDS).logits, wanted, rtol=1e-5, atol=1e-5)
    answer(cli, "shared", "plain", "sharing=none")
    stock = transformers.AutoModelForMaskedLM.from_pretrained("plain")
    theirs = peft.PeftModel.from_pretrained(stock, "shared/remainder").eval()(IDS).logits
    torch.testing.assert_close(theirs, wanted, rtol=1e-4, atol=1e-4)
    answer(cli, "bert", "again", "--recipe", "shared")
    for file in ("model.safetensors", "remainder/adapter_model.safetensors", "remainder/adapter_config.json"):
        assert Path("shared", file).read_bytes() == Path("again", file).read_bytes()


WRONG: list[tuple[list[str], str]] = [
    (["words=the"], "the new word 'the' is a piece of this tokenizer already"),
    (["words=[zoo]", "vocabulary.words=[zoo]"], "vocabulary.words is set twice"),
    (["multiple_of=0"], "expected a whole number from 1 to 65,536"),
    (["vocab_size=100"], "vocabulary=FILE"),
    (["vocab_size=100", "words=[zoo]"], "vocabulary=FILE"),
    (["vocab_size=100", "vocabulary=none.txt"], "there is no file none.txt"),
    (["vocab_size=100", "vocabulary=empty.txt"], "empty.txt"),
    (["vocabulary=new.jsonl"], "'text'"),
    (["vocabulary.field=said"], "give vocabulary=FILE"),
    (["words=[zoo]", "max_parameters=5000", "calibrate=text.txt"], "a budget chooses the vocabulary"),
    (["d_ff=8", "heal=text.txt", "heal.whole=9"], "heal.whole: a recipe's stages have it"),
    (["sharing=all", "remainder=4"], "--own-form"),
    (["remainder=4", "d_model=8"], "here d_model changes"),
    (["sharing=all", "remainder=0", "--own-form"], "remainder=0: expected a whole number"),
    (["sharing=all", "remainder=17", "--own-form"], "rank=17: expected 1 to 16"),
    (["sharing=all", "remainder=4", "calibrate=text.txt", "--own-form"], "remainder=4 with calibrate"),
]


@pytest.mark.parametrize(("words", "line"), WRONG, ids=[" ".join(words) for words, _ in WRONG])
def test_what_is_wrong_is_one_line_and_leaves_nothing(cli: Callable, here: Path, words: list[str], line: str):
    Path("empty.txt").write_text("\n\n", encoding="utf-8")
    before = sorted(path.name for path in here.iterdir())
    ran = cli("resize", "bert", "new", *words, "--device", "cpu")
    assert ran.code == 2, ran.err
    assert line in ran.err
    assert ran.err.strip().splitlines()[-1].startswith("lathe: ")
    assert sorted(path.name for path in here.iterdir()) == before


# --- the same from Python


def test_what_python_saves_is_what_the_command_saves(cli: Callable, here: Path):
    words = ["d_model=12", "d_ff=40", "vocab_size=96", "vocabulary=new.txt", "seed=3", "calibrate.seed=3"]
    found = answer(cli, "bert", "one", *words, "--calibrate", "text.txt")
    small = lathe.resize(
        lathe.load("bert"),
        d_model=12,
        d_ff=40,
        vocab_size=96,
        vocabulary=Path("new.txt"),
        calibrate="text.txt",
        seed=3,
    )
    small.save("two")
    for file in ("model.safetensors", "config.json", "tokenizer.json"):
        assert Path("one", file).read_bytes() == Path("two", file).read_bytes()
    one, two = (json.loads(Path(name, "lathe.json").read_text(encoding="utf-8")) for name in ("one", "two"))
    assert one == two
    card = Path("two/README.md").read_text(encoding="utf-8")
    page = Path("two/report.html").read_text(encoding="utf-8")
    assert all(step["name"] in card for step in found["steps"])
    assert "kept apart from what fits" in page
    answer(cli, "bert", "three", "--recipe", "two")
    assert Path("three/model.safetensors").read_bytes() == Path("two/model.safetensors").read_bytes()


def test_a_healing_from_python_replays_to_the_same_bytes(cli: Callable, here: Path):
    parent = lathe.load("bert")
    small = lathe.resize(parent, d_ff=16, calibrate="text.txt")
    lathe.heal(small, parent, "text.txt", steps=2, rows=2, length=32)
    small.save("healed")
    card = Path("healed/README.md").read_text(encoding="utf-8")
    assert "heal for 2 steps" in card
    answer(cli, "bert", "again", "--recipe", "healed")
    assert Path("healed/model.safetensors").read_bytes() == Path("again/model.safetensors").read_bytes()


def test_what_no_file_holds_is_said_and_not_replayed(cli: Callable, here: Path):
    model = lathe.load("bert")
    saved = {"ids": lathe.resize(model, d_ff=16, calibrate=[IDS.repeat(8, 4)])}
    saved["words"] = lathe.resize(model, vocabulary=lathe.Vocabulary(ids=list(range(50))))
    with torch.no_grad():
        next(model.parameters()).mul_(2)
    saved["trained"] = lathe.resize(model, d_ff=40)
    saved["twice"] = lathe.resize(saved["trained"], d_ff=48)
    saved["since"] = lathe.resize(lathe.load("bert"), d_ff=40)
    with torch.no_grad():
        next(saved["since"].parameters()).mul_(2)
    lines = {
        "ids": "fitted on token ids",
        "words": "given from Python",
        "trained": "a model in memory",
        "twice": "a model in memory",
        "since": "changed after its last stage",
    }
    for name, line in lines.items():
        saved[name].save(name)
        assert line in Path(name, "README.md").read_text(encoding="utf-8")
        ran = cli("resize", "bert", "new", "--recipe", name)
        assert (ran.code, line in ran.err) == (2, True)
    recipe = json.loads(Path("twice/lathe.json").read_text(encoding="utf-8"))["recipe"]
    assert recipe["source"]["recipe"]["stages"][0]["resize"] == {"d_ff": 40}
    assert "outside of Lathe" in Path("since/README.md").read_text(encoding="utf-8")
    saved["since"].save("bare", report=False)
    assert not Path("bare/report.html").exists()
    assert json.loads(Path("bare/lathe.json").read_text(encoding="utf-8"))["recipe"]["stages"]
