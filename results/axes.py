"""What a cut of each other axis costs: feed-forward, heads, depth, factorised embeddings, shared layers.

    python results/axes.py bert --out axes-bert

Each cut is of the model that a run left, fitted on the run's training text; its validation perplexity over the
parent's, without healing and healed with 5% of the tokens that the parent was trained on, or with other shares of them
(`--heal 0.05,0.2`; `--heal ""` leaves that out); beside it, models of those sizes that were trained from nothing on as
many tokens (`--new 0.05,0.2`; 1 is the parent's whole budget). `--only sharing,d_embed` makes the cuts whose names
begin so. The table goes to stdout and to OUT.md; runs that were interrupted go on.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from anew import perplexity_anew
from parent import Ledger, Parent, copied, numbers, open_parent

import lathe
from lathe.reshape.heal import HealSettings, heal
from lathe.reshape.measure import parameters_of


def main() -> None:
    """Cut each axis, heal, and print the table."""
    given = _words()
    parent = open_parent(given.run, given.held_tokens)
    given.out.mkdir(parents=True, exist_ok=True)
    ledger = Ledger(given.out.with_suffix(".json"))
    fitted = [batch.inputs for batch in parent.sample(given.tokens)]
    whole = ledger.once("parent", parent.perplexity)
    budgets, news = ([round(part * parent.tokens) for part in parts if part] for parts in (given.heal, given.new))
    how = "".join(f", {name} {value}" for name in ("noise", "lr", "precision") if (value := getattr(given, name)))
    precision = f", precision {given.precision}" if given.precision else ""
    header = ["cut", "parameters", "unhealed", *(f"healed, {tokens:,} tokens" for tokens in budgets)]
    header += [f"from nothing, {tokens:,} tokens" for tokens in news]
    lines = [
        f"{parent}, perplexity {whole:.3f}.",
        "",
        f"| {' | '.join(header)} |",
        "|---|" + "---:|" * (len(header) - 1),
    ]
    cuts = {name: changes for name, changes in _cuts(parent.model).items() if name.startswith(tuple(given.only))}
    if not cuts:
        raise SystemExit(f"no cut begins with any of {given.only}: they are {list(_cuts(parent.model))}")
    for name, changes in cuts.items():
        cut = lathe.resize(parent.model, calibrate=fitted, own_form=True, **changes)
        cells = [name, f"{parameters_of(cut):,}"]
        cells.append(f"{ledger.once(name, parent.perplexity, cut) / whole:.3f}")
        for tokens in budgets:
            folder = given.out / _key(f"{name} {tokens}{how}")
            healed = ledger.once(f"{name}, healed {tokens}{how}", _healed, parent, cut, tokens, given, folder)
            cells.append(f"{healed / whole:.3f}")
        for tokens in news:
            new = ledger.once(
                f"{name}, new {tokens}{precision}",
                perplexity_anew,
                parent,
                changes,
                tokens,
                given.out,
                _key(f"{name}{precision}"),
                precision=given.precision,
            )
            cells.append(f"{new / whole:.3f}")
        lines.append(f"| {' | '.join(cells)} |")
        given.out.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(given.out.with_suffix(".md").read_text(encoding="utf-8"))


def _key(text: str) -> str:
    """A name that a directory can have."""
    return re.sub(r"[ =:,]+", "-", text)


def _cuts(model: lathe.Model) -> dict[str, dict[str, Any]]:
    """Names of cuts and what `lathe.resize` is asked for them; sizes follow from the parent's."""
    d_model, stack = model.architecture.d_model, next(iter(dict(model.architecture.stacks).values()))
    d_ff, heads, d_head = stack.feed_forward.d_ff, stack.attention.n_heads, stack.attention.d_head
    found: dict[str, dict[str, Any]] = {}
    for size in (round(d_ff * part) for part in (0.75, 0.5, 0.25)):
        found[f"d_ff={size}"] = {"d_ff": size}
    for size in sorted({heads - 1, -(-heads // 2)}, reverse=True):
        # Heads as wide as they are: where they have to fill the width, fewer of them would be wider and save nothing.
        found[f"n_heads={size} of {d_head}"] = {"n_heads": size, "d_head": d_head}
    found[f"n_layers={stack.n_layers - 1}"] = {"n_layers": stack.n_layers - 1}
    for size in (round(d_model * part) for part in (2 / 3, 1 / 2, 1 / 3)):
        found[f"d_embed={size}"] = {"d_embed": size}
    # As many equal groups as there can be; layers of a prime number have none but all in one.
    groups = max((n for n in range(2, stack.n_layers) if stack.n_layers % n == 0), default=None)
    for mode in ("all", "attention", "feed_forward", *([] if groups is None else [f"groups:{groups}"])):
        found[f"sharing={mode}"] = {"sharing": mode}
    return found


def _healed(parent: Parent, cut: lathe.Model, tokens: int, given: argparse.Namespace, folder: Path) -> float:
    model = copied(cut)  # the cut itself stays as it is
    how = {"lr": given.lr, "noise": given.noise, "precision": given.precision or "auto"}
    settings = HealSettings(file="the run's own", tokens=tokens, save_every=200, **how)
    heal(model, parent.model, parent.batches(), settings, folder)
    return parent.perplexity(model)


def _words() -> argparse.Namespace:
    words = argparse.ArgumentParser(description="The price of a cut on each axis.")
    words.add_argument("run", type=Path, help="a training run's directory")
    words.add_argument("--tokens", type=int, default=24_000, help="how much text the cuts are fitted on")
    words.add_argument("--held-tokens", type=int, default=20_000, help="how much text all is measured on")
    words.add_argument("--heal", type=numbers, default=[0.05], help="shares of the parent's training tokens")
    words.add_argument("--new", type=numbers, default=[], help="the same, of models from nothing")
    words.add_argument("--only", type=lambda text: text.split(","), default=[""], help="how names of cuts begin")
    words.add_argument("--lr", type=float, help="of the healing; where left out, what lathe heals with")
    words.add_argument("--noise", type=float, default=0.0, help="share of the tokens that are swapped while it heals")
    words.add_argument("--precision", choices=["fp32", "bf16"], help="of all training's matrix products")
    words.add_argument("--out", type=Path, required=True, help="where the runs, OUT.json and OUT.md are kept")
    return words.parse_args()


if __name__ == "__main__":
    main()
