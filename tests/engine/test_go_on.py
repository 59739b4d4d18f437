"""Several steps in one call: the tokens, ends and caches of as many single ones."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lathe.engine import Engine, engine, native
from lathe.model.cache import Cache
from lathe.model.stack import Memory
from tests.generate.models import VOCABULARY, twins

pytestmark = pytest.mark.skipif(native.why_not() is not None, reason=str(native.why_not()))

PROMPT = torch.tensor([[0, 0, 7, 9, 11], [5, 6, 7, 8, 9], [0, 3, 3, 4, 30]])
MASK = torch.tensor([[0, 0, 1, 1, 1], [1] * 5, [0, 1, 1, 1, 1]])
FILLER = 1


class Started:
    """A model of a family with its prompt read; `tokens_B` are chosen and not read yet."""

    def __init__(self, name: str, slots: int = 40) -> None:
        model = twins(name)[1]
        self.engine = Engine(model)
        assert self.engine.native, self.engine.reason
        self.memory: Memory | None = None
        ids, mask = PROMPT, MASK
        if model.encoder is not None:
            self.memory = self.engine.encode(PROMPT, MASK)
            ids, mask = torch.zeros(3, 1, dtype=torch.long), torch.ones(3, 1, dtype=torch.long)
        self.cache = Cache(model.architecture, 3, slots)
        found = self.engine.choose(ids, mask, self.cache, self.memory)
        assert found is not None
        self.tokens_B = found[0]

    def single(self, steps: int) -> Tensor:
        """So many single steps' tokens, N × B, whatever ends a row."""
        taken = []
        for _ in range(steps):
            found = self.engine.choose(self.tokens_B[:, None], None, self.cache, self.memory)
            assert found is not None
            self.tokens_B = found[0]
            taken.append(self.tokens_B)
        return torch.stack(taken)

    def several(self, most: int, ends: list[int], ended: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
        """What one call takes."""
        found = self.engine.go_on(
            self.tokens_B,
            torch.tensor(ended),
            self.cache,
            self.memory,
            most=most,
            ends=torch.tensor(ends, dtype=torch.long),
            filler=FILLER,
        )
        assert found is not None
        self.tokens_B = found[0][-1]
        return found


@pytest.mark.parametrize("name", ["t5", "bart", "gpt2", "llama"])
def test_the_tokens_and_the_cache_are_those_of_single_steps(name: str) -> None:
    one, other = Started(name), Started(name)
    alone_NB = one.single(9)
    tokens_NB, log_probs_NB, ended_NB = other.several(5, [], [False] * 3)
    assert torch.equal(tokens_NB, alone_NB[:5])
    assert bool((log_probs_NB < 0).all())
    assert not bool(ended_NB.any())
    assert other.cache.lengths_B.tolist() == (one.cache.lengths_B - 4).tolist()
    assert torch.equal(other.several(4, [], [False] * 3)[0], alone_NB[5:])
    assert torch.equal(other.cache.lengths_B, one.cache.lengths_B)


def test_a_row_that_ends_goes_on_with_the_filler() -> None:
    alone_NB = Started("gpt2").single(6)
    end = int(alone_NB[2, 1])
    first = [next((n for n in range(6) if int(alone_NB[n, row]) == end), 5) for row in range(3)]
    tokens_NB, log_probs_NB, ended_NB = Started("gpt2").several(6, [VOCABULARY + 5, end], [False, False, True])
    assert ended_NB[:, 2].all()
    assert (tokens_NB[:, 2] == FILLER).all()
    assert (log_probs_NB[:, 2] == 0).all()
    for row in (0, 1):
        upto = min(first[row], len(tokens_NB) - 1) + 1
        assert torch.equal(tokens_NB[:upto, row], alone_NB[:upto, row])
        assert (tokens_NB[upto:, row] == FILLER).all()
        assert (log_probs_NB[upto:, row] == 0).all()


def test_it_stops_where_every_row_has_ended() -> None:
    alone_NB = Started("llama").single(6)
    ends = [int(token) for token in alone_NB[1]]
    started = Started("llama")
    tokens_NB, _, ended_NB = started.several(6, ends, [False] * 3)
    assert len(tokens_NB) <= 2
    assert bool(ended_NB[-1].all())
    assert started.cache.filled == int(started.cache.lengths_B.max())


def test_it_comes_back_when_its_time_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "STRETCH", 0)
    started = Started("gpt2")
    alone_NB = Started("gpt2").single(2)
    assert torch.equal(started.several(6, [], [False] * 3)[0], alone_NB[:1])
    assert torch.equal(started.several(6, [], [False] * 3)[0], alone_NB[1:])


def test_a_logit_that_is_no_number_is_said_in_the_last_step() -> None:
    started = Started("gpt2")
    with torch.no_grad():
        started.engine.model.embedding.tokens.weight[3, 0] = float("nan")
    tokens_NB, _, _ = started.several(6, [], [False] * 3)
    assert len(tokens_NB) == 1
    assert int(tokens_NB.min()) == -1
