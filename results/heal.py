"""Cut and healed, beside trained from nothing: validation perplexity over the parent's.

    python results/heal.py bert --out heal-bert

The model that a run left is cut (rotate + refit) and healed with 5 and 20% of the tokens that it was trained on, from
the same text. Beside it stand models of the cut's size that were trained from nothing, with the run's own settings:
one on as many tokens as each healing took, and one on the parent's whole budget (`--whole`). Every training is a run
in OUT, which goes on where it was interrupted; the table goes to stdout and to OUT.md. Any other sizes get a row each:

    python results/heal.py t5 --shares "" --sizes d_ff=352,d_model=136 --noise 0.3 --out heal-t5-plan
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from anew import Sizes, perplexity_anew
from parent import Ledger, Parent, copied, numbers, open_parent, width

import lathe
from lathe.data.batch import Batch
from lathe.reshape.heal import HealSettings, heal
from lathe.reshape.measure import parameters_of


def main() -> None:
    """Cut, heal, train, and print the table."""
    given = _words()
    parent = open_parent(given.run, given.held_tokens)
    given.out.mkdir(parents=True, exist_ok=True)
    ledger = Ledger(given.out.with_suffix(".json"))
    fitted = parent.sample(given.tokens)
    whole = ledger.once("parent", parent.perplexity)
    budgets = {f"{100 * part:g} %": round(part * parent.tokens) for part in given.heal}
    header = ["sizes", "parameters", "cut", *(f"healed, {name}" for name in budgets)]
    header += [f"from nothing, {name}" for name in budgets] + (["from nothing, all"] if given.whole else [])
    rows = []
    for label, sizes in _asked_sizes(parent, given):
        cut, key = _cut(parent, sizes, fitted), _key(sizes)
        found = [ledger.once(f"{key} cut", parent.perplexity, cut)]
        for tokens in budgets.values():
            folder = given.out / f"{key}-healed-{tokens}"
            found.append(ledger.once(f"{key} healed {tokens}", _healed, parent, cut, tokens, given, folder))
        for tokens in [*budgets.values(), *([parent.tokens] if given.whole else [])]:
            found.append(ledger.once(f"{key} new {tokens}", perplexity_anew, parent, sizes, tokens, given.out, key))
        cells = [label, f"{parameters_of(cut):,}", *(f"{each / whole:.3f}" for each in found)]
        rows.append(f"| {' | '.join(cells)} |")
        tokens_of = ", ".join(f"{name} are {tokens:,} tokens" for name, tokens in budgets.items())
        lines = [
            f"{parent}, perplexity {whole:.3f}; {tokens_of}.",
            "",
            f"| {' | '.join(header)} |",
            "|---|" + "---:|" * (len(header) - 1),
            *rows,
        ]
        given.out.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(given.out.with_suffix(".md").read_text(encoding="utf-8"))


def _asked_sizes(parent: Parent, given: argparse.Namespace) -> Iterator[tuple[str, Sizes]]:
    """A name and the sizes of each row."""
    for share in given.shares:
        size = width(parent.model, share)
        yield f"{100 * share:g} % ({size})", {"d_model": size}
    for text in given.sizes:
        yield text.replace(",", ", "), {name: int(size) for name, size in (each.split("=") for each in text.split(","))}


def _key(sizes: Sizes) -> str:
    """What the runs and numbers of some sizes are kept under."""
    return "-".join(str(size) if name == "d_model" else f"{name}-{size}" for name, size in sizes.items())


def _cut(parent: Parent, sizes: Sizes, fitted: list[Batch]) -> lathe.Model:
    return lathe.resize(parent.model, calibrate=[batch.inputs for batch in fitted], own_form=True, **sizes)


def _healed(parent: Parent, cut: lathe.Model, tokens: int, given: argparse.Namespace, folder: Path) -> float:
    model = copied(cut)  # the cut itself stays as it is
    how = {"optimizer": given.optimizer, "lr": given.lr, "weight": given.weight, "noise": given.noise}
    settings = HealSettings(file="the run's own", tokens=tokens, save_every=200, **how)
    heal(model, parent.model, parent.batches(), settings, folder)
    return parent.perplexity(model)


def _words() -> argparse.Namespace:
    words = argparse.ArgumentParser(description="Cut and healed, beside trained from nothing.")
    words.add_argument("run", type=Path, help="a training run's directory")
    words.add_argument("--tokens", type=int, default=24_000, help="how much text the cuts are fitted on")
    words.add_argument("--held-tokens", type=int, default=20_000, help="how much text all is measured on")
    words.add_argument("--shares", type=numbers, default=[0.75, 0.5])
    words.add_argument("--sizes", nargs="*", default=[], help="other sizes, as d_ff=352,d_model=136")
    words.add_argument("--heal", type=numbers, default=[0.05, 0.2], help="shares of the parent's training tokens")
    words.add_argument("--optimizer", default="adafactor", help="of the healing: adafactor or adamw")
    words.add_argument("--lr", type=float, help="of the healing; where left out, what lathe heals with")
    words.add_argument("--weight", type=float, default=1.0, help="the parent's share of the healing's loss")
    words.add_argument("--noise", type=float, default=0.0, help="share of the tokens that are swapped while it heals")
    words.add_argument("--whole", action="store_true", help="also train each size on the parent's whole budget")
    words.add_argument("--out", type=Path, required=True, help="where the runs, OUT.json and OUT.md are kept")
    return words.parse_args()


if __name__ == "__main__":
    main()
