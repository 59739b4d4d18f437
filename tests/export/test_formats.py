"""Files run in their own programs: what each format holds, that a wrong file is found out, and what the program says.

A format whose packages are not installed is skipped.
"""

from __future__ import annotations

import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import lathe
from lathe.adapt import LoraSettings, add_lora
from lathe.errors import LatheError, RequestError
from lathe.export import formats, job
from lathe.export.base import Source
from lathe.export.formats import format_of, missing
from tests.export.models import ARCHITECTURES, model
from tests.export.test_gguf_layouts import HELD as GGUF
from tests.text.samples import trained

CTRANSLATE2 = [
    "t5",
    "t5, other heads, shared layers",
    "t5 1.1",
    "t5, a shallow decoder",
    "bart",
    "mbart",
    "gpt2",
    "gpt2, other heads",
    "llama",
    "llama, grouped and other heads",
    "llama, factorised",
    "qwen2",
    "mistral",
    "bert",
    "bert, other heads",
]
SMALLER = ("float16", "bfloat16", "int16", "int8")
ONNX = ["bert, three labels", "albert"]
CASES = (
    [("ctranslate2", name) for name in CTRANSLATE2] + [("gguf", name) for name in GGUF] + [("onnx", n) for n in ONNX]
)


def _installed(to: str) -> None:
    form = format_of(to)
    absent = missing((*form.writer, *form.runtime))
    if absent:
        pytest.skip(f"{to} wants {', '.join(dict.fromkeys(package.pip for package in absent))}")


def _path(folder: Path, to: str) -> Path:
    return folder / ("model.gguf" if to == "gguf" else "model")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(("to", "name"), CASES)
def test_what_was_written_computes_what_the_model_computes(to: str, name: str, tmp_path: Path) -> None:
    _installed(to)
    exact = {"gguf": "f32"}.get(to, "float32")
    done = job.export(model(name), _path(tmp_path, to), to=to, kind=exact)
    assert done.checked is not None
    assert done.unchecked is None
    assert done.checked.difference.relative_error <= format_of(to).kind(exact).limit  # 0.01 at most
    assert done.checked.difference.agreement >= 0.9
    assert done.nbytes > 10_000


@pytest.mark.parametrize(
    ("to", "kind"),
    [*(("ctranslate2", kind) for kind in SMALLER), *(("gguf", kind) for kind in ("f16", "q8_0", "q4_0"))],
)
def test_smaller_types_are_smaller_and_within_their_bound(to: str, kind: str, tmp_path: Path) -> None:
    _installed(to)
    exact = job.export(
        model("llama"),
        tmp_path / ("exact.gguf" if to == "gguf" else "exact"),
        to=to,
        kind="f32" if to == "gguf" else "float32",
    )
    done = job.export(model("llama"), _path(tmp_path, to), to=to, kind=kind)
    assert done.nbytes < 0.7 * exact.nbytes
    assert done.checked is not None
    assert exact.checked is not None
    assert exact.checked.difference.relative_error < done.checked.difference.relative_error
    assert done.checked.error <= format_of(to).kind(kind).limit
    torch.testing.assert_close(model("llama").tensors()["decoder.norm.weight"], lathe_weights())


def lathe_weights() -> torch.Tensor:
    """A weight of the model, drawn afresh: an export changes none."""
    again = model.__wrapped__("llama")
    weight: torch.Tensor = again.tensors()["decoder.norm.weight"]
    return weight


@pytest.mark.parametrize(("to", "name"), [("ctranslate2", "gpt2"), ("gguf", "gpt2"), ("onnx", "bert")])
def test_a_file_of_other_weights_is_found_out_and_not_left(
    to: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _installed(to)
    form = format_of(to)
    other = {key: tensor.float() for key, tensor in model(name, seed=1).tensors().items()}

    def write_another(source: Source, kind: Any, place: Path) -> list[str]:
        return form.write(Source(source.architecture, other, None, "x"), kind, place)

    changed = type(form)(**{**vars(form), "write": write_another})
    monkeypatch.setattr(job, "format_of", lambda name: changed)
    with pytest.raises(LatheError, match="than the model: the difference is"):
        job.export(model(name), _path(tmp_path, to), to=to)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("to", ["ctranslate2", "gguf"])
def test_a_disk_that_fills_up_is_said_and_nothing_is_left(to: str, tmp_path: Path) -> None:
    _installed(to)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (9_000, hard))
    try:
        with pytest.raises(LatheError, match=r"cannot write .*free some space"):
            job.export(model("gpt2"), _path(tmp_path, to), to=to)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_an_active_adapter_is_folded_in(tmp_path: Path) -> None:
    _installed("ctranslate2")
    adapted = lathe.Model(ARCHITECTURES["gpt2"], model("gpt2").tensors())
    add_lora(adapted, LoraSettings(rank=2))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if ".adapters." in name:
                parameter.add_(0.3 * torch.randn(parameter.shape))
    done = job.export(adapted, tmp_path / "model", to="ctranslate2")
    assert done.checked is not None
    import ctranslate2
    import numpy as np

    row = [5, 9, 33]
    theirs = ctranslate2.Generator(str(tmp_path / "model")).forward_batch([row])
    with torch.inference_mode():
        ours = adapted(torch.tensor([row])).logits
        base = model("gpt2")(torch.tensor([row])).logits
    torch.testing.assert_close(torch.from_numpy(np.asarray(theirs)), ours, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(ours, base, atol=1e-2)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(
    ("to", "name", "kind"),
    [
        ("ctranslate2", "t5", "float32"),
        ("ctranslate2", "llama", "int8"),
        ("gguf", "llama", "f32"),
        ("gguf", "gpt2", "q8_0"),
        ("onnx", "bert, three labels", "float32"),
    ],
)
def test_a_quantised_model_is_exported_as_what_its_codes_stand_for(
    to: str, name: str, kind: str, bits: int, tmp_path: Path
) -> None:
    """The program computes what the codes say, and not what the model was before them."""
    _installed(to)
    rounded = lathe.quantize(lathe.Model(ARCHITECTURES[name], model(name).tensors()), bits=bits, activations="none")
    done = job.export(rounded, _path(tmp_path, to), to=to, kind=kind)
    assert done.checked is not None
    assert done.checked.error <= format_of(to).kind(kind).limit
    before = job.export(model(name), tmp_path / ("before" + _path(tmp_path, to).suffix), to=to, kind=kind)
    assert before.nbytes == pytest.approx(done.nbytes, rel=0.01)


@pytest.mark.parametrize(("name", "convention"), [("t5", "t5"), ("llama", "llama"), ("gpt2", "gpt2"), ("bert", "bert")])
def test_llama_cpp_cuts_text_as_the_tokenizer_does(name: str, convention: str, tmp_path: Path) -> None:
    _installed("gguf")
    tokenizer = trained(convention)
    whole = model(name, tokenizer=tokenizer)
    done = job.export(whole, tmp_path / "model.gguf", to="gguf", kind="f32", tokenizer=tokenizer)
    assert done.checked is not None
    assert done.checked.texts is not None
    odd = [note for note in done.notes if note.startswith("llama.cpp's tokenizer cuts this text otherwise")]
    assert done.checked.texts + len(odd) == 9
    # Of 800 pieces of unigram many a character is none, and llama.cpp spells none in bytes.
    assert done.checked.texts >= {"t5": 1, "bert": 8}.get(convention, 9)


def test_ctranslate2_continues_text_by_the_tokens_of_the_tokenizer(tmp_path: Path) -> None:
    _installed("ctranslate2")
    import ctranslate2

    tokenizer = trained("gpt2")
    whole = model("gpt2", tokenizer=tokenizer)
    job.export(whole, tmp_path / "model", to="ctranslate2", tokenizer=tokenizer)
    ids = tokenizer.encode("The statement")
    generator = ctranslate2.Generator(str(tmp_path / "model"))
    result = generator.generate_batch(
        [tokenizer.pieces(ids)], max_length=8, beam_size=1, include_prompt_in_result=False
    )
    found = result[0].sequences_ids[0]
    ours = whole.generate(torch.tensor([ids]), max_new_tokens=8)[0, len(ids) :].tolist()
    assert len(found) >= 7
    assert found == ours[: len(found)]
    assert lathe.Tokenizer.load(tmp_path / "model").encode("The statement") == ids


def test_a_program_that_is_not_installed_is_said_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gguf")
    real = formats.missing

    def without_llama(packages: Any) -> Any:
        return [package for package in packages if package.module == "llama_cpp"] or real(packages)

    monkeypatch.setattr(job, "missing", without_llama)
    done = model("gpt2").export(tmp_path / "model.gguf", to="gguf")
    assert done.checked is None
    assert done.unchecked == "llama.cpp is not installed: pip install llama-cpp-python"
    assert (tmp_path / "model.gguf").read_bytes()[:4] == b"GGUF"


@pytest.mark.parametrize(
    ("to", "name", "reason"),
    [
        ("ctranslate2", "albert", "ctranslate2 cannot hold this model: .*d_embed is 16"),
        ("ctranslate2", "llama 3.1", "scale as llama3"),
        ("ctranslate2", "bert, three labels", "it has a classifier, and CTranslate2 has none"),
        ("onnx", "t5", "onnx is for encoders"),
        ("onnx", "llama", "it has a decoder, which needs a cache"),
        ("gguf", "bart", "gguf cannot hold this model"),
    ],
)
def test_an_architecture_that_a_format_cannot_hold_is_refused_with_the_reason(
    to: str, name: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "missing", lambda packages: [])
    with pytest.raises(RequestError, match=reason):
        job.export(model(name), _path(tmp_path, to), to=to)
    assert list(tmp_path.iterdir()) == []
