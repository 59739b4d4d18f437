"""What a resize is asked, as one record; `field=value` words become it.

    d_model=384 d_ff=1024            fields of the architecture
    calibrate=corpus.txt calibrate.tokens=100000 calibrate.field=document
    calibrate=pairs.jsonl calibrate.source=en calibrate.target=ko calibrate.prefix="translate: "
    data=held-out.txt heal=corpus.txt heal.steps=500 heal.lr=2e-3
    method=select refit=false objective=masked objective.rate=0.2 seed=1
    max_parameters=30M               a budget in place of sizes; also max_bytes=40MB, max_latency=12, budget.effort=3
    vocabulary=text.txt words=[a,b] multiple_of=64     which tokens, beside vocab_size=
    sharing=all share=mean remainder=8                 what layers share, and the rank of what they differ by

An unknown key is refused with the keys there are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lathe.architecture import Architecture
from lathe.errors import RequestError
from lathe.reshape.budget_cost import LIMIT_WORDS, BudgetSettings, read_budget
from lathe.reshape.heal import HealSettings
from lathe.reshape.resize import METHODS, check_how
from lathe.reshape.share import SHARE_METHODS
from lathe.reshape.text import TextSettings, VocabularySettings
from lathe.spec import Spec, choice, size

_TEXTS: dict[str, type[TextSettings | HealSettings | VocabularySettings]] = {
    "calibrate": TextSettings,
    "data": TextSettings,
    "heal": HealSettings,
    "vocabulary": VocabularySettings,
}
# Words that stand for a longer one.
_SHORT = {"words": "vocabulary.words", "multiple_of": "vocabulary.multiple_of"}
# How an operation is done, where there is a choice; `resize` and `planned` take each by its name.
HOW = ("method", "search", "refit", "share")
_PLAIN = (*HOW, "seed", "stream", "remainder")


@dataclass(frozen=True, kw_only=True)
class ResizeRequest(Spec):
    """What a resize is asked.

    Args:
        calibrate: the text that the cut is fitted on.
        method, search, refit, share: how a width is cut, in how many steps its basis is looked for, whether the rest is
            fitted to it, what shared layers start from.
        remainder: the rank at which is kept, in an adapter, what layers that come to share weights differ by.
        vocabulary: which tokens the model shall have.
        data: the text that it is measured on; where left out, a tenth of `calibrate` is kept apart for it.
        objective: what the model predicts: its name and settings; what its head says where left out.
        seed: of the weights that growth draws, and of the labels that a basis is looked for by.
        budget: what the result may cost at most; the sizes are then found, `changes` apart.
    """

    source: str
    changes: dict  # type: ignore[type-arg]
    method: str = choice(*METHODS, default="rotate")
    search: int | None = size(10_000, least=0, default=None)
    refit: bool | None = None
    share: str = choice(*SHARE_METHODS, default="mean")
    remainder: int | None = size(2**20, default=None)
    calibrate: TextSettings | None = None
    data: TextSettings | None = None
    heal: HealSettings | None = None
    vocabulary: VocabularySettings | None = None
    objective: dict = field(default_factory=dict)  # type: ignore[type-arg]
    seed: int = size(2**32 - 1, least=0, default=0)
    budget: BudgetSettings | None = None
    own_form: bool = False  # write what no stock file can hold
    stream: bool | None = None  # hold a layer at a time; None: where memory is short. The result is the same
    device: str = "auto"  # for healing; the cut itself is computed on the CPU

    @property
    def how(self) -> dict[str, Any]:
        """What stands in HOW, as keyword arguments."""
        return {name: getattr(self, name) for name in HOW}

    @property
    def streams(self) -> bool:
        """Whether it can be done without holding whole models in memory."""
        return self.remainder is None and (self.budget is None or self.budget.milliseconds is None)

    def check(self) -> None:
        check_how(self.method, self.search, self.refit)
        if self.budget is not None and self.calibrate is None:
            raise RequestError("a budget is spent by what cuts cost on text: give --calibrate FILE")
        if self.budget is not None and self.vocabulary is not None:
            raise RequestError(
                "a budget chooses the vocabulary's size by itself: leave vocabulary, words and multiple_of out, or the "
                "budget"
            )
        if self.stream and self.remainder is not None:
            raise RequestError(
                f"stream=true with remainder={self.remainder}: the adapter goes on a whole model in memory; leave out "
                "one of them"
            )
        if self.stream and self.budget is not None and self.budget.milliseconds is not None:
            raise RequestError(
                "stream=true with max_latency: a latency is timed on whole models in memory; give max_parameters or "
                "max_bytes"
            )
        if self.remainder is not None:
            self._check_remainder()

    def check_use(self, source: Architecture) -> None:
        """Refuse words on what is not done: how a width is cut, where none is, and what shared layers start from.

        A budget finds its sizes later, and may cut a width; it shares no layers.

        Raises:
            RequestError: with the words.
        """
        usual: dict[str, Any] = {"method": "rotate", "search": None, "refit": None}
        given = {name: getattr(self, name) for name in usual if getattr(self, name) != usual[name]}
        refuse_idle_share(self.share, self.changes)
        if not given or self.budget is not None:
            return
        target = source.with_(self.changes)
        widths = (source.d_model, target.d_model), (source.embedding.d_embed, target.embedding.d_embed)
        if any(old is not None and new is not None and new < old for old, new in widths):
            return
        words = " ".join(f"{name}={value}" for name, value in given.items())
        says = "this says" if len(given) == 1 else "these say"
        raise RequestError(
            f"{words}: {says} how a width is cut, and none is cut here; give a smaller d_model or d_embed, or leave "
            f"out {' and '.join(given)}"
        )

    def _check_remainder(self) -> None:
        """A remainder is what sharing loses; whatever else changes the layers would not be in it."""
        odd = next((name for name in self.changes if name.rpartition(".")[2] != "sharing"), None)
        if odd is not None or not self.changes or self.budget is not None or self.vocabulary is not None:
            others = {"a budget cuts more": self.budget, "the vocabulary changes": self.vocabulary}
            found = [f"{odd} changes"] if odd is not None else [why for why, each in others.items() if each is not None]
            what = found[0] if found else "nothing shares weights"
            raise RequestError(
                f"remainder={self.remainder}: it keeps what layers that come to share weights differ by, and here "
                f"{what}; give sharing=all and the like, alone"
            )
        for name in ("calibrate", "heal"):
            if getattr(self, name) is not None:
                raise RequestError(
                    f"remainder={self.remainder} with {name}: it is taken from the weights, and no text changes them; "
                    f"leave out {name}, and give --data FILE to measure on"
                )


def read_request(
    source: str, words: Mapping[str, Any], *, own_form: bool = False, device: str = "auto"
) -> ResizeRequest:
    """The record that words ask for; a word that is no key of the request is a field of the architecture.

    Args:
        words: dotted keys to values. `calibrate=FILE`, `data=FILE` and `heal=FILE` are short for `….file`, and
            `objective=NAME` for `objective.name`.

    Raises:
        RequestError: an unknown key, a value that cannot be, settings of a text that is not given.
    """
    values: dict[str, Any] = {}
    changes: dict[str, Any] = {}
    for word, value in words.items():
        key = _SHORT.get(word, word)
        if key == _SHORT["words"] and type(value) in (str, int):  # one word needs no brackets
            value = [str(value)]
        first, _, rest = key.partition(".")
        if first in _TEXTS:
            if (rest or "file") in values.setdefault(first, {}):
                raise RequestError(f"{word} is set twice, as {key} too; set it once")
            values[first][rest or "file"] = value
        elif first in ("objective", "budget") or key in LIMIT_WORDS:
            continue
        elif key in _PLAIN:
            values[key] = value
        else:
            changes[key] = value
    for name, kind in _TEXTS.items():
        if name not in values:
            continue
        needless = {"words", "multiple_of"} & set(values[name])
        if "file" not in values[name] and (not needless or set(values[name]) - needless):
            odd = next(key for key in values[name] if key not in needless)
            raise RequestError(f"{name}.{odd} is set and there is no text: give {name}=FILE")
        if "whole" in values[name] and name == "heal":
            raise RequestError("heal.whole: a recipe's stages have it, and it follows from heal.tokens; leave it out")
        values[name] = kind.from_dict(values[name], name)
    budget = read_budget(words)
    if not changes and budget is None and "vocabulary" not in values:
        raise RequestError("nothing to change: give field=value, as in d_model=384, or a budget")
    return ResizeRequest(
        source=source,
        changes=changes,
        objective=read_objective(words),
        budget=budget,
        own_form=own_form,
        device=device,
        **values,
    )


def read_text(name: str, words: Mapping[str, Any]) -> TextSettings | None:
    """The settings of one text among the words; None where there are none."""
    values = {key.partition(".")[2] or "file": v for key, v in words.items() if key.partition(".")[0] == name}
    if not values:
        return None
    if "file" not in values:
        raise RequestError(f"{name}.{next(iter(values))} is set and there is no text: give {name}=FILE")
    return TextSettings.from_dict(values, name)


def read_objective(words: Mapping[str, Any]) -> dict[str, Any]:
    """The objective's name and settings among the words; empty where there are none."""
    return {
        key.partition(".")[2] or "name": value for key, value in words.items() if key.partition(".")[0] == "objective"
    }


def refuse_idle_share(share: str, changes: Mapping[str, Any]) -> None:
    """Raise `RequestError` where it is said what shared layers start from and none come to share their weights."""
    shares = any(name == "family" or name.rpartition(".")[2] == "sharing" for name in changes)
    if share != "mean" and not shares:
        raise RequestError(
            f"share={share}: this says what layers that come to share weights start from, and none do here; "
            "give sharing=all and the like, or leave out share"
        )
