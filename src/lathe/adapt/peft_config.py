"""PEFT's `adapter_config.json`: what an adapter's file says about itself, read and written.

A setting that is on and that Lathe does not have is refused by its key, because the adapter would compute
something else; a setting that is off (null, false, empty) is passed over, whatever its name, so files of other
releases of PEFT open.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lathe.adapt.settings import scale_of
from lathe.errors import RequestError

CONFIG = "adapter_config.json"

# Keys that change nothing that an adapter computes once it is trained.
_HARMLESS = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "eva_config",
        "fan_in_fan_out",
        "inference_mode",
        "megatron_core",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
        "task_type",
    }
)
_USED = frozenset(
    {
        "alpha_pattern",
        "bias",
        "exclude_modules",
        "init_lora_weights",
        "layers_pattern",
        "layers_to_transform",
        "lora_alpha",
        "lora_dropout",
        "modules_to_save",
        "peft_type",
        "r",
        "rank_pattern",
        "target_modules",
        "use_dora",
        "use_rslora",
    }
)
# Ways to draw A and B that leave the base as it is; the others (PiSSA, OLoRA) take something out of it.
_STARTS = (True, False, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class PeftConfig:
    """An adapter's settings under PEFT's names.

    Args:
        target_modules: module names or their ends; or one regular expression for whole names.
        rank_pattern, alpha_pattern: regular expressions for the ends of names to other values than `r` and
            `lora_alpha`.
        modules_to_save: ends of names of modules that the adapter has whole.
        fan_in_fan_out: whether the stock modules keep their weights `in × out`; A and B do not.
    """

    r: int
    lora_alpha: float
    target_modules: str | list[str]
    lora_dropout: float = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    rank_pattern: Mapping[str, int] | None = None
    alpha_pattern: Mapping[str, float] | None = None
    exclude_modules: str | list[str] | None = None
    layers_to_transform: int | list[int] | None = None
    layers_pattern: str | list[str] | None = None
    modules_to_save: list[str] | None = None
    fan_in_fan_out: bool = False

    def rank(self, module: str) -> int:
        """The rank of a stock module's adapter."""
        rank: int = _by_pattern(self.rank_pattern, module, self.r)
        return rank

    def scale(self, module: str) -> float:
        """What the update of a stock module is multiplied by."""
        alpha = _by_pattern(self.alpha_pattern, module, self.lora_alpha)
        return scale_of(alpha, self.rank(module), rslora=self.use_rslora)

    def targets(self, module: str) -> bool:
        """Whether PEFT would put an adapter on the stock module of that name (`all-linear` aside)."""
        if self.exclude_modules and _names(self.exclude_modules, module):
            return False
        if not _names(self.target_modules, module):
            return False
        if isinstance(self.target_modules, str) or self.layers_to_transform in (None, []):
            return True
        wanted = self.layers_to_transform
        return self._layer(module) in (wanted if isinstance(wanted, list) else [wanted])

    def _layer(self, module: str) -> int | None:
        patterns = self.layers_pattern or r"[^.]*"
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            found = re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", module)
            if found:
                return int(found[1])
        return None

    def to_dict(self, **more: Any) -> dict[str, Any]:
        """The file's content, with other keys beside the settings."""
        return {
            "peft_type": "LORA",
            "r": self.r,
            "lora_alpha": _short(self.lora_alpha),
            "lora_dropout": self.lora_dropout,
            "target_modules": self.target_modules,
            "rank_pattern": dict(self.rank_pattern or {}),
            "alpha_pattern": {name: _short(alpha) for name, alpha in (self.alpha_pattern or {}).items()},
            "use_rslora": self.use_rslora,
            "use_dora": self.use_dora,
            "bias": "none",
            "fan_in_fan_out": self.fan_in_fan_out,
            "inference_mode": True,
            "init_lora_weights": True,
            "modules_to_save": self.modules_to_save or None,
            **more,
        }


def _short(number: float) -> float | int:
    return int(number) if number == int(number) else number


def _names(targets: str | list[str], module: str) -> bool:
    if isinstance(targets, str):
        return re.fullmatch(targets, module) is not None
    return any(module == each or module.endswith(f".{each}") for each in targets)


def _by_pattern(patterns: Mapping[str, Any] | None, module: str, otherwise: Any) -> Any:
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return otherwise


def read_peft_config(directory: Path) -> PeftConfig:
    """The settings of the adapter in `directory`.

    Raises:
        RequestError: no such file, no JSON, another method than LoRA, a setting that Lathe does not have, or a
            value of the wrong kind.
    """
    values = _json(directory / CONFIG)
    method = values.get("peft_type")
    if method != "LORA":
        raise RequestError(f"peft_type={method!r} in {directory / CONFIG}: expected LORA, the one method read here")
    if values.get("bias", "none") != "none":
        raise RequestError(f"bias={values['bias']!r} in {directory / CONFIG}: only none is read; merge it with peft")
    start = values.get("init_lora_weights", True)
    if start not in _STARTS:
        raise RequestError(
            f"init_lora_weights={start!r} in {directory / CONFIG}: that start changes the base as well; "
            "convert the adapter to plain LoRA with peft first"
        )
    for key, value in values.items():
        if key not in _HARMLESS | _USED and value not in (None, False, {}, [], ""):
            raise RequestError(
                f"{key}={value!r} in {directory / CONFIG}: Lathe's LoRA has no such setting; "
                "merge the adapter with peft instead"
            )
    _check_kinds(values, directory / CONFIG)
    kept = {key: values[key] for key in PeftConfig.__dataclass_fields__ if values.get(key) is not None}
    return PeftConfig(**kept)


def _check_kinds(values: Mapping[str, Any], path: Path) -> None:
    def expect(key: str, good: bool, wanted: str) -> None:
        if not good:
            raise RequestError(f"{key}={values.get(key)!r} in {path}: expected {wanted}")

    def number(value: Any) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool) and value > 0

    expect("r", _is_rank(values.get("r")), "a whole number, 1 or more")
    expect("lora_alpha", number(values.get("lora_alpha")), "a number above 0")
    dropout = values.get("lora_dropout", 0.0)
    expect("lora_dropout", dropout == 0 or (number(dropout) and dropout < 1), "a probability below 1")

    def names(value: Any) -> bool:
        return isinstance(value, list) and all(isinstance(each, str) and each for each in value)

    targets = values.get("target_modules")
    listed = names(targets)
    saved = values.get("modules_to_save")
    expect("modules_to_save", saved is None or names(saved), "names of modules")
    expect("target_modules", bool(targets) and (listed or isinstance(targets, str)), "names of modules or a pattern")
    for key, good in (("rank_pattern", _is_rank), ("alpha_pattern", number)):
        patterns = values.get(key) or {}
        expect(key, isinstance(patterns, dict) and all(map(good, patterns.values())), "patterns to numbers above 0")


def _is_rank(value: Any) -> bool:
    return type(value) is int and value > 0


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise RequestError(f"{path.parent} holds no {path.name}: expected a directory that peft or save_adapter wrote")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise RequestError(f"{path} is not JSON ({error}); is the file complete?") from None
    if not isinstance(values, dict):
        raise RequestError(f"{path} holds {type(values).__name__}, not an object; expected an adapter's settings")
    return values


def shortest_names(chosen: Iterable[str], others: Iterable[str]) -> list[str]:
    """The shortest ends of names that say `chosen` and none of `others`: `["q", "v"]` rather than every layer's."""
    chosen, others = set(chosen), set(others)
    for length in range(1, max(name.count(".") for name in chosen) + 1):
        ends = {".".join(name.split(".")[-length:]) for name in chosen}
        if not any(_names(sorted(ends), other) for other in others):
            return sorted(ends)
    return sorted(chosen)
