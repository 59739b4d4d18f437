"""Healing: a cut model comes nearer to its parent, and a run that was stopped ends as one that was not."""

from __future__ import annotations

import json
import random
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import lathe
from lathe.errors import RequestError
from lathe.reshape import heal as healing
from lathe.reshape.heal import HealSettings, heal
from lathe.reshape.opening import open_job
from lathe.reshape.request import read_request
from lathe.reshape.stages import half_way
from lathe.reshape.text import TextSettings, endless, healing_text, lay, read_documents
from lathe.text.train import train_tokenizer
from lathe.train import Distillation, evaluate, fit


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> tuple[lathe.Model, Path]:
    """A small GPT-2 that has learnt a little, and its text."""
    chance = random.Random(0)
    words = ["a", "lathe", "turns", "wood", "metal", "stone", "to", "the", "size", "asked", "for"]
    file = tmp_path_factory.mktemp("heal") / "text.txt"
    file.write_text("\n".join(" ".join(chance.choices(words, k=30)) for _ in range(40)), encoding="utf-8")
    tokenizer = train_tokenizer(file.read_text(encoding="utf-8").splitlines(), 280, convention="gpt2")
    sizes: dict[str, Any] = {"d_model": 16, "n_layers": 1, "n_heads": 2, "d_head": 8, "d_ff": 24, "max_positions": 64}
    tokens = {"tokens.eos": [tokenizer.eos_id], "tokens.bos": tokenizer.bos_id}
    architecture = lathe.preset("gpt2").with_({**sizes, **tokens, "vocab_size": tokenizer.vocab_size})
    model = lathe.Model(architecture, seed=0, tokenizer=tokenizer)
    lathe.heal(model, model, file, steps=20, lr=2e-2, weight=0.0, rows=4, length=32)
    return model, file


def batches(model: lathe.Model, settings: TextSettings) -> Any:
    assert model.tokenizer is not None
    documents, _ = read_documents(settings, model.tokenizer, apart=False)
    return endless(documents, settings, model.architecture, model.tokenizer)


def test_a_cut_model_comes_nearer_to_its_parent(parent: tuple[lathe.Model, Path]):
    model, file = parent
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    small = lathe.resize(model, d_model=8, calibrate=file, refit=False)  # fitted, there is little left to heal
    assert small.tokenizer is model.tokenizer
    text = batches(model, TextSettings(file=str(file), rows=4, length=32)).one_pass(4)
    distance = Distillation(model, weight=1.0)
    before = evaluate(small, text, loss_fn=distance).loss
    lathe.heal(small, model, file, steps=12, lr=5e-3, rows=4, length=32, weight=1.0)
    assert evaluate(small, text, loss_fn=distance).loss < 0.9 * before
    assert small.steps[-1].name.startswith("heal for 12 steps on ")
    assert not small.training
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())


def test_a_run_that_was_stopped_goes_on_to_the_same_weights(parent: tuple[lathe.Model, Path], tmp_path: Path):
    model, file = parent
    settings = HealSettings(file=str(file), steps=6, rows=2, length=32, save_every=2, hidden=0.1)

    class Stopped(Exception):
        pass

    def stop(report: Any) -> None:
        if report.step == 5:
            raise Stopped

    whole, broken, resumed = (lathe.resize(model, method="truncate", d_model=8) for _ in range(3))
    heal(whole, model, batches(model, settings.text), settings)
    with pytest.raises(Stopped):
        heal(broken, model, batches(model, settings.text), settings, tmp_path / "run", on_step=stop)
    heal(resumed, model, batches(model, settings.text), settings, tmp_path / "run")
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
    other = lathe.resize(model, method="truncate", d_model=8)
    with pytest.raises(RequestError, match="was started with"):
        heal(other, model, batches(model, settings.text), settings, tmp_path / "run", asked={"cut": "another"})


def test_a_kept_run_tells_of_all_its_steps_however_often_it_was_called(
    parent: tuple[lathe.Model, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    model, file = parent
    whole, broken, resumed, again = (lathe.resize(model, d_model=8, calibrate=file, refit=False) for _ in range(4))
    asked: dict[str, Any] = {"steps": 6, "rows": 4, "length": 32, "save_every": 2}
    lathe.heal(whole, model, file, **asked)

    class Stopped(Exception):
        pass

    def stopping(*given: Any, **named: Any) -> Any:
        def stop(report: Any) -> None:
            if report.step == 5:
                raise Stopped

        return fit(*given, **{**named, "on_step": stop})

    monkeypatch.setattr(healing, "fit", stopping)
    with pytest.raises(Stopped):
        lathe.heal(broken, model, file, folder=tmp_path / "run", **asked)
    monkeypatch.setattr(healing, "fit", fit)
    assert whole.history is not None
    curve = whole.history.curves["healing 1"]
    assert [step for step, _ in curve] == [1, 2, 3, 4, 5, 6]
    for each in (resumed, again):  # one goes on at step 4, and one comes when all is done
        lathe.heal(each, model, file, folder=tmp_path / "run", **asked)
        assert each.history is not None
        assert each.history.curves["healing 1"] == curve
        assert each.history.steps[-1].name == whole.history.steps[-1].name
        assert all(torch.equal(tensor, each.state_dict()[name]) for name, tensor in whole.state_dict().items())


def test_a_kept_run_goes_on_with_its_own_cut_and_teacher_alone(parent: tuple[lathe.Model, Path], tmp_path: Path):
    model, file = parent
    other = lathe.Model(model.architecture, seed=5, tokenizer=model.tokenizer)
    asked: dict[str, Any] = {"steps": 2, "rows": 2, "length": 32, "folder": tmp_path / "run"}
    lathe.heal(lathe.resize(model, method="truncate", d_model=8), model, file, **asked)
    for source, teacher, what in ((other, model, "cut"), (model, other, "teacher")):
        cut = lathe.resize(source, method="truncate", d_model=8)
        before = {name: tensor.clone() for name, tensor in cut.state_dict().items()}
        with pytest.raises(RequestError, match=f"was started with {what}="):
            lathe.heal(cut, teacher, file, **asked)
        assert all(torch.equal(before[name], tensor) for name, tensor in cut.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_16_bits_heal_in_float32_and_are_rounded_once(parent: tuple[lathe.Model, Path], dtype: torch.dtype):
    model, file = parent
    narrow, wide = (lathe.resize(model, method="truncate", d_model=8).to(dtype) for _ in range(2))
    wide.float()
    for each in (narrow, wide):
        lathe.heal(each, model, file, steps=5, lr=1e-3, rows=2, length=32)
    for name, tensor in wide.state_dict().items():
        assert narrow.state_dict()[name].dtype == dtype
        assert torch.equal(narrow.state_dict()[name], tensor.to(dtype)), name


def test_the_teacher_is_left_as_it_was(parent: tuple[lathe.Model, Path]):
    model, file = parent
    modes: list[bool] = []
    handle = model.register_forward_pre_hook(lambda module, _: modes.append(module.training))
    for mode in (True, False):
        model.train(mode)
        lathe.heal(lathe.resize(model, method="truncate", d_model=8), model, file, steps=1, rows=2, length=32)
        assert model.training is mode
    handle.remove()
    assert not any(modes[-1:])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_teacher_comes_to_the_students_device(parent: tuple[lathe.Model, Path]):
    model, file = parent
    small = lathe.resize(model, method="truncate", d_model=8).to("cuda")
    lathe.heal(small, model, file, steps=2, rows=2, length=32)
    assert small.device.type == "cuda"
    assert model.device.type == "cpu"


def test_noise_leaves_the_tokenizers_special_tokens_where_they_are(tmp_path: Path):
    file = tmp_path / "text.txt"
    file.write_text("\n".join(f"a lathe turns wood and stone {n} to size" for n in range(60)), encoding="utf-8")
    tokenizer = train_tokenizer(file.read_text(encoding="utf-8").splitlines(), 90, convention="bert")
    base = lathe.preset("bert-base-uncased", head="masked")
    assert tokenizer.cls_id not in (base.tokens.bos, *base.tokens.eos)
    tokens = {"tokens.pad": tokenizer.pad_id, "tokens.mask": tokenizer.mask_id}
    sizes: dict[str, Any] = {"d_model": 16, "n_layers": 1, "n_heads": 2, "d_head": 8, "d_ff": 24, "max_positions": 64}
    shape = base.with_({**sizes, **tokens, "vocab_size": tokenizer.vocab_size})
    read: list[list[torch.Tensor]] = []
    for noise in (0.0, 0.5):
        model = lathe.Model(shape, seed=0, tokenizer=tokenizer)
        seen: list[torch.Tensor] = []
        model.register_forward_pre_hook(
            lambda _, __, inputs, seen=seen: seen.append(inputs["input_ids"]), with_kwargs=True
        )
        lathe.heal(model, lathe.Model(shape, seed=1), file, steps=3, rows=4, length=32, noise=noise)
        read.append(seen)
    plain, noisy = (torch.cat([ids.flatten() for ids in each]) for each in read)
    is_special = torch.isin(plain, torch.tensor(sorted(tokenizer.special_ids)))
    assert {tokenizer.cls_id, tokenizer.sep_id} <= set(plain.tolist())
    assert torch.equal(plain[is_special], noisy[is_special])
    assert not torch.isin(noisy[~is_special], torch.tensor(sorted(tokenizer.special_ids))).any()
    assert (plain != noisy).any()


def test_the_stages_of_a_healing_are_the_whole_of_it():
    assert [part.steps for part in HealSettings(file="x", steps=201).parts(2)] == [100, 101]
    assert [part.tokens for part in HealSettings(file="x", tokens=1001).parts(2)] == [500, 501]
    assert [part.steps for part in HealSettings(file="x").parts(2)] == [100, 100]
    assert [(part.steps, part.stages) for part in HealSettings(file="x", steps=1).parts(2)] == [(1, 1), (1, 1)]
    assert [part.text.tokens for part in HealSettings(file="x", tokens=1001).parts(2)] == [1001, 1001]
    assert [part.whole for part in HealSettings(file="x").parts(1)] == [None]
    with pytest.raises(RequestError, match=r"whole=999: expected the 1000 tokens of this stage or more"):
        HealSettings(file="x", tokens=1000, whole=999)


@pytest.mark.parametrize(
    ("asked", "warmup"),
    [
        ({}, 10),
        ({"steps": 400}, 20),
        ({"steps": 3}, 1),
        ({"tokens": 1000 * 16 * 256}, 50),
        ({"tokens": 1000 * 4 * 32 * 2, "rows": 4, "length": 32, "accumulate": 2}, 50),
        ({"tokens": 100}, 1),
        ({"steps": 400, "tokens": 100 * 16 * 256}, 5),
        ({"steps": 100, "tokens": 400 * 16 * 256}, 5),
    ],
)
def test_the_rate_rises_for_a_twentieth_of_the_steps(asked: dict[str, Any], warmup: int):
    assert HealSettings(file="x", **asked).training().schedule.warmup == warmup


def test_both_models_multiply_in_sixteen_bits_where_that_is_asked(parent: tuple[lathe.Model, Path]):
    model, file = parent
    small = lathe.resize(model, d_model=8, calibrate=file, refit=False)
    settings = HealSettings(file=str(file), steps=6, rows=4, length=32, precision="bf16")
    text = batches(model, settings.text)
    distance = Distillation(model, weight=1.0)
    before = evaluate(small, text.one_pass(4), loss_fn=distance).loss
    seen: dict[str, set[torch.dtype]] = {"ours": set(), "the parent's": set()}

    def watch(name: str) -> Any:
        return lambda _module, _given, out: seen[name].add(out.dtype)

    for name, each in (("ours", small), ("the parent's", model)):
        linear = next(module for module in each.modules() if isinstance(module, torch.nn.Linear))
        handle = linear.register_forward_hook(watch(name))
        heal(small, model, batches(model, settings.text), settings)
        handle.remove()
        assert seen[name] == {torch.bfloat16}
    assert {each.dtype for each in small.parameters()} == {torch.float32}
    assert evaluate(small, text.one_pass(4), loss_fn=distance).loss < 0.9 * before


def test_matrix_products_are_of_sixteen_bits_on_a_gpu_where_nothing_is_asked():
    asked = [HealSettings(file="x"), HealSettings(file="x", precision="fp32"), HealSettings(file="x", precision="bf16")]
    assert [each.training("cpu").precision for each in asked] == ["fp32", "fp32", "bf16"]
    assert [each.training("cuda").precision for each in asked] == ["bf16", "fp32", "bf16"]


def test_more_likeliest_tokens_than_there_are_is_refused_before_anything_is_read(
    parent: tuple[lathe.Model, Path], tmp_path: Path
):
    model, _ = parent
    model.save(tmp_path / "gpt2")
    vocab = model.architecture.embedding.vocab_size
    words: dict[str, Any] = {"calibrate": "nowhere.txt", "heal": "nowhere.txt"}
    for sizes, top_k in (({"d_model": 8}, vocab), ({"vocab_size": 264}, 264), ({"max_parameters": 9000}, vocab)):
        with pytest.raises(RequestError, match=f"top_k={top_k}: expected 1 or more and below the vocabulary"):
            open_job(read_request(str(tmp_path / "gpt2"), {**words, **sizes, "heal.top_k": top_k}))


def test_a_grown_model_shares_no_memory_with_the_one_it_came_from(parent: tuple[lathe.Model, Path]):
    model, _ = parent
    grown = lathe.resize(model, d_ff=32)
    taken = {tensor.data_ptr() for tensor in model.state_dict().values()}
    assert taken.isdisjoint(tensor.data_ptr() for tensor in grown.state_dict().values())


def test_half_of_the_way_is_a_size_that_the_family_can_hold():
    base = lathe.preset("bert-base-uncased", head="masked")
    assert half_way(base, {"d_model": 480}) is None
    first = half_way(base, {"d_model": 192, "d_ff": 2048})
    assert first is not None
    assert first["d_ff" if "d_ff" in first else "encoder.feed_forward.d_ff"] == 2048
    assert first["d_model"] == 384
    assert half_way(lathe.preset("t5-small"), {"encoder.n_layers": 2}) == {"encoder.n_layers": 3}


def test_text_is_drawn_by_its_seed_and_kept_apart(parent: tuple[lathe.Model, Path]):
    model, file = parent
    assert model.tokenizer is not None
    settings = TextSettings(file=str(file), tokens=600)
    used, held = read_documents(settings, model.tokenizer, apart=True)
    assert held
    assert not set(used.texts) & set(held.texts)
    assert used.digest == read_documents(settings, model.tokenizer, apart=True)[0].digest
    other, _ = read_documents(TextSettings(file=str(file), tokens=600, seed=1), model.tokenizer, apart=True)
    assert other.digest != used.digest
    text = lay(used, settings, model.architecture, model.tokenizer)
    assert text.tokens == pytest.approx(600, rel=0.1)
    assert text.length == 64
    assert text.targets_of_text is not None


def test_one_long_document_is_divided(parent: tuple[lathe.Model, Path], tmp_path: Path):
    model, file = parent
    assert model.tokenizer is not None
    long = tmp_path / "long.txt"
    long.write_text(file.read_text(encoding="utf-8").replace("\n", " "), encoding="utf-8")
    used, held = read_documents(TextSettings(file=str(long), tokens=500), model.tokenizer, apart=True)
    tokens = [sum(map(len, model.tokenizer.encode_batch(list(each.texts)))) for each in (used, held)]
    assert sum(tokens) == pytest.approx(500, rel=0.1)
    assert tokens[0] > 5 * tokens[1] > 0


@pytest.mark.parametrize("number", [1, 4])
def test_the_end_that_few_documents_are_measured_on_is_healed_on_by_none(
    parent: tuple[lathe.Model, Path], tmp_path: Path, number: int
):
    model, file = parent
    assert model.tokenizer is not None
    few = tmp_path / "few.txt"
    lines = file.read_text(encoding="utf-8").splitlines()
    few.write_text("\n".join(" ".join(lines[n::number]) for n in range(number)), encoding="utf-8")
    settings = TextSettings(file=str(few))
    used, apart = read_documents(settings, model.tokenizer, apart=True)
    healing = healing_text(settings, model.tokenizer, apart)
    assert len(apart.texts) == 1
    assert len(healing.texts) == number
    assert not any(apart.texts[0] in text for text in healing.texts)
    assert {text.strip() for text in healing.texts} == set(used.texts)


@pytest.mark.parametrize("tokens", [900, 950, 970, 990])
def test_the_beginning_of_a_document_that_is_measured_on_is_healed_on_by_none(
    parent: tuple[lathe.Model, Path], tmp_path: Path, tokens: int
):
    model, file = parent
    assert model.tokenizer is not None
    lines = file.read_text(encoding="utf-8").splitlines()
    ten = tmp_path / "ten.txt"
    ten.write_text(
        "\n".join(f"{name} " + " ".join(lines[n::10]) for n, name in enumerate("abcdefghij")), encoding="utf-8"
    )
    settings = TextSettings(file=str(ten))
    whole, _ = read_documents(settings, model.tokenizer, apart=False)
    total = sum(map(len, model.tokenizer.encode_batch(list(whole.texts), add_special_tokens=False)))
    _, apart = read_documents(settings, model.tokenizer, apart=True)
    (held,) = apart.texts
    assert held == whole.texts[-1]
    healing = healing_text(replace(settings, tokens=total * tokens // 1000), model.tokenizer, apart)
    assert len(healing.texts) == 9
    assert not any(held.startswith(text[:20]) for text in healing.texts)


@pytest.mark.parametrize("prefix", ["say: ", "tell: ", ""])
def test_pairs_that_are_measured_on_are_healed_on_with_no_other_prefix(
    parent: tuple[lathe.Model, Path], tmp_path: Path, prefix: str
):
    model, file = parent
    assert model.tokenizer is not None
    lines = file.read_text(encoding="utf-8").splitlines()
    pairs = tmp_path / "pairs.jsonl"
    rows = [json.dumps({"ask": line[:40], "answer": line[40:]}) for line in lines]
    pairs.write_text("\n".join(rows) + "\n", encoding="utf-8")
    settings = TextSettings(file=str(pairs), source="ask", target="answer", prefix="say: ")
    _, apart = read_documents(settings, model.tokenizer, apart=True)
    healing = healing_text(replace(settings, prefix=prefix), model.tokenizer, apart)
    assert len(apart.texts) + len(healing.texts) == len(lines)
    assert not set(apart.targets or ()) & set(healing.targets or ())


@pytest.mark.parametrize("more", [10, 150, 100_000])
def test_of_a_long_document_only_the_piece_that_is_measured_on_is_left_out(
    parent: tuple[lathe.Model, Path], tmp_path: Path, more: int
):
    model, file = parent
    assert model.tokenizer is not None
    book = file.read_text(encoding="utf-8").replace("\n", " ")
    (tmp_path / "book.txt").write_text(book, encoding="utf-8")
    settings = TextSettings(file=str(tmp_path / "book.txt"), tokens=400)
    used, apart = read_documents(settings, model.tokenizer, apart=True)
    (before,), (end,) = used.texts, apart.texts
    shown = healing_text(replace(settings, tokens=400 + more), model.tokenizer, apart).texts
    if more == 100_000:  # all of the book, and what stands after the piece with it
        assert f"{before} {end}{shown[1]}" == book
    assert shown[0] == before
    (tmp_path / "other.txt").write_text(f"of others {book}", encoding="utf-8")
    other = healing_text(TextSettings(file=str(tmp_path / "other.txt")), model.tokenizer, apart)
    assert other.texts == (f"of others {book}",)
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(json.dumps({"ask": book, "say": "wood"}) + "\n", encoding="utf-8")
    asked = TextSettings(file=str(pairs), source="ask", target="say")
    assert healing_text(asked, model.tokenizer, apart).records == [(book, "wood")]


def test_a_teacher_that_is_no_model_is_refused_and_a_quantised_one_teaches(parent: tuple[lathe.Model, Path]):
    model, file = parent
    small = lathe.resize(model, d_ff=16, calibrate=file)
    before = {name: tensor.clone() for name, tensor in small.tensors().items()}
    with pytest.raises(RequestError, match=r"cannot heal from it: expected a lathe\.Model"):
        lathe.heal(small, model.to_transformers(), file, steps=1)
    assert all(torch.equal(before[name], tensor) for name, tensor in small.tensors().items())
    with tempfile.TemporaryDirectory() as folder:
        lathe.quantize(model, bits=8).save(f"{folder}/small")
        lathe.heal(small, lathe.load(f"{folder}/small"), file, steps=1, rows=2, length=32)
    assert small.history is not None
    assert "heal" in small.history.recipe.stages[-1]


@pytest.mark.parametrize(("name", "value"), [("stages", 2), ("file", "b.txt"), ("whole", 9000)])
def test_a_setting_of_the_command_alone_is_refused(parent: tuple[lathe.Model, Path], name: str, value: Any):
    model, file = parent
    with pytest.raises(RequestError, match=f"^{name}={value!r}: "):
        lathe.heal(model, model, file, **{name: value})


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"weight": 2.0}, "expected the parent's share"),
        ({"lr": 0}, "expected more than 0"),
        ({"speed": 1}, "unknown field 'speed'"),
        ({"hidden": -1.0}, "expected 0 or more"),
    ],
)
def test_a_setting_that_cannot_be_is_refused(parent: tuple[lathe.Model, Path], settings: dict[str, Any], line: str):
    model, file = parent
    with pytest.raises(RequestError, match=line):
        lathe.heal(model, model, file, **settings)
    with pytest.raises(RequestError, match="has no tokenizer"):
        lathe.resize(lathe.Model(model.architecture, seed=0), d_model=8, calibrate=file)
