"""Recorded steps: the tokens, scores and errors of the modules, from a step whose every argument is fixed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import lathe
from lathe.engine.choose import reader
from lathe.engine.graphs import STRETCH, UNRECORDED, Graphs
from lathe.errors import LatheError
from lathe.generate import decode
from lathe.generate.decode import Decoded
from lathe.model.transformer import Transformer
from tests.generate.models import VOCABULARY, twins

FAMILIES = ["gpt2", "llama", "t5", "bart"]
PROMPT = torch.tensor([[0, 0, 7, 9, 11], [5, 6, 7, 8, 9], [0, 3, 3, 4, 30]])
MASK = torch.tensor([[0, 0, 1, 1, 1], [1] * 5, [0, 1, 1, 1, 1]])


class _Tape(TorchDispatchMode):
    """Notes each operation with its tensors, as a graph does: what Python would decide at a replay is not asked."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self.before: dict[int, tuple[Tensor, Tensor]] = {}  # what was written to that the step did not make
        self.made: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("the step asks for a number, which a GPU cannot answer while it is recorded")
        if func._schema.is_mutable and args[0].untyped_storage().data_ptr() not in self.made:
            self.before.setdefault(args[0].untyped_storage().data_ptr(), (args[0], _whole(args[0]).clone()))
        out = func(*args, **kwargs)
        if (
            isinstance(out, Tensor)
            and not func._schema.is_mutable
            and not any(r.alias_info for r in func._schema.returns)
        ):
            self.made.add(out.untyped_storage().data_ptr())
        self.calls.append((func, args, kwargs, out))
        return out

    def rewind(self) -> None:
        """Undo what was written: to record a step is not to take it."""
        for tensor, was in self.before.values():
            _whole(tensor).copy_(was)

    def replay(self) -> None:
        """Every operation again, on the tensors of the recording and on what came of them."""
        found: dict[int, Any] = {}

        def now(value: Any) -> Any:
            return found.get(id(value), value) if isinstance(value, Tensor) else value

        for func, args, kwargs, out in self.calls:
            again = func(*tree_map(now, args), **tree_map(now, kwargs))
            found.update({id(old): new for old, new in zip(tree_leaves(out), tree_leaves(again))})


def _whole(tensor: Tensor) -> Tensor:
    return torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())


class Recorder:
    """Records on the CPU what `torch.cuda.graph` records on a GPU; counts recordings and replays."""

    def __init__(self) -> None:
        self.recorded = self.replayed = 0

    def __call__(self, step: Callable[[], None]) -> Callable[[], None]:
        self.recorded += 1
        tape = _Tape()
        # A GPU's tensors are not looked at on the way; nor are a compiler's.
        with mock.patch("torch.compiler.is_compiling", return_value=True), tape:
            step()
        tape.rewind()

        def replay() -> None:
            self.replayed += 1
            tape.replay()

        return replay


def through(monkeypatch: pytest.MonkeyPatch, model: Transformer, recorder: Any, **settings: Any) -> Decoded:
    """What `decode` gives where the model is on a GPU."""
    monkeypatch.setattr("lathe.engine.graphs.LEAST_SLOTS", 8)
    monkeypatch.setattr(import_module("lathe.generate.decode"), "reader", lambda found, engine: Graphs(found, recorder))
    return decode(model, PROMPT, MASK, **settings)


def same(found: Decoded, wanted: Decoded) -> None:
    """Tokens, and what they are worth."""
    assert found.sequences_RT.tolist() == wanted.sequences_RT.tolist()
    torch.testing.assert_close(found.log_probs_RT, wanted.log_probs_RT)
    assert found.ended_R.tolist() == wanted.ended_R.tolist()


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(
    "settings",
    [
        {"max_new_tokens": 25, "eos_token_id": VOCABULARY - 1},
        {"max_new_tokens": 20, "do_sample": True, "seed": 3, "num_return_sequences": 2},
        {"max_new_tokens": 20, "num_beams": 3},
        {"max_new_tokens": 20, "repetition_penalty": 1.3},
        {"max_new_tokens": 2},
    ],
    ids=["greedy", "sampled", "beams", "penalty", "short"],
)
def test_recorded_steps_give_what_the_modules_give(
    monkeypatch: pytest.MonkeyPatch, name: str, settings: dict[str, Any]
) -> None:
    model, recorder = twins(name)[1], Recorder()
    wanted = decode(model, PROMPT, MASK, engine="torch", **settings)
    same(through(monkeypatch, model, recorder, **settings), wanted)
    longer = settings["max_new_tokens"] > UNRECORDED
    assert (recorder.replayed > recorder.recorded > 0) is longer
    if settings["max_new_tokens"] == 25:
        assert recorder.recorded == 3  # 8 slots, 16, and as many as there are


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_rows_that_end_are_filled_up(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    model, recorder = twins(name)[1], Recorder()
    free = decode(model, PROMPT, MASK, max_new_tokens=25, eos_token_id=VOCABULARY - 1, engine="torch")
    ends = [int(free.sequences_RT[row, free.n_prompt + 5 + 4 * row]) for row in range(3)]
    settings: dict[str, Any] = {"max_new_tokens": 25, "eos_token_id": ends, "pad_token_id": 2}
    wanted = decode(model, PROMPT, MASK, engine="torch", **settings)
    assert bool(wanted.ended_R.any())
    same(through(monkeypatch, model, recorder, **settings), wanted)


def test_a_quantised_model_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = lathe.preset("llama-2-7b").with_(
        d_model=32, d_ff=64, n_layers=2, n_heads=2, d_head=16, vocab_size=VOCABULARY
    )
    model, recorder = lathe.quantize(lathe.Model(tiny, seed=0), bits=8), Recorder()
    settings: dict[str, Any] = {"max_new_tokens": 24, "eos_token_id": VOCABULARY - 1}
    same(through(monkeypatch, model, recorder, **settings), decode(model, PROMPT, MASK, engine="torch", **settings))
    assert recorder.replayed > 0


def test_no_more_is_taken_at_once_than_the_stretch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A generation of any length looks at its tokens now and then, and stops where every row has ended."""
    model, recorder = twins("llama")[1], Recorder()
    free = decode(model, PROMPT[1:2], max_new_tokens=4, eos_token_id=VOCABULARY - 1, engine="torch")
    monkeypatch.setattr(import_module("lathe.generate.decode"), "reader", lambda found, engine: Graphs(found, recorder))
    found = decode(model, PROMPT[1:2], max_new_tokens=25, eos_token_id=int(free.sequences_RT[0, -1]))
    assert found.lengths_R.tolist() == [4]
    assert recorder.replayed <= STRETCH


def test_what_is_no_number_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    model = lathe.Model(twins("llama")[1].architecture, seed=0)
    assert model.decoder is not None
    weight = next(model.decoder.parameters())
    read = 0

    def record(step: Callable[[], None]) -> Callable[[], None]:
        def replay() -> None:
            nonlocal read
            read += 1
            if read == 3:
                weight.data[0] = float("nan")
            step()

        return replay

    with pytest.raises(LatheError, match="NaN"):
        through(monkeypatch, model, record, max_new_tokens=25, eos_token_id=VOCABULARY - 1)


def test_where_nothing_can_be_recorded_the_modules_compute(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(step: Callable[[], None]) -> Callable[[], None]:
        raise RuntimeError("operation not permitted when stream is capturing\nand more of it")

    model = twins("gpt2")[1]
    wanted = decode(model, PROMPT, MASK, max_new_tokens=12, engine="torch")
    with caplog.at_level(logging.WARNING, logger="lathe"):
        same(through(monkeypatch, model, refuse, max_new_tokens=12), wanted)
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.endswith("PyTorch's modules compute: operation not permitted when stream is capturing")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu(name: str, dtype: torch.dtype) -> None:
    model = lathe.Model(twins(name)[1].architecture, seed=0)
    model.to("cuda", dtype)
    assert isinstance(reader(model), Graphs)
    settings: dict[str, Any] = {"max_new_tokens": 25, "eos_token_id": VOCABULARY - 1}
    prompt, mask = PROMPT.cuda(), MASK.cuda()
    found, wanted = (decode(model, prompt, mask, engine=engine, **settings) for engine in ("auto", "torch"))
    assert found.sequences_RT.tolist() == wanted.sequences_RT.tolist()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_hook_is_not_recorded() -> None:
    model = lathe.Model(twins("llama")[1].architecture, seed=0)
    model.to("cuda")
    model.register_forward_hook(lambda *_: None)
    assert reader(model) is model
