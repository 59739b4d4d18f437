"""What can be asked of generation: `transformers`' names, typed, checked and resolved from three sources.

A setting comes from the call, else from the settings stored with the model (`generation_config.json`), else
from the architecture's tokens and the defaults here. A name that does not exist is refused, and so is a value
that would do nothing or something else than it says. Stored settings were not asked for by the caller, so
those that concern the file, sampling when nothing is sampled or beams where there are none, are passed over;
those that would change the text and that Lathe does not do are refused by name, with the value that turns
them off.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from lathe.architecture import Architecture
from lathe.errors import RequestError
from lathe.spec import Spec, size, unknown

log = logging.getLogger("lathe")

DEFAULT_NEW_TOKENS = 20
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
BEAMS = ("length_penalty", "early_stopping", "num_beam_groups", "diversity_penalty")

# Settings of `transformers` that Lathe does not do, each with the value that means the same as leaving it out.
NEUTRAL: dict[str, Any] = {
    "penalty_alpha": None,
    "force_words_ids": None,
    "constraints": None,
    "sequence_bias": None,
    "exponential_decay_length_penalty": None,
    "guidance_scale": 1.0,
    "watermarking_config": None,
    "remove_invalid_values": False,
    "top_h": None,
    "max_time": None,
    "token_healing": False,
    "dola_layers": None,
    "prompt_lookup_num_tokens": None,
    "use_cache": True,
    "return_dict_in_generate": False,
    "output_scores": False,
    "output_logits": False,
    "output_attentions": False,
    "output_hidden_states": False,
}

# Those of them that change no token: where they are stored they are passed over, and refused where they are asked for.
NO_TOKEN = frozenset(
    {
        "use_cache",
        "return_dict_in_generate",
        "output_scores",
        "output_logits",
        "output_attentions",
        "output_hidden_states",
    }
)

# Stored settings that change no token here: about the file, or about how a step is computed.
PASSED_OVER = frozenset(
    {
        "_from_model_config",
        "transformers_version",
        "low_memory",
        "is_assistant",
        "cache_implementation",
        "cache_config",
        "max_cache_len",
        "compile_config",
        "disable_compile",
        "prefill_chunk_size",
        "continuous_batching_config",
        "num_assistant_tokens",
        "num_assistant_tokens_schedule",
        "assistant_confidence_threshold",
        "assistant_early_exit",
        "assistant_lookbehind",
        "target_lookbehind",
        "assistant_ensemble_weight",
        "max_matching_ngram_size",
        "speculation_type",
        "use_mtp",
    }
)


@dataclass(frozen=True, kw_only=True)
class Settings(Spec):
    """Everything that generation reads, resolved and checked.

    Args:
        max_new_tokens: how many tokens to add at most.
        max_length: the same, with the prompt's columns counted; 20 new tokens where neither is given.
        min_new_tokens, min_length: until then no end-of-sequence token is chosen.
        do_sample: draw each token from the model's distribution; else take the likeliest.
        temperature, top_k, top_p, min_p, typical_p, epsilon_cutoff, eta_cutoff: how the distribution is sharpened and
            cut before a draw; see `lathe.generate.filters`. `top_k=None` keeps every token.
        repetition_penalty, presence_penalty, frequency_penalty, encoder_repetition_penalty: how tokens that stand in
            the text already become less likely, or those of the source more; see `lathe.generate.history`.
        no_repeat_ngram_size, encoder_no_repeat_ngram_size: no run of so many tokens comes twice, or out of the source.
        bad_words_ids: runs of tokens that never come.
        suppress_tokens, begin_suppress_tokens: tokens that never come, or not as the first.
        renormalize_logits: make log-probabilities of what the filters left; beams compare them.
        num_beams: how many unfinished texts are followed at once; 1 is no beam search.
        length_penalty: a finished text's score is its log-probability over its length to this power.
        early_stopping: end a row once `num_beams` texts are finished (True), once no better one is likely (False)
            or once none is possible ("never").
        num_beam_groups, diversity_penalty: search in groups, each of which avoids what the ones before it chose.
        num_return_sequences: how many samples to draw for each prompt, or how many of the best beams to give.
        stop_strings: a text ends with the token that completes any of these.
        seed: what samples are drawn from: one number, or one for each prompt. PyTorch's global generator picks
            one where left out. A row's samples depend on its own seed and on no other row.
        eos_token_id: any of these ends a row.
        pad_token_id: what fills a row that has ended; the first end-of-sequence token where there is none.
        bos_token_id: what a decoder starts with when there is no prompt.
        decoder_start_token_id: what an encoder-decoder's output starts with.
        forced_bos_token_id: the token after that one (mBART's language code).
        forced_eos_token_id: the last token of a row that reaches its full length, or several to choose from.
    """

    max_new_tokens: int | None = size(2**30, default=None)
    max_length: int | None = size(2**30, default=None)
    min_new_tokens: int = size(2**30, least=0, default=0)
    min_length: int = size(2**30, least=0, default=0)
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int | None = size(2**24, default=50)
    top_p: float = 1.0
    min_p: float | None = None
    typical_p: float = 1.0
    epsilon_cutoff: float = 0.0
    eta_cutoff: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    encoder_repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = size(2**20, least=0, default=0)
    encoder_no_repeat_ngram_size: int = size(2**20, least=0, default=0)
    bad_words_ids: tuple[tuple[int, ...], ...] | None = None
    suppress_tokens: tuple[int, ...] | None = None
    begin_suppress_tokens: tuple[int, ...] | None = None
    renormalize_logits: bool = False
    num_beams: int = size(2**12, default=1)
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    num_beam_groups: int = size(2**12, default=1)
    diversity_penalty: float = 0.0
    num_return_sequences: int = size(2**16, default=1)
    stop_strings: tuple[str, ...] | None = None
    seed: int | tuple[int, ...] | None = None
    eos_token_id: tuple[int, ...] = ()
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    decoder_start_token_id: int | None = None
    forced_bos_token_id: int | None = None
    forced_eos_token_id: int | tuple[int, ...] | None = None

    def check(self) -> None:
        self._check_numbers()
        self._check_beams()
        if self.max_new_tokens is not None and self.min_new_tokens > self.max_new_tokens:
            raise RequestError(
                f"min_new_tokens={self.min_new_tokens}: expected at most max_new_tokens={self.max_new_tokens}"
            )
        if self.max_length is not None and self.min_length > self.max_length:
            raise RequestError(f"min_length={self.min_length}: expected at most max_length={self.max_length}")
        if self.bad_words_ids is not None and not all(self.bad_words_ids):
            raise RequestError("bad_words_ids holds an empty list; expected at least one token id in each")
        if self.stop_strings is not None and not all(self.stop_strings):
            raise RequestError("stop_strings holds an empty text, with which every text ends; leave it out")
        for seed in (self.seed,) if isinstance(self.seed, int) else self.seed or ():
            if not 0 <= seed < 2**63:
                raise RequestError(f"seed={seed}: expected a whole number from 0 to 2^63 - 1")
        for name in ("forced_bos_token_id", "forced_eos_token_id"):
            forced = _as_tuple(getattr(self, name))
            if forced and set(forced) <= set(self.suppress_tokens or ()):
                raise RequestError(f"{name}={forced[0]} is among suppress_tokens; take it out of one of the two")

    def _check_numbers(self) -> None:
        if self.temperature <= 0:
            raise RequestError(
                f"temperature={self.temperature}: expected more than 0; for the likeliest, do_sample=False"
            )
        for name in ("top_p", "typical_p"):
            if not 0 < getattr(self, name) <= 1:
                raise RequestError(f"{name}={getattr(self, name)}: expected more than 0 and at most 1")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise RequestError(f"min_p={self.min_p}: expected a number from 0 to 1")
        for name in ("epsilon_cutoff", "eta_cutoff"):
            if not 0 <= getattr(self, name) < 1:
                raise RequestError(
                    f"{name}={getattr(self, name)}: expected at least 0, which cuts nothing, and below 1"
                )
        for name in ("repetition_penalty", "encoder_repetition_penalty"):
            if getattr(self, name) <= 0:
                raise RequestError(f"{name}={getattr(self, name)}: expected more than 0; 1 is no penalty")

    def _check_beams(self) -> None:
        copies, beams, groups = self.num_return_sequences, self.num_beams, self.num_beam_groups
        if self.early_stopping not in (True, False, "never"):
            raise RequestError(f"early_stopping={self.early_stopping!r}: expected true, false or never")
        if beams > 1 and copies > beams:
            raise RequestError(f"num_return_sequences={copies}: expected at most num_beams={beams}; raise num_beams")
        if copies > 1 and beams == 1 and not self.do_sample:
            raise RequestError(
                f"num_return_sequences={copies}: without sampling all would be the same; "
                f"pass do_sample=True, or num_beams={copies} for the best of a search"
            )
        if beams % groups:
            raise RequestError(f"num_beam_groups={groups}: expected a divisor of num_beams={beams}")
        if self.diversity_penalty < 0 or (self.diversity_penalty > 0) != (groups > 1):
            raise RequestError(
                f"num_beam_groups={groups} with diversity_penalty={self.diversity_penalty}: groups need a penalty "
                "above 0, and a penalty needs groups; give both or neither"
            )
        if groups > 1 and self.do_sample:
            raise RequestError(f"num_beam_groups={groups}: groups of beams do not sample; pass do_sample=False")

    @classmethod
    def resolve(
        cls, architecture: Architecture, given: Mapping[str, Any], stored: Mapping[str, Any] | None = None
    ) -> Settings:
        """The settings of one call.

        Args:
            architecture: whose tokens serve where no other are named.
            given: what the caller asked for; None turns a setting off.
            stored: what came with the model.

        Raises:
            RequestError: an unknown setting, a value that cannot be, or one that would do nothing.
        """
        _refuse_unknown(given)
        tokens = architecture.tokens
        values = {
            "eos_token_id": tokens.eos,
            "pad_token_id": tokens.pad,
            "bos_token_id": tokens.bos,
            "decoder_start_token_id": tokens.decoder_start,
            **_usable(stored or {}, given),
        }
        asked = {name: _off(name) if value is None else value for name, value in given.items() if name not in NEUTRAL}
        if asked.get("max_length") is not None:
            if asked.get("max_new_tokens") is not None:
                raise RequestError("max_new_tokens and max_length were both given; expected one of them")
            values.pop("max_new_tokens", None)
        if asked.get("max_new_tokens") is not None:
            values.pop("max_length", None)
        if asked.get("min_new_tokens") and asked.get("min_length"):
            raise RequestError("min_new_tokens and min_length were both given; expected one of them")
        if asked.get("min_length"):
            values.pop("min_new_tokens", None)
        elif given.get("min_new_tokens") is not None or values.get("min_new_tokens"):
            values.pop("min_length", None)
        _refuse_beside_stored(asked, values)
        values |= asked
        for names, on, what in (
            (SAMPLING, values.get("do_sample", False), "nothing is sampled; pass do_sample=True"),
            (BEAMS, values.get("num_beams", 1) != 1, "there are no beams; pass num_beams"),
        ):
            if not on:
                _refuse_idle(names, asked, what)
                values = {name: value for name, value in values.items() if name not in names}
        lists = {"eos_token_id": int, "suppress_tokens": int, "begin_suppress_tokens": int, "stop_strings": str}
        for name, one in lists.items():
            if type(values.get(name)) is one:
                values[name] = (values[name],)
        settings = cls(**values)
        settings._check_tokens(architecture.embedding.vocab_size, asked)
        return settings

    @property
    def filler(self) -> int:
        """What stands in a row after its end."""
        return self.pad_token_id if self.pad_token_id is not None else self.eos_token_id[0] if self.eos_token_id else 0

    def _check_tokens(self, vocab_size: int, asked: Mapping[str, Any]) -> None:
        for name in self.field_names():
            if not name.endswith(("_token_id", "suppress_tokens", "bad_words_ids")):
                continue
            given = _as_tuple(getattr(self, name))
            for token in itertools.chain.from_iterable(_as_tuple(each) for each in given):
                if not 0 <= token < vocab_size:
                    remedy = "" if name in asked else f"; it is stored with the model: pass another {name}"
                    raise RequestError(f"{name}={token}: expected an id from 0 to {vocab_size - 1:,}{remedy}")


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else () if value is None else (value,)


def _refuse_unknown(given: Mapping[str, Any]) -> None:
    known = Settings.field_names()
    for name, value in given.items():
        if name in NEUTRAL:
            if value is not None and value != NEUTRAL[name]:
                raise RequestError(f"{name}={value!r}: not supported; leave it out")
        elif name not in known:
            raise RequestError(unknown("setting", name, known))


def turned_off(stored: Mapping[str, Any]) -> dict[str, Any]:
    """The stored settings that would change the text and that Lathe does not do, each with the value that is none."""
    return {
        name: NEUTRAL[name]
        for name, value in stored.items()
        if name in NEUTRAL and name not in NO_TOKEN and value is not None and value != NEUTRAL[name]
    }


def _usable(stored: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The stored settings that are Lathe's, after refusing those that would change the text and are not."""
    values = {name: value for name, value in stored.items() if value is not None}
    if _is_negative(values.get("pad_token_id")):
        del values["pad_token_id"]  # as the first Llama files write that there is none
    undone = {name: value for name, value in turned_off(stored).items() if name not in given}
    if undone:
        asks = ", ".join(f"{name}={stored[name]}" for name in undone)
        off = ", ".join(f"{name}={value}" for name, value in undone.items())
        raise RequestError(f"the settings stored with the model ask for {asks}, which Lathe does not do; pass {off}")
    known = Settings.field_names()
    strange = [name for name in values if name not in known and name not in NEUTRAL and name not in PASSED_OVER]
    if strange:
        log.warning("passed over unknown settings stored with the model: %s", ", ".join(strange))
    usable = {name: value for name, value in values.items() if name in known}
    if usable.get("top_k") == 0:
        usable["top_k"] = None  # as stored files write "every token"
    return usable


def _is_negative(value: Any) -> bool:
    return type(value) is int and value < 0


def _off(name: str) -> Any:
    """The value that turns a setting off, or leaves it to its default where it cannot be."""
    if name == "top_k":
        return None
    return next((each.default for each in dataclasses.fields(Settings) if each.name == name), None)


def _refuse_idle(names: Iterable[str], asked: Mapping[str, Any], why: str) -> None:
    for name in names:
        if name in asked and asked[name] != _off(name):
            raise RequestError(f"{name}={asked[name]}: {why} or leave it out")


def _refuse_beside_stored(asked: Mapping[str, Any], stored: Mapping[str, Any]) -> None:
    """Refuse what does not go with a setting that came with the model, and say so: nobody typed that one."""
    for least, most in (("min_new_tokens", "max_new_tokens"), ("min_length", "max_length")):
        for mine, other in ((least, most), (most, least)):
            if mine not in asked or other in asked:
                continue
            given, held = asked[mine], stored.get(other)
            below = {**stored, mine: given}
            if isinstance(given, int) and isinstance(held, int) and below[least] > below[most]:
                bound = "at most" if mine == least else "at least"
                raise RequestError(
                    f"{mine}={given}: expected {bound} {other}={held}, which is stored with the model; "
                    f"give {other} as well"
                )
    both = {**stored, **asked}
    copies, beams = both.get("num_return_sequences", 1), both.get("num_beams", 1)
    if "num_return_sequences" in asked or not all(isinstance(each, int) for each in (copies, beams)):
        return
    if copies > (beams if beams > 1 else copies if both.get("do_sample") else 1):
        why = f"expected at most num_beams={beams}" if beams > 1 else "without sampling or beams all would be the same"
        raise RequestError(
            f"num_return_sequences={copies}, which is stored with the model: {why}; give num_return_sequences=1 as well"
        )
