"""`lathe resize` and `lathe compare`: what a user asks for is there, whole, and what is wrong is one line."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import lathe
from lathe.text.train import train_tokenizer

WORDS = [
    *("the", "a", "lathe", "turns", "wood", "metal", "stone", "to", "size", "that"),
    *("is", "asked", "for", "and", "quick", "brown", "foxes", "jump", "over", "lazy", "dogs"),
]
VOCABULARIES = {"gpt2": 280, "t5": 150, "bert": 90}
SIZES: dict[str, Any] = {"d_model": 16, "n_layers": 2, "n_heads": 2, "d_head": 8, "d_ff": 24}


def documents(number: int, seed: int) -> list[str]:
    chance = random.Random(seed)
    return [" ".join(chance.choices(WORDS, k=chance.randint(20, 40))) for _ in range(number)]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small GPT-2, a small T5 and a small BERT with their tokenizers, and text."""
    folder = tmp_path_factory.mktemp("resize")
    for name, seed in (("text.txt", 0), ("held.txt", 1)):
        (folder / name).write_text("\n".join(documents(60, seed)), encoding="utf-8")
    for name, preset, head in (
        ("gpt2", "gpt2", None),
        ("t5", "t5-small", None),
        ("bert", "bert-base-uncased", "masked"),
    ):
        own: dict[str, Any] = {"byte_fallback": False} if name == "t5" else {}
        tokenizer = train_tokenizer(documents(60, 0), VOCABULARIES[name], convention=name, **own)
        ids = {"pad": tokenizer.pad_id, "bos": tokenizer.bos_id, "eos": [tokenizer.eos_id] if tokenizer.eos_id else []}
        base = lathe.preset(preset, head=head)
        more = {} if name == "t5" else {"max_positions": 64}
        tokens = {**base.tokens.to_dict(), **ids, "mask": tokenizer.mask_id}
        tokens["decoder_start"] = tokenizer.pad_id if name == "t5" else None
        architecture = base.with_({**SIZES, **more, "vocab_size": tokenizer.vocab_size, "tokens": tokens})
        lathe.Model(architecture, seed=0, tokenizer=tokenizer).save(folder / name)
    return folder


@pytest.fixture
def here(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with the models and the text in it."""
    for path in made.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path


@pytest.mark.parametrize("name", ["gpt2", "t5", "bert"])
def test_a_cut_is_a_stock_directory_with_its_recipe_its_page_and_its_card(cli: Callable, here: Path, name: str):
    ran = cli("resize", name, "small", "d_model=12", "--calibrate", "text.txt", "--device", "cpu", "--json")
    assert ran.code == 0, ran.err
    answer = json.loads(ran.out)
    assert lathe.load("small").architecture.d_model == 12
    assert answer["reload"]["largest"] < 1e-6
    assert answer["reload"]["stock"] < 1e-4
    assert answer["reload"]["missing"] == answer["reload"]["unexpected"] == []
    assert answer["family"] == name
    assert answer["result"]["parameters"] < answer["source"]["parameters"]
    last = answer["steps"][-1]
    assert not last["exact"]
    assert last["quality"]["loss"] == answer["result"]["quality"]["loss"]
    assert (answer["result"]["quality"]["bits_per_byte"] is not None) == (name == "gpt2")
    card = Path("small/README.md").read_text(encoding="utf-8")
    assert yaml.safe_load(card.split("---")[1])["tags"] == ["lathe", "resized", name]
    page = Path("small/report.html").read_text(encoding="utf-8")
    for step in answer["steps"]:
        assert step["name"] in card
        assert escape(step["name"]) in page
    assert "kept apart from what fits" in page


def test_growth_needs_no_text_and_says_that_it_is_exact(cli: Callable, here: Path):
    ran = cli("resize", "t5", "large", "d_ff=40", "n_layers=3", "--device", "cpu", "--json")
    assert ran.code == 0, ran.err
    answer = json.loads(ran.out)
    assert all(step["exact"] and step["change"] < 1e-5 for step in answer["steps"])
    assert answer["result"]["quality"] is None
    ids = torch.tensor([[5, 6, 7]])
    before, after = (lathe.load(each)(ids, decoder_input_ids=ids).logits for each in ("t5", "large"))
    torch.testing.assert_close(before, after, rtol=1e-5, atol=1e-5)


def test_losses_under_another_tokenizer_are_not_compared(cli: Callable, here: Path):
    ran = cli("resize", "gpt2", "fewer", "vocab_size=264", "--calibrate", "text.txt", "--device", "cpu", "--json")
    assert ran.code == 0, ran.err
    answer = json.loads(ran.out)
    assert answer["steps"][-1]["renumbers"]
    assert lathe.load("fewer").architecture.embedding.vocab_size == 264
    card = Path("fewer/README.md").read_text(encoding="utf-8")
    assert "The tokenizer changed" in card
    assert "bits per byte" in card
    assert "unknown" not in card  # byte-level pieces spell everything
    assert "other tokens" in card
    again = cli("resize", "gpt2", "again", "--recipe", "fewer", "--device", "cpu")
    assert again.code == 0, again.err
    for file in ("model.safetensors", "tokenizer.json"):
        assert Path("fewer", file).read_bytes() == Path("again", file).read_bytes()


def test_bits_a_byte_of_text_that_has_become_unknown_are_said_to_say_too_little(cli: Callable, here: Path):
    tokenizer = lathe.load("t5").tokenizer  # its pieces spell no bytes
    assert tokenizer is not None
    base = lathe.preset("gpt2")
    tokens = {**base.tokens.to_dict(), "bos": None, "eos": [tokenizer.eos_id]}
    shape = base.with_({**SIZES, "max_positions": 64, "vocab_size": tokenizer.vocab_size, "tokens": tokens})
    lathe.Model(shape, seed=0, tokenizer=tokenizer).save("plain")
    words = ["--calibrate", "text.txt", "--device", "cpu", "--json"]
    for size, unknown in ((tokenizer.vocab_size - 1, False), (108, True)):
        ran = cli("resize", "plain", f"at-{size}", f"vocab_size={size}", *words)
        assert ran.code == 0, ran.err
        card = Path(f"at-{size}/README.md").read_text(encoding="utf-8")
        assert "bits per byte" in card
        assert ("say too little where text is read as unknown" in card) == unknown


def test_a_source_that_only_guesses_is_said_to(cli: Callable, here: Path):
    model = lathe.load("gpt2")
    with torch.no_grad():
        model.get_parameter("embedding.tokens.weight").mul_(0.0)  # every token as likely as any other
    model.save("level")
    words = ["d_ff=20", "--calibrate", "text.txt", "--device", "cpu"]
    ran = cli("resize", "level", "one", *words)
    assert ran.code == 0, ran.err
    said = "no better than that of a guess among 280 tokens"
    assert said in ran.err
    assert said in Path("one/README.md").read_text(encoding="utf-8")


def test_a_recipe_makes_the_same_bytes_and_refuses_anything_else(cli: Callable, here: Path):
    words = ["d_model=12", "d_ff=40", "method=select", "refit=false", "calibrate.tokens=900", "seed=3"]
    assert cli("resize", "gpt2", "one", *words, "--calibrate", "text.txt", "--device", "cpu").code == 0
    recipe = json.loads(Path("one/lathe.json").read_text(encoding="utf-8"))["recipe"]
    assert recipe["how"] == {"method": "select", "search": None, "refit": False, "share": "mean"}
    assert (recipe["seed"], recipe["calibrate"]["tokens"]) == (3, 900)
    shutil.copy("text.txt", "moved.text")
    again = cli("resize", "gpt2", "two", "--recipe", "one/lathe.json", "--calibrate", "moved.text", "--device", "cpu")
    assert again.code == 0, again.err
    assert "byte for byte" in again.err
    for file in ("model.safetensors", "config.json"):
        assert Path("one", file).read_bytes() == Path("two", file).read_bytes()
    other = cli("resize", "gpt2", "three", "--recipe", "one", "--calibrate", "held.txt")
    assert (other.code, "held.txt is not what the recipe was made with" in other.err) == (2, True)
    other = cli("resize", "two", "three", "--recipe", "one")
    assert (other.code, "two is not what the recipe was made with" in other.err) == (2, True)
    other = cli("resize", "gpt2", "three", "d_model=8", "--recipe", "one")
    assert (other.code, "the recipe says what is done" in other.err) == (2, True)
    assert not Path("three").exists()


def test_a_replay_may_be_measured_on_another_text_and_is_replayed_itself(cli: Callable, here: Path):
    words = ["d_ff=16", "calibrate.tokens=900", "--calibrate", "text.txt", "--device", "cpu"]
    assert cli("resize", "gpt2", "one", *words).code == 0
    two = cli("resize", "gpt2", "two", "--recipe", "one", "--data", "held.txt", "--device", "cpu")
    assert two.code == 0, two.err
    three = cli("resize", "gpt2", "three", "--recipe", "two", "--device", "cpu")
    assert three.code == 0, three.err
    assert "byte for byte" in three.err


@pytest.mark.parametrize("text", ["calibrate", "heal", "vocabulary"])
def test_a_replay_refuses_a_text_that_its_recipe_does_not_name(cli: Callable, here: Path, text: str):
    assert cli("resize", "gpt2", "one", "d_ff=40", "--device", "cpu").code == 0
    again = cli("resize", "gpt2", "two", "--recipe", "one", f"{text}=text.txt")
    assert again.code == 2
    assert f"the recipe names no {text} text" in again.err


@pytest.mark.parametrize("heals", [False, True])
def test_what_somebody_keeps_beside_dst_stays_there(cli: Callable, here: Path, heals: bool):
    Path("new.heal").mkdir()
    Path("new.heal/notes.txt").write_text("mine", encoding="utf-8")
    words = ["--heal", "text.txt", "heal.steps=2", "heal.rows=2", "heal.length=32"] if heals else []
    ran = cli("resize", "gpt2", "new", "d_ff=40", *words, "--device", "cpu")
    assert ran.code == 0, ran.err
    assert [path.name for path in Path("new.heal").iterdir()] == ["notes.txt"]


def test_a_card_keeps_its_languages(cli: Callable, here: Path):
    shutil.copytree("gpt2", "norse")
    Path("norse/README.md").write_text("---\nlanguage:\n- no\n- en\nlicense: mit\n---\n", encoding="utf-8")
    assert cli("resize", "norse", "new", "d_ff=40", "--device", "cpu").code == 0
    header = yaml.safe_load(Path("new/README.md").read_text(encoding="utf-8").split("---")[1])
    assert (header["language"], header["license"]) == (["no", "en"], "mit")


def test_healing_in_two_stages_replays_to_the_same_bytes(cli: Callable, here: Path):
    words = ["d_model=4", "d_head=4", "heal.steps=4", "heal.rows=2", "heal.length=32", "heal.hidden=0.1"]
    texts = ["--calibrate", "text.txt", "--heal", "text.txt", "--device", "cpu"]
    ran = cli("resize", "t5", "one", *words, *texts, "--json")
    assert ran.code == 0, ran.err
    stages = json.loads(Path("one/lathe.json").read_text(encoding="utf-8"))["recipe"]["stages"]
    assert [next(key for key in ("resize", "heal") if key in stage) for stage in stages] == ["resize", "heal"] * 2
    assert 4 < stages[0]["resize"]["d_model"] < 16
    assert [step["heals"] for step in json.loads(ran.out)["steps"]].count(True) == 2
    assert not Path("one.heal").exists()
    again = cli("resize", "t5", "two", "--recipe", "one", "--device", "cpu", "--run", "kept")
    assert again.code == 0, again.err
    assert Path("one/model.safetensors").read_bytes() == Path("two/model.safetensors").read_bytes()
    files = [Path(f"kept/stage-{number}/metrics.jsonl") for number in (1, 2)]
    first, second = ([json.loads(line)["batch"] for line in file.read_text().splitlines()] for file in files)
    assert len({*first, *second}) == len(first) + len(second)  # the second reads on where the first stopped


def test_a_kept_healing_goes_on_with_its_own_cut_alone(cli: Callable, here: Path):
    texts = ["--calibrate", "text.txt", "--heal", "text.txt", "--run", "kept", "--device", "cpu"]
    words = [*texts, "d_model=12", "d_head=6", "heal.steps=3", "heal.rows=2", "heal.length=32"]
    for name in ("one", "two"):
        ran = cli("resize", "gpt2", name, *words, "search=0")
        assert ran.code == 0, ran.err
    assert Path("one/model.safetensors").read_bytes() == Path("two/model.safetensors").read_bytes()
    less = Path("less.txt")
    less.write_text("\n".join(documents(50, 0)), encoding="utf-8")
    others = {
        "search=0, and this one says 2": ["search=2"],
        "seed=0, and this one says 1": ["search=0", "seed=1"],
        "heal.lr=none, and this one says 0.01": ["search=0", "heal.lr=0.01"],
        "changes.d_ff=none, and this one says 20": ["search=0", "d_ff=20"],
        "text.calibrate=": ["search=0", "--calibrate", "less.txt"],
    }
    for line, other in others.items():
        refused = cli("resize", "gpt2", "three", *words, *other)
        assert (refused.code, f"began with {line}" in refused.err) == (2, True), refused.err
        assert "resizing" not in refused.err
    moved = cli("resize", "gpt2", "four", *words, "search=0", "heal.save_every=1", "stream=true")
    assert moved.code == 0, moved.err
    assert Path("one/model.safetensors").read_bytes() == Path("four/model.safetensors").read_bytes()


def test_what_only_lathes_own_form_holds_is_asked_for(cli: Callable, here: Path):
    refused = cli("resize", "gpt2", "odd", "d_model=13", "--calibrate", "text.txt")
    assert refused.code == 2
    assert "12 or 14" in refused.err
    assert "own form" in refused.err
    ran = cli("resize", "gpt2", "odd", "d_model=13", "--calibrate", "text.txt", "--own-form", "--device", "cpu")
    assert ran.code == 0, ran.err
    assert lathe.load("odd").architecture.d_model == 13
    assert not Path("odd/config.json").exists()
    assert json.loads(Path("odd/lathe.json").read_text(encoding="utf-8"))["recipe"]["stages"]
    again = cli("resize", "gpt2", "odd2", "--recipe", "odd", "--device", "cpu")
    assert again.code == 0, again.err
    assert Path("odd/model.safetensors").read_bytes() == Path("odd2/model.safetensors").read_bytes()


WRONG: list[tuple[list[str], str]] = [
    (["gpt2", "new"], "nothing to change: give field=value"),
    (["gpt2", "new", "d_model=16"], "has d_model=16 already"),
    (["gpt2", "new", "d_modle=12"], "did you mean 'd_model'"),
    (["gpt2", "new", "d_model=12"], "calibrate"),
    (["gpt2", "new", "d_model=12", "--calibrate", "none.txt"], "there is no file none.txt"),
    (["gpt2", "new", "d_model=12", "--calibrate", "latin.txt"], "latin.txt, line 1: not UTF-8"),
    (["bert", "new", "d_model=12", "--calibrate", "korean.txt"], "korean.txt: the tokenizer cannot read it"),
    (["t5", "new", "d_model=12", "--calibrate", "korean.txt"], "korean.txt: the tokenizer cannot read it"),
    (["gpt2", "new", "d_model=12", "--calibrate", "short.txt"], "needs at least"),
    (["gpt2", "new", "d_ff=20", "--calibrate", "short.txt"], "needs at least"),
    (["gpt2", "new", "d_model=12", "calibrate.tokens=100"], "give calibrate=FILE"),
    (["gpt2", "new", "d_model=12", "--calibrate", "text.txt", "calibrate.rank=3"], "unknown field 'calibrate.rank'"),
    (["gpt2", "new", "d_model=12", "--calibrate", "text.txt", "--method", "guess"], "rotate, select, truncate"),
    (["gpt2", "new", "d_ff=40", "--run", "kept"], "nothing heals here"),
    (["gpt2", "text.txt", "d_ff=40"], "is a file"),
    (["gpt2", "t5", "d_ff=40"], "already exists"),
    (["quantised", "new", "d_ff=40"], "quantised is quantised already"),
    (["bare", "new", "d_model=12", "--calibrate", "text.txt"], "holds no tokenizer"),
    (["gpt2", "new", "n_kv_heads=1", "--calibrate", "text.txt"], "as many of each; Lathe's own form can hold it"),
    (["nowhere/", "new", "d_ff=40"], "there is no directory"),
    (["gpt2", "d_ff=40", "--calibrate", "text.txt"], "d_ff=40 is a change, where DST is expected"),
    (["blown", "new", "d_ff=20", "--calibrate", "text.txt"], "holds numbers that are not finite"),
    (["gpt2", "new", "d_ff=20", "--calibrate", "text.txt", "--device", "gpu"], "device=gpu: there is no such device"),
    (["gpt2", "new", "d_ff=20", "--calibrate", "text.txt", "share=middle"], "share=middle: this says"),
    (["gpt2", "new", "--max-parameters", "5k", "--calibrate", "text.txt", "share=middle"], "share=middle: this says"),
    (["gpt2", "new", "--max-parameters=9k", "--max-bytes=9kB", "--calibrate", "text.txt"], "are two budgets"),
    (["gpt2", "new", "--recipe", "none.json"], "cannot read the recipe"),
    (["gpt2", "new", "--recipe", "gpt2/config.json"], "holds no recipe"),
]


@pytest.mark.parametrize(("words", "line"), WRONG, ids=[" ".join(words[2:]) or words[0] for words, _ in WRONG])
def test_what_is_wrong_is_one_line_and_leaves_nothing(cli: Callable, here: Path, words: list[str], line: str):
    Path("latin.txt").write_bytes("für alle\n".encode("latin-1"))
    Path("korean.txt").write_text("선반은 나무를 깎는다\n" * 9, encoding="utf-8")
    Path("short.txt").write_text("the lathe turns", encoding="utf-8")
    for name in ("quantised", "bare"):
        shutil.copytree("gpt2", name)
    for file in Path("bare").iterdir():
        if file.name not in ("config.json", "model.safetensors"):
            file.unlink()
    config = json.loads(Path("quantised/config.json").read_text(encoding="utf-8"))
    Path("quantised/config.json").write_text(json.dumps({**config, "quantization_config": {"bits": 4}}))
    blown = lathe.load("gpt2")
    next(blown.parameters()).data[3, 3] = float("nan")
    blown.save("blown")
    before = sorted(path.name for path in here.iterdir())
    ran = cli("resize", *words)
    assert ran.code == 2, ran.err
    assert line in ran.err
    assert ran.err.strip().splitlines()[-1].startswith("lathe: ")
    assert sorted(path.name for path in here.iterdir()) == before


@pytest.mark.parametrize(
    ("source", "text", "line"),
    [
        ("gpt2", None, "there is no file other.txt"),
        ("gpt2", "\n", "other.txt holds no"),
        ("gpt2", "the lathe turns wood " * 99, "give rows of at most 64 positions instead of 128"),
        ("labels", "the lathe turns", "predicts no tokens, so text alone cannot heal it"),
    ],
)
def test_the_text_to_heal_on_is_read_before_anything_is_cut(
    cli: Callable, here: Path, source: str, text: str | None, line: str
):
    if text is not None:
        Path("other.txt").write_text(text, encoding="utf-8")
    if source == "labels":
        bert = lathe.load("bert")
        labels = lathe.preset("bert-base-uncased", head="classification").head
        lathe.Model(bert.architecture.with_({"head": labels}), seed=0, tokenizer=bert.tokenizer).save("labels")
    words = ["d_ff=20", "heal.length=128", "--calibrate", "text.txt", "--heal", "other.txt"]
    ran = cli("resize", source, "new", *words)
    assert ran.code == 2
    assert ran.err.strip().splitlines() == [ran.err.strip()]
    assert line in ran.err


def test_what_only_the_new_vocabulary_can_read_is_healed_on(cli: Callable, here: Path):
    Path("korean.txt").write_text("선반은 나무를 깎는다\n돌을 깎는 선반\n" * 40, encoding="utf-8")
    words = ["vocab_size=100", "vocabulary=korean.txt", "heal.steps=2", "heal.rows=2", "heal.length=32"]
    ran = cli("resize", "bert", "new", *words, "--heal", "korean.txt", "--device", "cpu")
    assert ran.code == 0, ran.err


def test_a_short_text_to_heal_on_is_said(cli: Callable, here: Path):
    Path("few.txt").write_text("the lathe turns wood to size", encoding="utf-8")
    words = ["d_ff=20", "heal.steps=4", "heal.rows=2", "heal.length=32", "--heal", "few.txt", "--device", "cpu"]
    ran = cli("resize", "gpt2", "new", "--calibrate", "text.txt", *words)
    assert ran.code == 0, ran.err
    assert "tokens and is read up to" in ran.err
    enough = cli("resize", "gpt2", "other", "--calibrate", "text.txt", *words[:-3], "text.txt", *words[-2:])
    assert enough.code == 0, enough.err
    assert "is read up to" not in enough.err
    # In two stages as well, and where the rows' length is found from the text.
    stages = [
        "d_ff=8",
        "heal.steps=4",
        "heal.rows=1",
        "--heal",
        "text.txt",
        "--device",
        "cpu",
        "--calibrate",
        "text.txt",
    ]
    two = cli("resize", "gpt2", "third", *stages)
    assert two.code == 0, two.err
    assert "is read up to" not in two.err
    recipe = json.loads(Path("third/lathe.json").read_text(encoding="utf-8"))["recipe"]
    healed = [stage["heal"] for stage in recipe["stages"] if "heal" in stage]
    assert [each["whole"] for each in healed] == [4 * healed[0]["length"]] * 2


def test_a_reload_of_16_bits_is_compared_in_32(cli: Callable, here: Path):
    lathe.load("gpt2", dtype=torch.bfloat16).save("half")
    ran = cli("resize", "half", "small", "d_ff=20", "--calibrate", "text.txt", "--device", "cpu", "--json")
    assert ran.code == 0, ran.err
    assert lathe.load("small").dtype == torch.bfloat16
    assert json.loads(ran.out)["reload"]["stock"] < 1e-5


def test_a_bart_is_cut_on_plain_text(cli: Callable, here: Path):
    tokenizer = train_tokenizer(documents(60, 0), 300, convention="bart")
    tokens = {"pad": tokenizer.pad_id, "bos": tokenizer.bos_id, "eos": [tokenizer.eos_id], "mask": tokenizer.mask_id}
    base = lathe.preset("bart-base")
    tokens = {**base.tokens.to_dict(), **tokens, "decoder_start": tokenizer.eos_id}
    bart = base.with_({**SIZES, "max_positions": 64, "vocab_size": tokenizer.vocab_size, "tokens": tokens})
    lathe.Model(bart, seed=0, tokenizer=tokenizer).save("bart")
    ran = cli("resize", "bart", "small", "d_model=12", "--calibrate", "text.txt", "--device", "cpu", "--json")
    assert ran.code == 0, ran.err
    assert json.loads(ran.out)["text"]["objective"] == "denoising"
    asked = cli("resize", "bart", "new", "d_ff=20", "--calibrate", "text.txt", "objective=denoising", "--device", "cpu")
    assert asked.code == 0, asked.err
    words = ["objective=denoising", "objective.permute=true"]
    moved = cli("resize", "bart", "no", "d_ff=20", "--calibrate", "text.txt", *words)
    assert moved.code == 2
    assert "objective.permute=false" in moved.err


def test_a_disk_that_fills_up_leaves_nothing(cli: Callable, here: Path, monkeypatch: pytest.MonkeyPatch):
    import errno

    from lathe.reshape import history

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    before = sorted(path.name for path in here.iterdir())
    monkeypatch.setattr(history, "weight_digests", full)
    ran = cli("resize", "t5", "new", "d_ff=40", "--device", "cpu")
    assert ran.code == 1
    assert "No space left" in ran.err
    assert sorted(path.name for path in here.iterdir()) == before


def test_a_model_of_fewer_positions_is_compared_on_rows_as_short(cli: Callable, here: Path):
    model = lathe.load("gpt2")
    tensors = {name: tensor[:16] if "position" in name else tensor for name, tensor in model.tensors().items()}
    lathe.Model(model.architecture.with_(max_positions=16), tensors, tokenizer=model.tokenizer).save("short")
    ran = cli("compare", "gpt2", "short", "--data", "held.txt", "--device", "cpu", "--json")
    answer = json.loads(ran.out)
    assert answer["length"] == 16
    assert answer["rows"][0]["loss"] == pytest.approx(answer["rows"][1]["loss"], rel=1e-6)
    alone = json.loads(cli("compare", "gpt2", "bert", "--data", "held.txt", "--device", "cpu", "--json").out)
    assert alone["length"] == 64


def test_what_a_model_cannot_read_is_said_where_it_is_compared(cli: Callable, here: Path):
    """Unknown pieces are easily guessed: bits a byte are few where most of the text is unknown."""
    tokenizer = train_tokenizer(documents(60, 0), 90, convention="llama", byte_fallback=False)
    sizes = {**SIZES, "n_kv_heads": 2, "max_positions": 64, "vocab_size": tokenizer.vocab_size}
    tokens = {"tokens.pad": None, "tokens.bos": tokenizer.bos_id, "tokens.eos": [tokenizer.eos_id]}
    blind = lathe.preset("llama-3.2-1b").with_({**sizes, **tokens})
    lathe.Model(blind, seed=0, tokenizer=tokenizer).save("blind")
    Path("korean.txt").write_text("선반은 나무를 깎는다\n" * 20, encoding="utf-8")
    few = "\n".join([*documents(20, 2), "선반은 나무를 깎는다"])
    Path("few.txt").write_text(few, encoding="utf-8")
    ran = cli("compare", "gpt2", "blind", "--data", "korean.txt", "--device", "cpu")
    assert ran.code == 2
    assert "blind: the tokenizer reads 100% of the corpus as unknown" in ran.err
    some = json.loads(cli("compare", "gpt2", "blind", "--data", "few.txt", "--device", "cpu", "--json").out)
    assert [row["unknown"] > 0 for row in some["rows"]] == [False, True]
    assert "Where text is unknown they say too little: blind reads " in some["note"]
    assert "too little" not in cli("compare", "gpt2", "blind", "--data", "held.txt", "--device", "cpu", "--json").out


def test_models_are_compared_on_the_same_text(cli: Callable, here: Path):
    options = ["--calibrate", "text.txt", "--device", "cpu"]
    assert cli("resize", "gpt2", "small", "d_model=12", *options).code == 0
    ran = cli("compare", "gpt2", "small", "--data", "held.txt", "--out", "side", "--device", "cpu", "--json")
    assert ran.code == 0, ran.err
    answer = json.loads(ran.out)
    assert [row["name"] for row in answer["rows"]] == ["gpt2", "small"]
    assert (answer["measure"], answer["note"]) == ("loss", "")
    assert "small" in answer["frontier"]
    assert Path("side/frontier.png").read_bytes().startswith(b"\x89PNG")
    assert "held.txt" in Path("side/compare.html").read_text(encoding="utf-8")
    settings = json.loads(Path("small/tokenizer_config.json").read_text(encoding="utf-8"))
    Path("small/tokenizer_config.json").write_text(json.dumps({**settings, "a note": "of no use"}), encoding="utf-8")
    same = json.loads(cli("compare", "gpt2", "small", "--data", "held.txt", "--device", "cpu", "--json").out)
    assert (same["measure"], same["note"]) == ("loss", "")
    other = cli("compare", "gpt2", "t5", "--data", "held.txt", "--device", "cpu")
    assert other.code == 0, other.err
    assert "do not compare" in other.out
    names = [f"a-name-that-is-longer-than-its-column-and-ends-in-{end}" for end in ("alpha", "beta")]
    for name in names:
        Path(name).symlink_to(Path("gpt2").resolve())
    long = cli("compare", *names, "--data", "held.txt", "--device", "cpu")
    assert all(f"│ {name} " in long.out for name in names)
    for words, line in (([], "--data FILE"), (["--data", "held.txt", "--out", "side"], "already exists")):
        wrong = cli("compare", "gpt2", *words)
        assert (wrong.code, line in wrong.err) == (2, True)
