"""A model that writes targets to sources is cut, measured and healed on pairs."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import lathe
from lathe.errors import RequestError
from lathe.reshape.budget_trial import TextProbe
from lathe.reshape.measure import quality
from lathe.reshape.opening import open_job
from lathe.reshape.request import read_request
from lathe.reshape.text import Documents, TextSettings, lay, read_documents
from lathe.text.train import train_tokenizer
from tests.cli.test_resize import SIZES, documents

PAIRS = ["calibrate=pairs.jsonl", "calibrate.source=said", "calibrate.target=meant", "calibrate.prefix=lathe: "]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a small T5 and pairs."""
    texts = documents(40, 0)
    tokenizer = train_tokenizer(texts, 150, convention="t5", byte_fallback=False)
    ids = {"pad": tokenizer.pad_id, "eos": [tokenizer.eos_id], "decoder_start": tokenizer.pad_id}
    base = lathe.preset("t5-small")
    sizes: dict[str, Any] = {**SIZES, "vocab_size": tokenizer.vocab_size, "tokens": {**base.tokens.to_dict(), **ids}}
    lathe.Model(base.with_(sizes), seed=0, tokenizer=tokenizer).save(tmp_path / "t5")
    rows = [json.dumps({"said": text, "meant": " ".join(reversed(text.split()))}) for text in texts]
    (tmp_path / "pairs.jsonl").write_text("\n".join(rows), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_decoder_is_shown_the_targets(here: Path):
    model = lathe.load("t5")
    tokenizer = model.tokenizer
    assert tokenizer is not None
    settings = TextSettings(file="pairs.jsonl", source="said", target="meant", prefix="lathe: ", length=64, rows=2)
    fitted, held = read_documents(settings, tokenizer, apart=True)
    assert (len(fitted.texts), len(held.texts)) == (36, 4)
    assert all(text.startswith("lathe: ") for text in fitted.texts)
    assert fitted.targets is not None
    shown = lay(fitted, settings, model.architecture, tokenizer)
    assert shown.objective is not None
    assert shown.objective.name == "seq2seq"
    (first,) = tokenizer.encode_batch([fitted.targets[0]], add_special_tokens=True)
    rows = [" ".join(map(str, row.tolist())) for batch in shown.batches for row in batch.inputs["labels"]]
    assert any(" ".join(map(str, first)) in row for row in rows)
    assert fitted.digest != Documents.of(fitted.texts).digest


def test_a_cut_and_a_healing_on_pairs_replay_to_the_same_bytes(cli: Callable, here: Path):
    heal = ["heal=pairs.jsonl", "heal.source=said", "heal.target=meant", "heal.steps=2", "heal.rows=2"]
    ran = cli("resize", "t5", "one", "d_model=12", *PAIRS, *heal, "--device", "cpu", "--json")
    assert ran.code == 0, ran.err
    assert json.loads(ran.out)["text"]["objective"] == "seq2seq"
    again = cli("resize", "t5", "two", "--recipe", "one", "--device", "cpu")
    assert again.code == 0, again.err
    assert Path("one/model.safetensors").read_bytes() == Path("two/model.safetensors").read_bytes()


def test_a_budget_is_spent_by_the_loss_on_the_targets(cli: Callable, here: Path):
    before = sum(each.numel() for each in lathe.load("t5").parameters())
    limit = int(0.7 * before)
    ran = cli("resize", "t5", "small", f"max_parameters={limit}", "budget.effort=1", "calibrate.tokens=400", *PAIRS)
    assert ran.code == 0, ran.err
    assert sum(each.numel() for each in lathe.load("small").parameters()) <= limit
    recipe = json.loads(Path("small/lathe.json").read_text(encoding="utf-8"))["recipe"]
    plan = recipe["budget"]
    assert plan["measured_on"].startswith("seq2seq loss on ")
    vocabularies = [trial for trial in plan["trials"] if "embedding.vocab_size" in trial["sizes"]]
    assert vocabularies
    assert all(trial["loss"] is not None for trial in plan["trials"])
    within = [trial["loss"] for trial in plan["trials"] if trial["cost"] <= limit]
    assert plan["loss"] == min(within) > 0


def test_a_probe_counts_the_tokens_of_the_targets(here: Path):
    model = lathe.load("t5")
    tokenizer = model.tokenizer
    assert tokenizer is not None
    settings = TextSettings(file="pairs.jsonl", source="said", target="meant", length=64, rows=2)
    fitted, held = read_documents(settings, tokenizer, apart=True)
    assert held.targets is not None
    count = sum(map(len, tokenizer.encode_batch(list(held.targets), add_special_tokens=False)))
    probe = TextProbe(model, tokenizer, fitted, held, settings, settings, tokens=100)
    assert f"{count:,} tokens" in probe.described
    assert not probe.is_whole()
    measured = quality(model, lay(held, settings, model.architecture, tokenizer))
    assert measured is not None
    assert probe.loss(model, tokenizer) == measured.loss
    # A tokenizer that can read nothing: each target's word counts as a guess among all of the source's tokens.
    blind = train_tokenizer(["zq qz zz qq"] * 9, 108, convention="t5", byte_fallback=False)
    assert probe.loss(model, blind) >= math.log(tokenizer.vocab_size)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ({"calibrate.source": "said"}, "pairs have both"),
        ({"calibrate.prefix": "a"}, "it stands before the source of a pair"),
        ({"calibrate.source": "said", "calibrate.target": "meant", "calibrate.field": "x"}, "a pair has no text"),
        ({"calibrate.source": "said", "calibrate.target": "none"}, "none"),
        ({"calibrate.source": "said", "calibrate.target": "meant", "objective": "denoising"}, "pairs are seq2seq"),
        ({"calibrate.field": "said", "objective": "seq2seq"}, "name the columns of pairs"),
    ],
)
def test_what_is_wrong_is_one_line(here: Path, words: dict[str, Any], line: str):
    with pytest.raises(RequestError, match=line) as raised:
        shown(words)
    assert "\n" not in str(raised.value)


def shown(words: dict[str, Any]) -> None:
    """Open a job and lay its text into rows."""
    job = open_job(read_request("t5", {"d_model": 12, "calibrate": "pairs.jsonl", **words}))
    assert job.fitted is not None
    assert job.request.calibrate is not None
    assert job.source.tokenizer is not None
    architecture, asked = job.source.model.architecture, job.request.objective
    lay(job.fitted, job.request.calibrate, architecture, job.source.tokenizer, asked)
