"""What a budget limits: parameters, bytes of the checkpoint, or milliseconds.

Parameters and bytes follow from the architecture alone and are exact. Milliseconds are measured on the machine at
hand, because matrix operations say little of them: a small model waits for its layers, not for its products. A model
that generates is timed at one more token, one row with its key-value cache; an encoder alone at one row of text.
Weights make no difference to that, so an architecture is timed with drawn ones. It takes turns with the source, and the
ratio of their medians counts, in milliseconds of the source: what else the machine does falls on both.
"""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from lathe.architecture import Architecture
from lathe.blueprint import count, stored
from lathe.checkpoint.tensors import DEFAULT_SHARD_BYTES, split
from lathe.errors import RequestError
from lathe.families import holder
from lathe.families.adapter import to_disk
from lathe.model.cache import Cache
from lathe.model.transformer import Transformer
from lathe.planner.quantities import bytes_text, count_text, parse_count
from lathe.spec import Spec, size, unknown

_ROUNDS, _WARM_UP = 15, 2
_LENGTH = 128  # tokens that a timed model reads, where it has positions for as many
_BYTES = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


@dataclass(frozen=True, kw_only=True)
class BudgetSettings(Spec):
    """What a model may cost at most, and how hard to look for the best way there.

    Args:
        parameters, bytes, milliseconds: the limit; one of them.
        effort: each axis is measured at `effort` + 1 sizes, and 3 · `effort` plans are tried.
        tokens: of the calibration text that a trial is fitted on; the last few plans are fitted on all of it.
    """

    parameters: int | None = None
    bytes: int | None = None
    milliseconds: float | None = None
    effort: int = size(8, default=2)
    tokens: int = size(2**40, default=16_384)

    def check(self) -> None:
        given = {name: value for name in LIMITS if (value := getattr(self, name)) is not None}
        if len(given) != 1:
            raise RequestError(
                f"a budget limits one of {', '.join(LIMITS)}, and {' and '.join(given) or 'none'} was given; give one"
            )
        if self.limit <= 0:
            raise RequestError(f"{self.name}={self.limit:g}: expected more than 0")

    @property
    def name(self) -> str:
        """Which of the limits was given."""
        return next(name for name in LIMITS if getattr(self, name) is not None)

    @property
    def limit(self) -> float:
        """The limit, as a number."""
        return float(getattr(self, self.name))


LIMITS = ("parameters", "bytes", "milliseconds")


def read_bytes(text: str | int | float) -> int:
    """Read `40MB` (powers of 1,000), `40MiB` (of 1,024), or a number of bytes.

    Raises:
        RequestError: anything else.
    """
    written = str(text).strip().lower().replace(",", "").replace("_", "")
    number = written.rstrip("bgikm")
    unit = written[len(number) :].strip()
    try:
        value = float(number) * _BYTES[unit if len(unit) != 1 or unit == "b" else f"{unit}b"]
        if not 1 <= value <= 2**60:
            raise ValueError
    except (ValueError, KeyError):
        raise RequestError(f"max_bytes={text!r}: expected bytes such as 40MB, 1.5GiB or 40,000,000") from None
    return int(value)


# The words of a request that set a limit.
LIMIT_WORDS = ("max_parameters", "max_bytes", "max_latency")


def read_budget(words: Mapping[str, Any]) -> BudgetSettings | None:
    """The budget among words: a limit as people write it (`max_parameters=30M`, `max_bytes=40MB`, `max_latency=12`,
    which is milliseconds), `budget.effort` and `budget.tokens`. None where there is none.

    Raises:
        RequestError: a limit that cannot be read, more than one, or settings without a limit.
    """
    values = {key.partition(".")[2]: value for key, value in words.items() if key.partition(".")[0] == "budget"}
    limits = {key: words[key] for key in LIMIT_WORDS if words.get(key) is not None}
    if len(limits) > 1:
        raise RequestError(f"{' and '.join(limits)} are two budgets: give one")
    unknown_keys = [key for key in values if key not in ("effort", "tokens")]
    if unknown_keys:
        raise RequestError(unknown("field", f"budget.{unknown_keys[0]}", ("effort", "tokens")))
    if not limits:
        if values:
            raise RequestError(f"budget.{next(iter(values))} is set and there is no budget: give {LIMIT_WORDS[0]}=30M")
        return None
    if "max_parameters" in limits:
        values["parameters"] = parse_count(limits["max_parameters"], "max_parameters")
    if "max_bytes" in limits:
        values["bytes"] = read_bytes(limits["max_bytes"])
    if "max_latency" in limits:
        if isinstance(limits["max_latency"], int | float) and limits["max_latency"] <= 0:
            raise RequestError(f"max_latency={limits['max_latency']:g}: expected more than 0 milliseconds")
        values["milliseconds"] = limits["max_latency"]
    return BudgetSettings.from_dict(values, "budget")


class Cost(Protocol):
    """How much of what is limited an architecture takes."""

    unit: str
    measured: str  # what was timed and where; empty where nothing is

    def of(self, architecture: Architecture) -> float:
        """How much it takes."""
        ...

    def text(self, value: float) -> str:
        """A number of it, as people write it."""
        ...


class ParameterCost:
    """Trained numbers, tied and shared ones counted once."""

    unit, measured = "parameters", ""

    def of(self, architecture: Architecture) -> float:
        """How many the architecture has."""
        return float(count(architecture))

    def text(self, value: float) -> str:
        """As 30.1M."""
        return count_text(value)


class ByteCost:
    """Bytes of the safetensors files that a checkpoint is written as, their headers included.

    Args:
        shard_bytes: the size past which the result will be split, as the source is.
    """

    unit, measured = "bytes", ""

    def __init__(self, dtype: torch.dtype, shard_bytes: int = DEFAULT_SHARD_BYTES) -> None:
        self._shard_bytes = shard_bytes
        self._itemsize = torch.empty(0, dtype=dtype).element_size()
        self._named = "BF16" if dtype == torch.bfloat16 else f"F{8 * self._itemsize}"  # in the file's header

    def of(self, architecture: Architecture) -> float:
        """The size of the files."""
        family = holder(architecture)
        if family is None:
            shapes = [(p.name, p.shape) for p in stored(architecture)]
        else:
            shapes = [(name, shape) for name, shape, _ in to_disk(family, architecture)]
        sizes = {name: (torch.Size(shape), self._itemsize * torch.Size(shape).numel()) for name, shape in shapes}
        files = split({name: nbytes for name, (_, nbytes) in sizes.items()}, self._shard_bytes)
        return float(sum(self._file({name: sizes[name] for name in names}) for names in files))

    def _file(self, tensors: Mapping[str, tuple[torch.Size, int]]) -> int:
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name, (shape, nbytes) in sorted(tensors.items()):
            header[name] = {"dtype": self._named, "shape": list(shape), "data_offsets": [offset, offset + nbytes]}
            offset += nbytes
        length = len(json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode())
        return 8 + length + -length % 8 + offset

    def text(self, value: float) -> str:
        """As 38.2 MiB."""
        return bytes_text(value)


class LatencyCost:
    """Milliseconds, measured once for each architecture.

    Args:
        device, dtype: where and in which numbers.
    """

    unit = "milliseconds"

    def __init__(self, source: Architecture, device: torch.device, dtype: torch.dtype) -> None:
        self._device, self._dtype = device, dtype
        self._known: dict[str, float] = {}
        limits = [stack.positions.limit for _, stack in source.stacks]
        room = [limit - _ROUNDS - _WARM_UP for limit in limits if limit is not None]  # every run adds a token
        self._length = max(1, min([_LENGTH, *room]))
        what = "one row of" if source.decoder is None else "one more token after"
        self._source, self._base = source, 0.0  # milliseconds, once it was timed
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or device.type
        self.measured = (
            f"{what} {self._length} tokens, {str(dtype).removeprefix('torch.')}, on {name} with "
            f"{torch.get_num_threads()} threads, in turns with the source, medians of {_ROUNDS} runs"
        )

    def of(self, architecture: Architecture) -> float:
        """Its median over the source's, in the source's milliseconds."""
        key = architecture.to_json()
        if key not in self._known:
            self._known[key] = self._timed(architecture)
        return self._known[key]

    def text(self, value: float) -> str:
        """As 12.3 ms."""
        return f"{value:.3g} ms"

    def _timed(self, architecture: Architecture) -> float:
        with torch.no_grad():
            runs = [self._prepared(each) for each in (self._source, architecture)]
            seconds: tuple[list[float], list[float]] = ([], [])
            for turn in range(_ROUNDS + _WARM_UP):
                for run, noted in zip(runs, seconds, strict=True):
                    self._wait()
                    started = time.perf_counter()
                    run()
                    self._wait()
                    if turn >= _WARM_UP:
                        noted.append(time.perf_counter() - started)
        of_source, own = map(statistics.median, seconds)
        self._base = self._base or 1000 * of_source
        return self._base if architecture == self._source else self._base * own / of_source

    def _prepared(self, architecture: Architecture) -> Callable[[], object]:
        """What is timed, with all that stands before it done."""
        model = Transformer(architecture, seed=0).to(self._device, self._dtype).eval()
        ids = torch.zeros((1, self._length), dtype=torch.long, device=self._device)
        if architecture.tokens.eos:  # a pooler may look for it
            ids[:, -1] = architecture.tokens.eos[0]
        one = ids[:, :1]
        if architecture.decoder is None:
            return lambda: model(input_ids=ids)
        slots = self._length + _ROUNDS + _WARM_UP
        cache = Cache(architecture, 1, slots, dtype=self._dtype, device=self._device)
        if architecture.encoder is None:
            model(input_ids=ids, past_key_values=cache, logits_to_keep=1)
            return lambda: model(input_ids=one, past_key_values=cache)
        memory = model.encode(ids)
        model(decoder_input_ids=ids, encoder_outputs=memory, past_key_values=cache, logits_to_keep=1)
        return lambda: model(decoder_input_ids=one, encoder_outputs=memory, past_key_values=cache)

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def cost_of(
    settings: BudgetSettings,
    source: Architecture,
    device: torch.device,
    dtype: torch.dtype,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> Cost:
    """What the settings limit."""
    if settings.name == "parameters":
        return ParameterCost()
    return ByteCost(dtype, shard_bytes) if settings.name == "bytes" else LatencyCost(source, device, dtype)
