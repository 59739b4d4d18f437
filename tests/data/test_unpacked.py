"""Batches of whole rows: sentence pairs, labelled texts and pairs to translate, into the model."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from lathe.data import Batch, Batches, Corpus
from lathe.errors import RequestError
from lathe.model.transformer import Transformer
from lathe.objectives import Classification, Denoising, NextSentence, SentenceOrder, Seq2Seq, SpecialTokens
from lathe.presets import preset
from lathe.train import objective_loss

VOCAB = 64
SPECIAL = SpecialTokens(
    vocab_size=VOCAB, pad=0, bos=5, eos=1, cls=2, sep=3, mask=4, decoder_start=1, front=(2,), middle=(3,), back=(3,)
)
SMALL = {"d_model": 16, "n_layers": 2, "n_heads": 2, "d_head": 8, "d_ff": 32, "vocab_size": VOCAB}
RNG = np.random.default_rng(0)
SIZES = RNG.integers(6, 20, size=30)


def corpus(n: int = 30, labels: int = 2) -> Corpus:
    """Each document repeats tokens of its own, so that what comes from another one is seen."""
    return Corpus.of(
        VOCAB,
        text=[np.full(size, 10 + i) for i, size in enumerate(SIZES[:n])],
        breaks=[[3, 5] for _ in range(n)],
        labels=np.arange(n) % labels,
    )


def same(one: Batch, other: Batch) -> bool:
    return one.inputs.keys() == other.inputs.keys() and all(
        torch.equal(one.inputs[key], other.inputs[key]) for key in one.inputs
    )


def batches(rows: int = 4, **changes) -> Batches:
    return Batches(corpus(), NextSentence(special=SPECIAL, masked=0.0, random=0.0), length=32, rows=rows, **changes)


def test_the_other_document_is_another_one_and_follows_from_the_seed():
    labels, others = [], set()
    for batch in itertools.islice(batches(), 20):
        for ids, label in zip(batch.inputs["input_ids"].tolist(), batch.inputs["next_sentence_label"].tolist()):
            texts = [token for token in dict.fromkeys(ids) if token >= 10]
            assert len(texts) == (2 if label else 1)
            labels.append(label)
            others |= set(texts[1:])
    assert 0.3 < np.mean(labels) < 0.7
    assert len(others) > 10
    assert all(same(a, b) for a, b in zip(itertools.islice(batches(), 9), itertools.islice(batches(), 9)))
    assert not same(next(batches()), next(batches(seed=1)))


def test_the_draw_of_another_document_leaves_none_out():
    made = Batches(
        Corpus.of(VOCAB, text=[[10] * 50, [11] * 50, [12] * 50], breaks=[[20]] * 3),
        NextSentence(special=SPECIAL),
        length=16,
        rows=1,
    )
    for piece in range(len(made.pieces)):
        drawn = {made._elsewhere(piece, np.random.default_rng(seed)) for seed in range(200)}
        mine = made.pieces.document == made.pieces.document[piece]
        assert drawn == set(np.flatnonzero(~mine).tolist())


def test_breaks_are_those_of_the_piece():
    made = Batches(
        Corpus.of(VOCAB, text=[np.arange(10, 50)], breaks=[[5, 13, 14, 26, 30, 40]]),
        Denoising(special=SPECIAL),
        length=15,
        rows=1,
    )
    assert [made._stretch(i)["breaks"].tolist() for i in range(4)] == [[5], [1], [4], []]


def test_a_saved_position_of_buckets_continues_on_other_ranks_of_as_many_rows():
    one = batches(4)
    list(itertools.islice(one, 17))
    two = [batches(4, rank=r, n_ranks=2) for r in range(2)]
    for each in two:
        each.load_state_dict(one.state_dict())
    for _ in range(10):
        wanted = next(one).inputs["input_ids"]
        ids = [row[row != 0].tolist() for each in two for row in next(each).inputs["input_ids"]]
        assert ids == [row[row != 0].tolist() for row in wanted]
    assert one.epoch >= 3, "no epoch ended: the test shows nothing of it"
    with pytest.raises(RequestError, match="rows was 4 and is 6"):
        batches(6).load_state_dict(one.state_dict())


@pytest.mark.parametrize("objective", [NextSentence, SentenceOrder])
def test_a_model_learns_from_sentence_pairs_as_from_each_alone(objective):
    architecture = preset("bert-base-uncased", head="pretraining").with_(**SMALL, max_positions=32)
    model = Transformer(architecture, seed=0).eval()
    made = Batches(corpus(), objective(special=SPECIAL), length=32, rows=3)
    made.fit(architecture)
    batch = next(made)
    output = model(**batch.inputs)
    for row, sample in enumerate(itertools.chain.from_iterable(made._samples(i) for i in range(3))):
        alone = model(**made._layout.batch([[sample]]).inputs)
        torch.testing.assert_close(output.seq_relationship_logits[row], alone.seq_relationship_logits[0])
    loss, n = objective_loss(model, batch)
    torch.testing.assert_close(loss, output.loss)
    assert n == batch.targets


SHAPES = {
    "bert": preset("bert-base-uncased", head="classification"),
    "gpt2": preset("gpt2", head="classification").with_({"tokens.pad": 0, "tokens.eos": [1], "tokens.bos": None}),
    "bart": preset("bart-base", head="classification").with_(
        {"tokens.pad": 0, "tokens.eos": [3], "tokens.bos": 2, "tokens.decoder_start": 3}
    ),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_labelled_texts_of_several_lengths_have_the_logits_of_each_alone(shape: str):
    architecture = SHAPES[shape].with_(**SMALL, max_positions=32, n_labels=2)
    model = Transformer(architecture, seed=0).eval()
    made = Batches(corpus(), Classification(special=SPECIAL, n_labels=2), length=32, rows=30)
    made.fit(architecture)
    batch = next(made)
    assert (batch.inputs["attention_mask"] == 0).any(), "nothing was padded: the test shows nothing"
    assert batch.targets == 30
    assert batch.tokens == int(batch.inputs["attention_mask"].sum())
    logits = model(**batch.inputs).logits
    for row in range(30):
        sample = made._samples(row)[0]
        alone = model(**made._layout.batch([[sample]]).inputs).logits[0]
        torch.testing.assert_close(logits[row], alone, atol=1e-5, rtol=1e-4)
        assert int(batch.inputs["labels"][row]) == sample.numbers["labels"]
    loss, n = objective_loss(model, batch)
    assert n == 30
    assert torch.isfinite(loss)


def test_evaluation_keeps_the_order_of_the_data():
    made = Batches(corpus(), Classification(special=SPECIAL, n_labels=2), length=32, rows=4)
    firsts = [int(row[1]) for batch in made.one_pass() for row in batch.inputs["input_ids"]]
    assert firsts == list(range(10, 40))


def test_pairs_to_translate_are_packed():
    data = Corpus.of(VOCAB, source=[[10, 11]] * 9, target=[[20]] * 9)
    batch = next(Batches(data, Seq2Seq(special=SPECIAL), length=12, rows=1))
    assert batch.inputs["input_ids"][0].tolist() == [5, 10, 11, 1] * 3
    assert batch.inputs["labels"][0][:9].tolist() == [5, 20, 1] * 3
    assert batch.inputs["decoder_input_ids"][0][:9].tolist() == [1, 5, 20] * 3


UNLABELLED = Corpus.of(VOCAB, text=[[9]])
EMPTY_SOURCE = Corpus.of(VOCAB, source=[[9], []], target=[[9], [9]])


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda: Batches(corpus(1), NextSentence(special=SPECIAL), length=64, rows=1),
            "takes text from other documents and the data has one",
        ),
        (
            lambda: Batches(Corpus.of(VOCAB, text=[[9] * 9]), SentenceOrder(special=SPECIAL), length=16, rows=1),
            "reads the field 'breaks'; the data has text; tokenise it with breaks",
        ),
        (
            lambda: Batches(corpus(labels=3), Classification(special=SPECIAL, n_labels=2), length=32, rows=1),
            "record 3: label 2 is out of range; expected 0 to 1",
        ),
        (
            lambda: Batches(corpus(), Classification(special=SPECIAL, n_labels=2), length=16, rows=1),
            "takes .* positions and a row has 16; give longer rows, or shorten",
        ),
        (
            lambda: Batches(UNLABELLED, Classification(special=SPECIAL, n_labels=2), length=8, rows=1),
            "reads the field 'label'",
        ),
        (
            lambda: Batches(EMPTY_SOURCE, Seq2Seq(special=SPECIAL), length=8, rows=1),
            "record 2: the source is empty",
        ),
        (lambda: Corpus.of(VOCAB, text=[[9]], labels=[0, 1]), "different numbers of documents"),
    ],
)
def test_data_that_cannot_be_trained_on_gets_one_line(make, words: str):
    with pytest.raises(RequestError, match=words):
        make()
