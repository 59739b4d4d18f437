"""What a user holds: a model that loads, saves, generates and turns into stock `transformers` and back.

import lathe
model = lathe.load("my-t5")
smaller = lathe.resize(model, d_model=384, calibrate="corpus.txt")
smaller.save("my-t5-384")
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from lathe.adapt import adapter_names, folded_tensors
from lathe.architecture import Architecture
from lathe.blueprint import stored
from lathe.checkpoint.load import Checkpoint
from lathe.checkpoint.save import DEFAULT_SHARD_BYTES, Saved, save_checkpoint, with_tokens
from lathe.errors import RequestError
from lathe.families import holder, write_config
from lathe.families.adapter import fuse, to_disk
from lathe.model.transformer import Transformer
from lathe.quantization.place import codes_of, fill
from lathe.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from lathe.export.job import Exported
    from lathe.model.codes import Codes
    from lathe.planner import Plan
    from lathe.reshape import Step
    from lathe.reshape.history import History

log = logging.getLogger("lathe")


class Model(Transformer):
    """A transformer together with what travels with it: tokenizer, generation settings, the config it came with.

    Args:
        architecture: every size and choice.
        tensors: the weights by the blueprint's names, used as they are; None draws new ones from `seed`.
        codes: its quantised matrices, by the same names; they are none of `tensors`.
        tokenizer: text to ids and back; None where the model has none.
        generation: settings that `generate` starts from (`generation_config.json`).
        config: the Hugging Face config that the model came with.
        directory: where its files are, if it was read from any.

    >>> import lathe, torch
    >>> small = lathe.preset("t5-small").with_(d_model=32, d_ff=64, n_layers=1, vocab_size=64)
    >>> model = lathe.Model(small, seed=0)
    >>> model(torch.tensor([[5, 6, 1]]), labels=torch.tensor([[7, 1]])).logits.shape
    torch.Size([1, 2, 64])
    """

    def __init__(
        self,
        architecture: Architecture,
        tensors: Mapping[str, Tensor] | None = None,
        *,
        codes: Mapping[str, Codes] | None = None,
        seed: int = 0,
        tokenizer: Tokenizer | None = None,
        generation: Mapping[str, Any] | None = None,
        config: Mapping[str, Any] | None = None,
        directory: str | Path | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        given = tensors is not None
        super().__init__(architecture, seed=None if given else seed, device="meta" if given else None)
        if tensors is not None:
            fill(self, tensors, codes or {})
        self.tokenizer = tokenizer
        self.generation = dict(generation or {})
        self.config = dict(config or {})
        self.steps: tuple[Step, ...] = ()  # what was done to get here, where the model was resized
        self.history: History | None = None  # the same with what it cost, for `save` to write down
        self.name, self.directory = "a model in memory", None if directory is None else Path(directory).absolute()
        if device is not None or dtype is not None:
            self.to(device=device, dtype=dtype)
        self.eval()

    @property
    def tokenizer(self) -> Tokenizer | None:
        """Text to ids and back; None where the model has none.

        Raises:
            RequestError: set to what is no `lathe.Tokenizer`.
        """
        return self._tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: Tokenizer | None) -> None:
        if tokenizer is not None and not isinstance(tokenizer, Tokenizer):
            raise RequestError(
                f"tokenizer: expected a lathe.Tokenizer, not a {type(tokenizer).__name__}; save_pretrained writes that "
                "one, and lathe.Tokenizer.load opens what it wrote"
            )
        self._tokenizer = tokenizer

    @classmethod
    def from_checkpoint(
        cls, checkpoint: Checkpoint, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Self:
        """The model of an opened checkpoint."""
        parameters = checkpoint.parameters
        tensors = {name: parameters.tensor(name) for name in parameters.names() if name not in checkpoint.codes}
        if parameters.left_out:
            log.warning(
                "left out %d tensors of heads that the config's class does not have: %s",
                len(parameters.left_out),
                ", ".join(parameters.left_out[:4]) + ("…" if len(parameters.left_out) > 4 else ""),
            )
        tokenizer = None
        if checkpoint.directory is not None and Tokenizer.is_in(checkpoint.directory):
            tokenizer = Tokenizer.load(checkpoint.directory)
        return cls(
            checkpoint.architecture,
            tensors,
            codes=checkpoint.codes,
            tokenizer=tokenizer,
            generation=checkpoint.generation,
            config=checkpoint.config,
            directory=checkpoint.directory,
            device=device,
            dtype=dtype,
        )

    def tensors(self) -> dict[str, Tensor]:
        """Every stored parameter by the blueprint's name, detached; an active adapter is folded in (`lathe.adapt`).

        Of a quantised matrix these are the numbers that its codes stand for.
        """
        return folded_tensors(self)

    def save(
        self,
        path: str | Path,
        *,
        max_shard_bytes: int = DEFAULT_SHARD_BYTES,
        replace: bool = False,
        report: bool = True,
    ) -> Saved:
        """Write the model, its tokenizer and its generation settings to a directory.

        Stock `transformers` opens it where the architecture's family can hold it; otherwise it is Lathe's own
        form, and a warning names the reasons. An active adapter is folded in, so that what is opened computes what
        this model computes; `lathe.adapt.save_adapter` writes the adapter alone. A quantised model is written in
        codes (`lathe.checkpoint.compressed`).

        A model that was resized gets what `lathe resize` writes as well: its recipe (`lathe.json`), `report.html`, and
        a model card (`README.md`).

        Args:
            path: must not exist, unless `replace`.
            max_shard_bytes: the size past which the weights are split.
            report: open what was written once more, compare, and write the report and the card of a resized model.

        Raises:
            RequestError: `path` exists, or an adapter is on a quantised model.
            LatheError: the disk is full; nothing is left behind.

        >>> import lathe, tempfile
        >>> tiny = lathe.preset("gpt2").with_(d_model=24, n_heads=2, d_head=12, d_ff=48, n_layers=1)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     lathe.Model(tiny, seed=0).save(folder + "/tiny").stock
        True
        """
        if self.history is None:
            codes = codes_of(self)
            if codes and adapter_names(self):
                raise RequestError(
                    "an adapter is on a quantised model, and folded in it would be rounded again: write the adapter "
                    "alone (lathe.adapt.save_adapter)"
                )
            saved = save_checkpoint(
                path,
                self.architecture,
                {name: tensor for name, tensor in self.tensors().items() if name not in codes},
                codes=codes,
                tokenizer=self.tokenizer,
                generation=self.generation,
                config=self.config,
                max_shard_bytes=max_shard_bytes,
                replace=replace,
            )
        else:
            saved = self._save_resized(self.history, Path(path), max_shard_bytes, replace=replace, report=report)
        if not saved.stock:
            why = "; ".join(saved.reasons) or "the architecture names no family"
            log.warning("saved %s in Lathe's own form, which stock transformers cannot open: %s", path, why)
        return saved

    def _save_resized(
        self, history: History, path: Path, max_shard_bytes: int, *, replace: bool, report: bool
    ) -> Saved:
        from lathe.report.resizing import pages
        from lathe.reshape.at_hand import save_with_pages
        from lathe.reshape.history import Made

        return save_with_pages(
            Made(self, self.tokenizer, self.generation, self.config),
            history,
            path,
            pages=pages if report else None,
            max_shard_bytes=max_shard_bytes,
            replace=replace,
        )

    def generate(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, **settings: Any
    ) -> Tensor:
        """Token ids after the prompt, laid out as `transformers` lays them out; see `lathe.generate.generate`.

        >>> import lathe, torch
        >>> tiny = lathe.preset("gpt2").with_(d_model=24, n_heads=2, d_head=12, d_ff=48, n_layers=1)
        >>> lathe.Model(tiny, seed=0).generate(torch.tensor([[5, 6]]), max_new_tokens=3).shape
        torch.Size([1, 5])
        """
        from lathe.generate import generate

        return generate(self, input_ids, attention_mask, stored=self.generation, **settings)

    def plan(self, **changes: Any) -> Plan:
        """What this model costs, and what it would cost with other sizes; see `lathe.plan`.

        Example:
            >>> import lathe
            >>> tiny = lathe.preset("gpt2").with_(d_model=24, n_heads=2, d_head=12, d_ff=48, n_layers=1)
            >>> plan = lathe.Model(tiny, seed=0).plan(d_ff=24)
            >>> plan.before.parameters.total - plan.after.parameters.total  # 24 neurons: a row, a column, a bias
            1176
        """
        from lathe.planner import plan

        return plan(self.architecture, **changes)

    def export(
        self, path: str | Path, *, to: str, kind: str | None = None, body: bool = False, name: str | None = None
    ) -> Exported:
        """Write the model and its tokenizer for another program, and run it there; see `lathe.export.job.export`.

        Args:
            path: a file that ends in .gguf, or a directory; it must not exist.
            to: `gguf` (llama.cpp), `ctranslate2`, or `onnx` (encoders).
            kind: the type of the weights; the format's first where left out.
            body: leave the token head and the classifier out.
            name: what the file calls the model; the path's last part where left out.

        Raises:
            RequestError: what the format cannot hold, a package that is missing, a path that exists.
            LatheError: the program computes something else; nothing is left behind.
        """
        from lathe.export.job import export

        return export(self, path, to=to, kind=kind, body=body, tokenizer=self.tokenizer, name=name)

    def to_transformers(self) -> Any:
        """The same model as an object of stock `transformers`, with copies of the weights and its generation settings.

        Raises:
            RequestError: the architecture's family cannot hold it, or `transformers` is not installed.
        """
        try:
            import transformers
        except ImportError:
            raise RequestError("to_transformers needs the package transformers; pip install transformers") from None
        config = write_config(self.architecture, self.config)
        source = holder(self.architecture)
        assert source is not None
        kind = getattr(transformers, config["architectures"][0])
        tensors = self.tensors()
        disk = {
            name: fuse(entry, [tensors[ours] for ours in entry.ours]).clone()
            for name, _, entry in to_disk(source, self.architecture)
        }
        made = kind.from_pretrained(None, config=kind.config_class(**config), state_dict=disk, dtype=self.dtype)
        if made.can_generate():
            made.generation_config = _stock_generation(config, self.generation)
        return made.to(self.device).train(self.training)


def _stock_generation(config: Mapping[str, Any], generation: Mapping[str, Any]) -> Any:
    """What `from_pretrained` makes of the files that `save` writes; the config's class has defaults of its own."""
    from transformers import GenerationConfig

    if not generation:
        return GenerationConfig.from_dict(dict(config), _from_model_config=True)
    return GenerationConfig.from_dict(with_tokens(generation, config))


def parameter_count(model: Transformer) -> int:
    """How many trained numbers the model holds, tied tensors counted once."""
    return sum(p.size for p in stored(model.architecture) if p.trained)
