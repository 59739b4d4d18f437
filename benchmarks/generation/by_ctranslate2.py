"""CTranslate2: its own converter, then `Generator`, `Translator` or `Encoder`.

It works on tokens' texts and converts a tokenizer along with the weights, so the model gets one of made-up words:
token 7 is `t7`.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.generation.base import Ids, log_probs, versions


def version() -> str:
    """The library's."""
    return versions("ctranslate2", missing="pip install ctranslate2")


def prepare(model: Path, files: Path, kind: str, precision: str) -> None:
    """Convert the stock directory; weights are stored as they are computed with."""
    from ctranslate2.converters import TransformersConverter

    with tempfile.TemporaryDirectory(dir=files.parent) as folder:
        with_words = Path(folder)
        for each in model.resolve().iterdir():
            if each.name != "config.json":
                (with_words / each.name).symlink_to(each)
        config = json.loads((model / "config.json").read_text(encoding="utf-8"))
        _write_words(with_words, config)
        # Its converter asks for what the configs of newer versions of transformers leave out.
        config.setdefault("position_embedding_type", "absolute")
        (with_words / "config.json").write_text(json.dumps(config), encoding="utf-8")
        TransformersConverter(str(with_words)).convert(str(files), quantization=precision)


def _write_words(folder: Path, config: dict[str, Any]) -> None:
    """A tokenizer beside the weights, with a word for each token and the config's special ones."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    words = {f"t{index}": index for index in range(config["vocab_size"])}
    Tokenizer(WordLevel(words, unk_token="t2")).save(str(folder / "tokenizer.json"))
    first = {name: each[0] if isinstance(each, list) else each for name, each in config.items()}
    special = {"pad": first.get("pad_token_id") or 0, "eos": first.get("eos_token_id") or 1, "unk": 2}
    special["bos"] = first.get("bos_token_id") or special["eos"]
    chosen = {f"{name}_token": f"t{index}" for name, index in special.items()}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **chosen}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


class Runner:
    """Its class for the kind of model, in one replica of so many threads."""

    def __init__(self, files: Path, kind: str, threads: int, precision: str) -> None:
        import ctranslate2

        made = {"causal": ctranslate2.Generator, "seq2seq": ctranslate2.Translator, "encoder": ctranslate2.Encoder}
        self.kind = kind
        self.model: Any = made[kind](
            str(files), device="cpu", compute_type=precision, inter_threads=1, intra_threads=threads
        )

    def generate(self, prompts: Ids, new: int) -> Ids:
        """Greedy; a length that is the least and the most keeps the end token from ending a row."""
        words = [_words(row) for row in prompts]
        if self.kind == "seq2seq":
            length = {"max_decoding_length": new, "min_decoding_length": new}
            found = self.model.translate_batch(words, beam_size=1, max_input_length=0, **length)
            return [[int(word[1:]) for word in each.hypotheses[0]] for each in found]
        found = self.model.generate_batch(
            words, beam_size=1, sampling_topk=1, max_length=new, min_length=new, include_prompt_in_result=False
        )
        return [list(each.sequences_ids[0]) for each in found]

    def encode(self, rows: Ids) -> np.ndarray:
        """The last hidden states."""
        return np.array(self.model.forward_batch(rows).last_hidden_state)

    def score(self, prompt: list[int], target: list[int]) -> dict[str, np.ndarray]:
        """Logits of a decoder; of an encoder-decoder the log-probabilities, which is what it shows."""
        if self.kind == "seq2seq":
            found = self.model.score_batch([_words(prompt)], [_words(target)])[0]
            return {"log_probs": np.array(found.log_probs[: len(target)])}
        logits_TV = np.array(self.model.forward_batch([prompt + target[:-1]]))[0, len(prompt) - 1 :]
        return {"logits": logits_TV, "log_probs": log_probs(logits_TV, target)}


def _words(row: list[int]) -> list[str]:
    return [f"t{index}" for index in row]
