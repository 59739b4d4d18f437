"""Why a text came out as it did: each step's candidates, what every filter made of them, and what was chosen.

`Explanation` watches a decoding (`lathe.generate.text.complete(..., watch=explanation)`) and keeps plain data, which
`--json` gives as it is and `lines` lays out for a reader.

Shape suffixes: B rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lathe.generate.watch import Choice, Continuations
from lathe.text.tokenizer import Tokenizer


class Explanation:
    """Every step of a decoding, as it was seen.

    Args:
        tokenizer: names the tokens.
        top: how many of the likeliest tokens of a step are kept, beside the one that was chosen.

    `steps` holds one entry for each row and step, or for beams for each prompt, step and group.
    """

    def __init__(self, tokenizer: Tokenizer, top: int = 6) -> None:
        self.tokenizer, self.top = tokenizer, top
        self.steps: list[dict[str, Any]] = []

    def __call__(self, seen: Choice | Continuations) -> None:
        if isinstance(seen, Choice):
            self.steps += [self._choice(seen, row) for row in range(len(seen.chosen_B)) if not seen.over_B[row]]
        else:
            self.steps += [self._beams(seen, row) for row in range(len(seen.over_P)) if not seen.over_P[row]]

    def _choice(self, seen: Choice, row: int) -> dict[str, Any]:
        logits_V, chosen = seen.logits_BV[row], int(seen.chosen_B[row])
        stages = [(name, left_BV[row]) for name, left_BV in seen.stages]
        before_V = logits_V.softmax(-1)
        after = [(name, left_V, left_V.softmax(-1)) for name, left_V in stages]
        final_V = after[-1][2] if after else before_V
        # The likeliest before the filters and after them: a penalty may bring up others.
        likeliest = [each.topk(min(self.top, len(each))).indices.tolist() for each in (before_V, final_V)]
        tokens = dict.fromkeys([*likeliest[0], *(token for token in likeliest[1] if final_V[token]), chosen])
        candidates = [
            {
                "token": token,
                "piece": self._piece(token),
                "probability": float(before_V[token]),
                "after": {name: float(p_V[token]) for name, _, p_V in after},
                "fate": self._fate(token, chosen, after, seen.u_B is not None),
            }
            for token in sorted(tokens, key=lambda token: -float(before_V[token]))
        ]
        found: dict[str, Any] = {"row": row, "step": seen.step + 1, "chosen": chosen, "piece": self._piece(chosen)}
        if seen.u_B is not None:
            end = float(final_V.double().cumsum(0)[chosen])
            found["drawn"] = {"number": float(seen.u_B[row]), "from": end - float(final_V[chosen]), "to": end}
        return {**found, "left": int(final_V.count_nonzero()), "candidates": candidates}

    def _fate(self, token: int, chosen: int, after: Sequence[tuple[str, Tensor, Tensor]], sampled: bool) -> str:
        """Why a token was chosen or not."""
        if token == chosen:
            return "drawn" if sampled else "chosen: the likeliest left"
        out = next((name for name, left_V, _ in after if bool(left_V[token].isneginf())), None)
        if out is not None:
            return f"ruled out by {out}"
        return "not drawn" if sampled else "less likely"

    def _beams(self, seen: Continuations, row: int) -> dict[str, Any]:
        kept = {place: beam for beam, place in enumerate(seen.kept_PN[row].tolist())}
        candidates = []
        for place, score in enumerate(seen.scores_PK[row].tolist()):
            ids = seen.ids_PKT[row, place, : seen.step + 1].tolist()
            if score == -torch.inf:
                continue  # filled up where fewer tokens than places had any chance
            finished = bool(seen.finished_PK[row, place])
            candidates.append(
                {
                    "parent": int(seen.parents_PK[row, place]),
                    "before": self.tokenizer.decode(ids[:-1], False, errors="replace"),
                    "token": ids[-1],
                    "piece": self._piece(ids[-1]),
                    "log_prob": float(seen.log_probs_PK[row, place]),
                    "score": score,
                    "fate": "finished" if finished else f"kept as beam {kept[place]}" if place in kept else "dropped",
                }
            )
        return {"row": row, "step": seen.step + 1, "group": seen.group, "candidates": candidates}

    def _piece(self, token: int) -> str:
        """A token's own form; the model's table may have more rows than there are tokens."""
        return self.tokenizer.pieces([token])[0] if token < self.tokenizer.vocab_size else f"<{token}>"


def lines(steps: Sequence[dict[str, Any]]) -> Iterator[str]:
    """The steps as tables, a row's together."""
    for row in sorted({step["row"] for step in steps}):
        for step in (each for each in steps if each["row"] == row):
            yield from _beam_lines(step) if "group" in step else _choice_lines(step)
            yield ""


def _choice_lines(step: dict[str, Any]) -> Iterator[str]:
    names = list(step["candidates"][0]["after"])
    yield f"row {step['row']}, token {step['step']}: {step['piece']!r}, out of {step['left']:,} that were left" + (
        " (drawn: {number:.4f} is in {from:.4f} to {to:.4f})".format(**step["drawn"]) if "drawn" in step else ""
    )
    widths = [max(8, len(name)) for name in names]
    yield "  " + f"{'piece':<16}{'model':>8}" + "".join(f"  {name:>{width}}" for name, width in zip(names, widths))
    for each in step["candidates"]:
        cells = "".join(f"  {_share(each['after'][name]):>{width}}" for name, width in zip(names, widths))
        yield f"  {each['piece']!r:<16}{_share(each['probability']):>8}{cells}  {each['fate']}"


def _beam_lines(step: dict[str, Any]) -> Iterator[str]:
    yield f"row {step['row']}, token {step['step']}, group {step['group']}"
    parents = sorted({each["parent"] for each in step["candidates"]})
    for parent in parents:
        own = [each for each in step["candidates"] if each["parent"] == parent]
        yield f"  beam {parent} {own[0]['before']!r}"
        for place, each in enumerate(own):
            branch = "└─" if place == len(own) - 1 else "├─"
            sums = f"{each['log_prob']:>9.3f}  total {each['score']:>9.3f}"
            yield f"    {branch} {each['piece']!r:<16}{sums}  {each['fate']}"


def _share(p: float) -> str:
    return f"{100 * p:.2f} %" if p else "–"
