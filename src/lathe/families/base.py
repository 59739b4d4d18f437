"""What a family declares: how its config and its tensor names correspond to Lathe's.

A family is data, not code that runs a model. It says
- which Hugging Face classes it has and which head each one puts on (`heads`);
- how a `config.json` becomes an `Architecture` and back (`read`, `write`);
- which tensor on disk holds which parameters (`entries`), one `Entry` each: the same tensor under another
  name, transposed (GPT-2's Conv1D), or several parameters fused into one (GPT-2's c_attn).

`lathe.families.adapter` does the rest, in both directions, for every family. Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from lathe.architecture import Architecture
from lathe.errors import RequestError

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Entry:
    """One tensor on disk and the parameters that it holds.

    Args:
        theirs: its name in Hugging Face's file.
        ours: the parameters it holds, concatenated along their first axis; usually one.
        transposed: whether it is stored `in × out`.
        row: whether a vector is stored as a 1 × n matrix.
        copies: other names under which the same tensor may be stored as well. They are compared with it and
            are not written.
        again: such names that are written too, because the stock class reads the tensor there once more.
        shadows: names that are written too and count only where the tensor's own name is missing: another release
            reads it there. Where both are stored they may differ.
    """

    theirs: str
    ours: tuple[str, ...]
    transposed: bool = False
    row: bool = False
    copies: tuple[str, ...] = ()
    again: tuple[str, ...] = ()
    shadows: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """Every name under which the tensor may be found, its own first."""
        return (self.theirs, *self.again, *self.copies, *self.shadows)

    @property
    def written(self) -> tuple[str, ...]:
        """Every name under which the tensor is written."""
        return (self.theirs, *self.again, *self.shadows)


@dataclass(frozen=True)
class Objection:
    """Why a family cannot hold an architecture, and what would make it fit.

    Args:
        reason: one clause, such as "n_heads · d_head is 768 and d_model is 512".
        changes: fields for `Architecture.with_` that remove the objection; empty where none would. Several
            objections' changes are made together, in one call: one without the other may be no architecture.
    """

    reason: str
    changes: Mapping[str, Any]


@dataclass(frozen=True)
class Family:
    """One Hugging Face model type.

    Args:
        name: its `model_type`.
        read: `(config, class name) -> Architecture`; raises `RequestError` for a setting that Lathe's
            transformer does not have, naming it.
        write: `architecture -> config` with every key that the stock class needs, `model_type` and
            `architectures` among them. Called only where `objections` is empty.
        entries: every tensor of `architecture`'s file. The parameters they hold are exactly the blueprint's.
        objections: why the family cannot hold an architecture; nothing where it can.
        classes: the class names that can stand in `architectures`, the one read when a config names none first.
        prefix: what stock classes with a head put before the body's tensors ("bert."). Files with and without it
            are read, whatever the class; the one that the class itself uses is written.
        other_heads: `fnmatch` patterns of tensors that belong to another head of the family. A file may hold them
            beside the head its config names (bert-base-uncased does); they are left out and the reader lists them.
        ignored: `fnmatch` patterns of stored tensors that hold nothing trained (buffers, old copies).
        renamed: regular expressions and replacements for names of older files, applied before `entries`.
        opens_packed: whether the stock classes open weights that are packed codes; some look at the `weight` of their
            layers while they load, and packed ones have none.
        stale: keys that say again, under another name, what `write` writes; of a config that a model came with they
            are not kept, because stock classes would take the old value.
    """

    name: str
    read: Callable[[Config, str], Architecture]
    write: Callable[[Architecture], dict[str, Any]]
    entries: Callable[[Architecture], Iterable[Entry]]
    objections: Callable[[Architecture], list[Objection]]
    classes: tuple[str, ...]
    prefix: str = ""
    other_heads: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    renamed: tuple[tuple[str, str], ...] = ()
    opens_packed: bool = True
    stale: tuple[str, ...] = ()


# Hugging Face's names of activation functions and ours. Names that compute the same are written as the first.
ACTIVATIONS: dict[str, str] = {
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python": "gelu",
    "quick_gelu": "quick_gelu",
    "silu": "silu",
    "swish": "silu",
    "tanh": "tanh",
}


def activation_from(name: str, key: str) -> str:
    """Lathe's name of a Hugging Face activation; `key` is the config key that held it."""
    if not isinstance(name, str) or name not in ACTIVATIONS:
        raise RequestError(f"{key}={name!r} in the config: expected one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def activation_to(name: str) -> str:
    """Hugging Face's name of one of Lathe's activations."""
    return next(theirs for theirs, ours in ACTIVATIONS.items() if ours == name)


def required(config: Config, key: str) -> Any:
    """`config[key]`, or the line that says the config lacks it."""
    if config.get(key) is None:
        raise RequestError(f"the config has no {key!r}; a {config.get('model_type', 'model')} needs it")
    return config[key]


def first_of(value: Any) -> int | None:
    """The first id of a config's `eos_token_id`, which may be a number, a list or missing."""
    ids = ids_of(value)
    return ids[0] if ids else None


def ids_of(value: Any) -> tuple[int, ...]:
    """A config's `eos_token_id` as a tuple: it may be a number, a list or missing."""
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def ids_as_written(ids: tuple[int, ...]) -> int | list[int] | None:
    """Ids as a config holds them: none, a number or a list; `ids_of` reads them back."""
    return None if not ids else ids[0] if len(ids) == 1 else list(ids)


def whole(config: Config, key: str, default: int | None = None, *, least: int = 1) -> int:
    """A whole number of the config, `default` where the key is missing or null.

    Raises:
        RequestError: another kind of value, a number below `least`, or a missing key that has no default.
    """
    value = config.get(key)
    if value is None:
        value = required(config, key) if default is None else default
    if type(value) is not int or value < least:
        raise RequestError(f"{key}={value!r} in the config: expected a whole number, {least} or more")
    return value


def expect(config: Config, key: str, *allowed: Any) -> None:
    """Refuse a config whose `key` is there and is none of `allowed`: Lathe's transformer would compute otherwise."""
    if key in config and config[key] not in allowed:
        wanted = " or ".join(repr(value) for value in allowed)
        raise RequestError(f"{key}={config[key]!r} in the config: only {wanted} is supported")


def given(config: Config, key: str, default: Any) -> Any:
    """The config's value, or `default` where the key is missing or null."""
    return default if config.get(key) is None else config[key]


def n_labels(config: Config) -> int:
    """How many labels a config names: its `id2label`, else `num_labels`, else 2, as in `transformers`."""
    names = config.get("id2label")
    if isinstance(names, Mapping) and names:
        return len(names)
    return whole(config, "num_labels", 2)


def heads_that_fit(d_model: int, n_heads: int, d_head: int) -> dict[str, int]:
    """Changes that make all heads together as wide as the model.

    A head's width stays where it divides `d_model`; else it is the nearest number of heads that divides.
    """
    if d_model % d_head == 0:
        return {"n_heads": d_model // d_head}
    divisors = [n for n in range(1, d_model + 1) if d_model % n == 0]
    nearest = min(divisors, key=lambda n: (abs(n - n_heads), n))
    return {"n_heads": nearest, "d_head": d_model // nearest}


def label_names(n: int) -> dict[str, Any]:
    """The config keys by which every release of `transformers` knows that there are `n` labels."""
    names = [f"LABEL_{i}" for i in range(n)]
    return {"id2label": {str(i): name for i, name in enumerate(names)}, "label2id": {n: i for i, n in enumerate(names)}}


def token(config: Config, key: str, vocab_size: int, default: int | None = None) -> Any:
    """A config's token id, or ids, as written; `default`, the stock class's, where the key is missing.

    A default outside the vocabulary is no token: stock configs of small vocabularies carry it unasked. Nor is a
    negative number, as the first Llama files have for padding.
    """
    value = config.get(key, default)
    if type(value) is int and value < 0:
        return None
    return None if value == default and default is not None and default >= vocab_size else value


Check = Callable[[Architecture], Objection | None]


def find_objections(
    architecture: Architecture,
    checks: Iterable[Check],
    read: Callable[[Config, str], Architecture],
    write: Callable[[Architecture], dict[str, Any]],
) -> list[Objection]:
    """Every objection: those of `checks`, in order, then those of the round trip.

    Each check is given the architecture with the earlier objections' changes made, so that it sees one fault
    at a time. Where an objection has no changes, or impossible ones, the family is the wrong one and the
    search ends.
    """
    found: list[Objection] = []
    for check in checks:
        objection = check(architecture)
        if objection is None:
            continue
        found.append(objection)
        if not objection.changes:
            return found
        try:
            architecture = architecture.with_(objection.changes)
        except RequestError:
            # What would fit the format cannot be, such as heads of an odd width under rotary positions.
            return [*found[:-1], Objection(objection.reason, {})]
    return found + round_trip_objections(architecture, read, write)


# The fields of `Positions` that each kind reads; the others may hold anything.
_POSITION_FIELDS: dict[str, tuple[str, ...]] = {
    "none": (),
    "learned": ("max_positions", "offset"),
    "sinusoidal": ("max_positions",),
    "rotary": ("max_positions", "theta", "scaling"),
    "relative": ("n_buckets", "max_distance"),
}


def round_trip_objections(
    architecture: Architecture,
    read: Callable[[Config, str], Architecture],
    write: Callable[[Architecture], dict[str, Any]],
) -> list[Objection]:
    """What a family's config cannot say: every field that is another after `write` and `read`.

    Fields that change no computation (`family`, `initialisation`, sizes that the kind of positions does not
    read, a sharing that shares nothing) are left out. Call it where `write` can write the architecture at all.
    """
    config = write(architecture)
    name = config["model_type"]
    try:
        back = read(config, config["architectures"][0])
    except RequestError as error:
        return [Objection(f"the config of {name} cannot say it: {error}", {})]
    found = [
        _objection(path, ours, theirs, name)
        for path, ours, theirs in _differences(_computing(architecture), _computing(back))
    ]
    return [_ungrouped(architecture, each) for each in found]


def _ungrouped(architecture: Architecture, objection: Objection) -> Objection:
    # Other heads may not divide into the groups that were named, so the groups go in the same step.
    for name, stack in architecture.stacks:
        if f"{name}.attention.n_heads" in objection.changes and stack.attention.n_kv_heads is not None:
            return replace(objection, changes={**objection.changes, f"{name}.attention.n_kv_heads": None})
    return objection


def _objection(path: str, ours: Any, theirs: Any, name: str) -> Objection:
    changes = {path: theirs}
    if path.endswith(".positions"):  # another kind, which reads other fields: all of them change
        path, ours, theirs = f"{path}.kind", ours["kind"], theirs["kind"]
    return Objection(f"{path} is {_shown(ours)}, where {name} has {_shown(theirs)}", changes)


def _computing(architecture: Architecture) -> dict[str, Any]:
    """The fields that change what is computed, as nested dictionaries."""
    tree = architecture.to_dict()
    # The mask token belongs to the tokenizer and the objective; no config.json has a place for it.
    del tree["family"], tree["initialisation"], tree["tokens"]["mask"]
    for name, stack in architecture.stacks:
        positions = tree[name]["positions"]
        tree[name]["positions"] = {key: positions[key] for key in ("kind", *_POSITION_FIELDS[stack.positions.kind])}
        if stack.attention.kv_heads == stack.attention.n_heads:
            tree[name]["attention"]["n_kv_heads"] = None
        if stack.n_attentions == stack.n_feed_forwards == stack.n_layers:
            tree[name]["sharing"] = "none"
    if architecture.embedding.d_embed is None:
        del tree["embedding"]["projection_bias"]
    if architecture.encoder is None or architecture.decoder is None:
        del tree["tokens"]["decoder_start"]
    if architecture.head.classifier is None:
        del tree["dropout"]["classifier"]
    return tree


def _differences(ours: dict[str, Any], theirs: dict[str, Any], path: str = "") -> Iterable[tuple[str, Any, Any]]:
    for key in ours:
        if key not in theirs:
            continue  # it is read on one side only, because of another difference
        here, mine, other = f"{path}{key}", ours[key], theirs[key]
        another_kind = key == "positions" and mine["kind"] != other["kind"]
        if isinstance(mine, dict) and isinstance(other, dict) and not another_kind:
            yield from _differences(mine, other, f"{here}.")
        elif mine != other:
            yield here, mine, other


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return "set"
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
