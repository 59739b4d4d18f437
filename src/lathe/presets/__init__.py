"""Published models' architectures by name, as data.

Each JSON file beside this one holds one generation of a family: a `base` architecture, the heads that its
checkpoints are used with (and what else comes `with_head`), and each model as what it changes in the base. So
a file can be read against the paper's table that `source` names. A model that is `like` another is the same
architecture under a second name.

One checkpoint serves several heads: BERT is an encoder with a pooler, a masked language model, a
classifier. A preset is the natural one of them, and `head` picks another:

- encoders (`bert-*`, `albert-*`): `pooled`, which is what `AutoModel` loads; `masked`, `pretraining`
  (masked tokens and a two-way sentence label) and `classification`
- ELECTRA's discriminator: `replaced` (real or replaced, for each token), `masked`, `classification`
- everything that generates: `language`, `classification`
- all of them: `none`, the stacks alone (as a stock class, BERT and ALBERT always have their pooler)
"""

from __future__ import annotations

import difflib
import functools
import json
from pathlib import Path
from typing import Any

from lathe.architecture import Architecture
from lathe.errors import RequestError

DIRECTORY = Path(__file__).parent


def preset(name: str, head: str | None = None) -> Architecture:
    """The architecture of a published model.

    Args:
        name: one of `names()`.
        head: what is read off the model; None is the head that its checkpoint is known by.

    Raises:
        RequestError: an unknown name or head; the line holds what comes close.

    >>> preset("t5-small").encoder.n_layers
    6
    >>> preset("bert-base-uncased", head="masked").head.language.transform
    'gelu'
    """
    family, changes = _find(name)
    choices: dict[str, Any] = {**family["heads"], **changes.pop("heads", {})}
    wanted = family["head"] if head is None else head
    if wanted not in choices:
        raise RequestError(f"head={wanted!r}: {name} has the heads {', '.join(choices)}; choose one of them")
    base = Architecture.from_dict({**family["base"], "head": choices[wanted]})
    # A head can come with settings of its own: no dropout stands before BERT's sentence label.
    return base.with_({**changes, **family.get("with_head", {}).get(wanted, {})})


def names() -> list[str]:
    """Every preset's name, family by family."""
    return list(_models())


def heads(name: str) -> list[str]:
    """The heads that the preset `name` can have, its own first."""
    family, changes = _find(name)
    choices = {**family["heads"], **changes.get("heads", {})}
    return sorted(choices, key=lambda each: each != family["head"])


def _find(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The file's content that holds `name`, and what the model changes in its base."""
    models = _models()
    if name not in models:
        raise RequestError(_unknown(name, list(models)))
    family, changes = models[name]
    return _find(changes["like"]) if "like" in changes else (family, dict(changes))


@functools.cache
def _models() -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    found: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {}
    for path in sorted(DIRECTORY.glob("*.json")):
        family = json.loads(path.read_text(encoding="utf-8"))
        found |= {name: (family, changes) for name, changes in family["models"].items()}
    return found


def _unknown(given: str, known: list[str]) -> str:
    # Written as people write it: upper case, underscores, a hub's organisation in front.
    plain = given.lower().replace("_", "-").rsplit("/", 1)[-1]
    close = difflib.get_close_matches(plain, known, n=4, cutoff=0.5)
    if close:
        return f"unknown preset {given!r}: did you mean {' or '.join(close)}?"
    return f"unknown preset {given!r}: expected one of {', '.join(known)}"
