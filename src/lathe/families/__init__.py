"""The families that Lathe reads and writes, by Hugging Face's `model_type`.

A family's module is imported when it is asked for. Nothing outside this package knows a family: other
code holds an `Architecture`, whose `family` is a label that only the functions here look up.
"""

from __future__ import annotations

import importlib
from typing import Any

from lathe.architecture import Architecture
from lathe.errors import RequestError
from lathe.families.base import Config, Family, Objection, expect
from lathe.spec import unknown

# model_type -> the module that declares it.
MODULES: dict[str, str] = {
    "t5": "t5",
    "mt5": "t5",
    "bart": "bart",
    "mbart": "bart",
    "bert": "bert",
    "electra": "electra",
    "albert": "albert",
    "gpt2": "gpt2",
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "llama",
}


def family(name: str) -> Family:
    """The family of that `model_type`; an unknown one is a `RequestError` that names those there are."""
    if name not in MODULES:
        raise RequestError(unknown("model_type", name, MODULES))
    module = importlib.import_module(f"lathe.families.{MODULES[name]}")
    families: dict[str, Family] = {each.name: each for each in module.FAMILIES}
    return families[name]


def read_config(config: Config) -> Architecture:
    """The architecture that a Hugging Face `config.json` describes.

    Raises:
        RequestError: no or an unknown `model_type`, an unknown class, or a setting that Lathe does not have.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise RequestError(f"the config has no model_type; expected one of {', '.join(MODULES)}")
    source = family(model_type)
    # What any stock config may ask for and no architecture says.
    expect(config, "quantization_config", None)
    expect(config, "pruned_heads", None, {})
    expect(config, "per_layer_config", None, {})
    return source.read(config, class_name(config, source))


def class_name(config: Config, source: Family) -> str:
    """The class that the config's `architectures` names, or the family's first."""
    named = config.get("architectures") or [source.classes[0]]
    if not isinstance(named, list | tuple):
        raise RequestError(f"architectures={named!r} in the config: expected a list of one class")
    if named[0] not in source.classes:
        raise RequestError(unknown("class", str(named[0]), source.classes))
    return str(named[0])


def objections(architecture: Architecture) -> list[Objection]:
    """Why the architecture's family cannot hold it; nothing where it can, or where it has no family."""
    return [] if architecture.family is None else family(architecture.family).objections(architecture)


def holder(architecture: Architecture) -> Family | None:
    """The family in whose format the architecture can be saved, or None where only Lathe's own form can."""
    if architecture.family is None or objections(architecture):
        return None
    return family(architecture.family)


def write_config(architecture: Architecture, came_with: Config | None = None) -> dict[str, Any]:
    """The `config.json` of an architecture that its family can hold.

    Args:
        came_with: the config that the model was read with. Its keys that Lathe does not write are kept, and the
            names of its labels where their number still is the same.

    Raises:
        RequestError: where the family cannot, with the reasons.
    """
    reasons = [each.reason for each in objections(architecture)]
    if architecture.family is None or reasons:
        raise RequestError(
            f"{architecture.family or 'no family'} cannot hold this: {'; '.join(reasons) or 'no family is named'}"
        )
    written = family(architecture.family).write(architecture)
    if not came_with or came_with.get("model_type") != written["model_type"]:
        return written
    stale = {*_STALE, *family(architecture.family).stale}
    kept = {key: value for key, value in came_with.items() if key not in stale}
    if len(kept.get("id2label") or ()) == len(written.get("id2label", ())):
        written = {key: value for key, value in written.items() if key not in ("id2label", "label2id")}
    return {**kept, **written}


# Keys that say again, or of the old file, what the written ones say.
_STALE = ("dtype", "torch_dtype", "_name_or_path", "num_labels")
