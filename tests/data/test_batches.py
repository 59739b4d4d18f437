"""Batches: packed rows mean what their documents mean alone, and the order can be taken up anywhere."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from lathe.architecture import Architecture
from lathe.data import Batch, Batches, Corpus
from lathe.errors import RequestError
from lathe.model.transformer import Transformer
from lathe.objectives import IGNORED, Causal, Denoising, Masked, Objective, SpanCorruption, SpecialTokens
from lathe.presets import preset

VOCAB = 64
SPECIAL = SpecialTokens(
    vocab_size=VOCAB, pad=0, eos=1, cls=2, sep=3, mask=4, sentinels=tuple(range(63, 53, -1)), decoder_start=0
)
SMALL = {"d_model": 16, "n_layers": 2, "n_heads": 2, "d_head": 8, "d_ff": 32, "vocab_size": VOCAB}
TOKENS = {"tokens.pad": 0, "tokens.eos": [1], "tokens.bos": None}


def corpus(n: int = 40, low: int = 3, high: int = 20) -> Corpus:
    rng = np.random.default_rng(0)
    return Corpus.of(VOCAB, text=[rng.integers(7, 50, size=size) for size in rng.integers(low, high, size=n)])


def shapes() -> dict[str, tuple[Architecture, Objective]]:
    return {
        "t5": (preset("t5-small").with_(**SMALL), SpanCorruption(special=SPECIAL)),
        "bert": (preset("bert-base-uncased", head="masked").with_(**SMALL, max_positions=32), Masked(special=SPECIAL)),
        "bart": (
            preset("bart-base").with_(TOKENS, **SMALL, max_positions=32),
            Denoising(special=SPECIAL, permute=False),
        ),
        "gpt2": (preset("gpt2").with_(TOKENS, **SMALL, max_positions=32), Causal(special=SPECIAL)),
        "llama": (preset("llama-2-7b").with_(TOKENS, **SMALL, n_kv_heads=1), Causal(special=SPECIAL)),
    }


def same(one: Batch, other: Batch) -> bool:
    return one.inputs.keys() == other.inputs.keys() and all(
        torch.equal(one.inputs[key], other.inputs[key]) for key in one.inputs
    )


@pytest.mark.parametrize("bos", [None, 5])
def test_a_document_of_several_pieces_ends_once(bos: int | None):
    special = SpecialTokens(vocab_size=VOCAB, pad=0, eos=1, bos=bos)
    lengths = (130, 9, 150, 31)
    several = Corpus.of(VOCAB, text=[np.arange(length) % 40 + 7 for length in lengths])
    made = Batches(several, Causal(special=special), length=32, rows=4)
    assert made.pieces.n_documents == len(lengths) < len(made.pieces)
    ids, labels = (torch.cat([b.inputs[key].flatten() for b in made.one_pass()]) for key in ("input_ids", "labels"))
    assert int((labels == 1).sum()) == len(lengths)
    assert int(((ids > 5) & (ids < 60)).sum()) == sum(lengths)  # and no token is lost
    assert int((ids == 5).sum()) == (0 if bos is None else len(made.pieces))


@pytest.mark.parametrize("shape", ["t5", "bert", "bart", "gpt2", "llama"])
def test_a_packed_row_gives_each_document_the_logits_that_it_has_alone(shape: str):
    architecture, objective = shapes()[shape]
    model = Transformer(architecture, seed=0).eval()
    packed = Batches(corpus(), objective, length=32, rows=3)
    packed.fit(architecture)
    batch = next(packed)
    assert int(batch.inputs["segment_ids"].max()) > 0, "nothing was packed: the test shows nothing"
    logits = model(**batch.inputs).logits
    side = "decoder_" if packed.two_sided else ""
    compared = 0
    for row, samples in enumerate([packed._samples(i) for i in range(3)]):
        for number, sample in enumerate(samples):
            single = packed._layout.batch([[sample]])
            alone = model(**single.inputs).logits[0, : len(sample.labels)]
            here = batch.inputs[f"{side}segment_ids"][row] == number
            torch.testing.assert_close(logits[row][here], alone, atol=1e-5, rtol=1e-4)
            compared += 1
    assert compared > 3


def test_a_packed_batch_has_the_loss_of_its_documents():
    architecture, objective = shapes()["gpt2"]
    model = Transformer(architecture, seed=0).eval()
    packed = Batches(corpus(), objective, length=32, rows=3)
    samples = [sample for i in range(3) for sample in packed._samples(i)]
    total = sum(
        float(model(**packed._layout.batch([[one]]).inputs).loss.detach()) * (len(one.labels) - 1) for one in samples
    )
    batch = next(packed)
    assert batch.targets == sum(len(one.labels) - 1 for one in samples)
    assert float(model(**batch.inputs).loss.detach()) == pytest.approx(total / batch.targets, rel=1e-5)


def test_the_decoder_starts_anew_in_each_document():
    batch = next(Batches(corpus(), shapes()["t5"][1], length=32, rows=2))
    segments, places = batch.inputs["decoder_segment_ids"], batch.inputs["decoder_position_ids"]
    first = (places == 0) & (segments >= 0)
    assert set(batch.inputs["decoder_input_ids"][first].tolist()) == {SPECIAL.decoder_start}
    inside = (places > 0) & (segments >= 0)
    before = batch.inputs["labels"].roll(1, dims=1)
    assert torch.equal(batch.inputs["decoder_input_ids"][inside], before[inside])


def test_the_counts_are_those_of_the_tensors():
    for architecture, objective in shapes().values():
        batch = next(Batches(corpus(), objective, length=32, rows=3))
        assert batch.targets == int((batch.inputs["labels"] != IGNORED).sum())
        real = int((batch.inputs["segment_ids"] >= 0).sum())
        if len(list(architecture.stacks)) == 2:
            real += int((batch.inputs["decoder_segment_ids"] >= 0).sum())
        assert batch.tokens == real


def test_an_epoch_shows_every_token_once_and_the_next_one_in_another_order():
    documents = corpus(30)
    batches = Batches(documents, Causal(special=SPECIAL), length=32, rows=1)
    epochs: list[list[int]] = []
    for _ in range(2):
        epoch, tokens = batches.epoch, []
        while batches.epoch == epoch and batches.row < len(batches._rows()):
            batch = next(batches)
            row = batch.inputs["input_ids"][0][batch.inputs["segment_ids"][0] >= 0]
            tokens += row[row != 1].tolist()
        epochs.append(tokens)
        batches.epoch, batches.row = batches.epoch + 1, 0
    flat = documents.fields["text"].flat.tolist()
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(flat)
    assert epochs[0] != epochs[1]


def test_a_saved_position_continues_with_what_would_have_come_next():
    objective = shapes()["t5"][1]
    batches = Batches(corpus(), objective, length=32, rows=2, seed=3)
    list(itertools.islice(batches, 9))
    state = batches.state_dict()
    wanted = list(itertools.islice(batches, 12))
    resumed = Batches(corpus(), objective, length=32, rows=2, seed=3)
    resumed.load_state_dict(state)
    assert all(same(a, b) for a, b in zip(wanted, itertools.islice(resumed, 12)))
    assert batches.epoch >= 2, "no epoch ended: the test shows nothing of it"


def test_a_position_in_other_data_is_refused():
    objective = shapes()["gpt2"][1]
    state = Batches(corpus(), objective, length=32, rows=2).state_dict()
    with pytest.raises(RequestError, match="in other data: documents was"):
        Batches(corpus(41), objective, length=32, rows=2).load_state_dict(state)
    with pytest.raises(RequestError, match="in other data: seed was 0 and is 1"):
        Batches(corpus(), objective, length=32, rows=2, seed=1).load_state_dict(state)


@pytest.mark.parametrize(("rows", "n_ranks"), [(4, 2), (5, 2), (3, 3), (7, 4)])
def test_ranks_share_a_batch_and_no_sample(rows, n_ranks):
    objective = shapes()["bert"][1]
    whole = Batches(corpus(), objective, length=32, rows=rows)
    ranks = [Batches(corpus(), objective, length=32, rows=rows, rank=r, n_ranks=n_ranks) for r in range(n_ranks)]
    for _ in range(12):
        wanted = next(whole)
        parts = [next(rank) for rank in ranks]
        ids = [row[row != 0].tolist() for part in parts for row in part.inputs["input_ids"]]
        assert ids == [row[row != 0].tolist() for row in wanted.inputs["input_ids"]]
        assert sum(part.targets for part in parts) == wanted.targets


def test_a_position_continues_on_another_number_of_ranks():
    objective = shapes()["bert"][1]
    one = Batches(corpus(), objective, length=32, rows=4)
    list(itertools.islice(one, 3))
    two = [Batches(corpus(), objective, length=32, rows=4, rank=r, n_ranks=2) for r in range(2)]
    for each in two:
        each.load_state_dict(one.state_dict())
    wanted = next(one)
    assert sum(next(each).targets for each in two) == wanted.targets


def test_fewer_rows_than_ranks_are_refused():
    objective = shapes()["bert"][1]
    with pytest.raises(RequestError, match="rows=2 in a batch for 3 ranks: expected one row for each"):
        Batches(corpus(), objective, length=32, rows=2, rank=0, n_ranks=3)


def test_one_pass_is_the_same_each_time_and_covers_the_corpus():
    batches = Batches(corpus(), shapes()["gpt2"][1], length=32, rows=4)
    first = batches.one_pass()
    next(batches)
    assert all(same(a, b) for a, b in zip(first, batches.one_pass(), strict=True))
    lengths = corpus().fields["text"].lengths
    assert sum(batch.tokens for batch in first) == lengths.sum() + len(lengths)
    assert len(batches.one_pass(2)) == 2


def test_full_rows_of_one_document_carry_no_segments():
    documents = Corpus.of(VOCAB, text=[np.arange(7, 7 + 31)] * 4)
    batch = next(Batches(documents, Causal(special=SPECIAL), length=32, rows=2))
    assert set(batch.inputs) == {"input_ids", "labels"}


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Corpus.of(VOCAB, text=[]), "no document"),
        (lambda: Corpus.of(VOCAB, text=[[5, 64]]), "token id 64 is outside the vocabulary of 64"),
        (lambda: Corpus.of(VOCAB, source=[[5]], target=[[5], [6]]), "different numbers of documents"),
        (
            lambda: Batches(Corpus.of(VOCAB, source=[[5, 6]]), Causal(special=SPECIAL), length=8, rows=1),
            "reads the field 'text'; the data has source",
        ),
        (
            lambda: Batches(Corpus.of(VOCAB, text=[[5]]), SpanCorruption(special=SPECIAL), length=8, rows=1),
            "no document has the 2 tokens",
        ),
        (lambda: Batches(corpus(), Masked(special=SPECIAL), length=2, rows=1), "length=2"),
        (lambda: Batches(corpus(), Masked(special=SPECIAL), length=8, rows=0), "rows=0"),
        (
            lambda: Batches(corpus(), SpanCorruption(special=SPECIAL), length=16, target_length=2, rows=1),
            "target_length=2: a sample takes",
        ),
    ],
)
def test_data_that_cannot_be_trained_on_gets_one_line(make, words: str):
    with pytest.raises(RequestError, match=words):
        make()


def test_rows_longer_than_the_models_positions_are_refused():
    architecture, objective = shapes()["gpt2"]
    with pytest.raises(RequestError, match="it has 32; give rows of at most 32 positions instead of 64"):
        Batches(corpus(4, 60, 70), objective, length=64, rows=1).fit(architecture)
