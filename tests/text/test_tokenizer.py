"""Loading, saving and asking a tokenizer: roles, sentinels, pieces, and what is refused."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lathe.errors import RequestError
from lathe.text import Tokenizer
from tests.text.samples import SENTENCES, trained, vocabulary_files


def test_t5s_sentinels_come_first_to_last_from_the_end_of_the_vocabulary() -> None:
    tokenizer = trained("t5")
    assert tokenizer.sentinels == tuple(range(799, 699, -1))
    assert tokenizer.pieces(tokenizer.sentinels[:2]) == ["<extra_id_0>", "<extra_id_1>"]
    assert tokenizer.encode("a <extra_id_1> b").count(tokenizer.sentinels[1]) == 1
    assert set(tokenizer.sentinels) < tokenizer.special_ids


def test_sentinels_that_are_pieces_as_in_mt5(tmp_path: Path) -> None:
    files = trained("t5", sentinels=0).files
    document = json.loads(files["tokenizer.json"])
    document["model"]["vocab"] += [["▁<extra_id_1>", -1.0], ["▁<extra_id_0>", -1.0]]
    tokenizer = Tokenizer.from_files({**files, "tokenizer.json": json.dumps(document).encode()})
    assert tokenizer.sentinels == (801, 800)
    assert tokenizer.encode("a <extra_id_0>", add_special_tokens=False)[-1] == 801


def test_roles_that_a_tokenizer_has_not_are_none() -> None:
    tokenizer = trained("t5")
    assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.unk_id) == (0, 1, 2)
    assert (tokenizer.bos_id, tokenizer.mask_id, tokenizer.cls_id, tokenizer.sep_id) == (None,) * 4
    bert = trained("bert")
    assert (bert.pad_id, bert.unk_id, bert.cls_id, bert.sep_id, bert.mask_id) == (0, 1, 2, 3, 4)
    assert (bert.bos_id, bert.eos_id, bert.sentinels) == (None, None, ())


@pytest.mark.parametrize("convention", ["t5", "albert", "bert", "electra", "bart", "gpt2", "llama"])
def test_saved_and_loaded_it_is_the_same_tokenizer(convention: str, tmp_path: Path) -> None:
    tokenizer = trained(convention)
    tokenizer.save(tmp_path / "a")
    loaded = Tokenizer.load(tmp_path / "a")
    assert loaded.files == tokenizer.files
    assert loaded.vocabulary == tokenizer.vocabulary
    assert loaded.encode_batch(SENTENCES) == tokenizer.encode_batch(SENTENCES)
    assert pickle.loads(pickle.dumps(loaded)).encode(SENTENCES[0]) == tokenizer.encode(SENTENCES[0])
    assert len(loaded) == loaded.vocab_size == max(loaded.vocabulary.values()) + 1


def test_every_file_travels_byte_for_byte(tmp_path: Path) -> None:
    files = {
        **trained("llama").files,
        "chat_template.jinja": "{{ bos_token }}{% for m in messages %}…{% endfor %}\r\n".encode(),
        "additional_chat_templates/tools.jinja": b"{{ tools }}",
        "added_tokens.json": b'{"<extra>":   800}',
    }
    for name, data in files.items():
        (tmp_path / "a" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "a" / name).write_bytes(data)
    (tmp_path / "a" / "weights.bin").write_bytes(b"not a tokenizer's")
    Tokenizer.load(tmp_path / "a").save(tmp_path / "b")
    written = {
        p.relative_to(tmp_path / "b").as_posix(): p.read_bytes() for p in (tmp_path / "b").rglob("*") if p.is_file()
    }
    assert written == files


def test_a_class_known_only_from_the_model_is_written_down(tmp_path: Path) -> None:
    directory = tmp_path / "model"
    directory.mkdir()
    for name, data in vocabulary_files(trained("bert")).items():
        (directory / name).write_bytes(data)
    (directory / "tokenizer_config.json").write_text('{"do_lower_case": false, "model_max_length": 512}')
    (directory / "config.json").write_text('{"model_type": "bert"}')
    Tokenizer.load(directory).save(tmp_path / "alone")
    config = json.loads((tmp_path / "alone" / "tokenizer_config.json").read_text())
    assert config == {"do_lower_case": False, "model_max_length": 512, "tokenizer_class": "BertTokenizer"}
    text = "The Statement"
    assert Tokenizer.load(tmp_path / "alone").encode(text) == Tokenizer.load(directory).encode(text)


def test_saving_beside_another_tokenizer_is_refused(tmp_path: Path) -> None:
    trained("bert").save(tmp_path)
    trained("bert").save(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(RequestError, match="already holds another tokenizer"):
        trained("t5").save(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_saving_where_a_file_is_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("here")
    with pytest.raises(RequestError, match="cannot write"):
        trained("bert").save(tmp_path / "file")


def test_a_batch_is_padded_and_cut_by_the_call_alone() -> None:
    files = trained("bert").files
    document = json.loads(files["tokenizer.json"])
    document["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    document["padding"] = {
        "strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
        "pad_token": "[PAD]",
    }  # fmt: skip
    tokenizer = Tokenizer.from_files({**files, "tokenizer.json": json.dumps(document).encode()})
    assert tokenizer.encode(SENTENCES[0]) == trained("bert").encode(SENTENCES[0])


# --- ids that there are not ---------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [800, 10**9, 10**30, -1])
def test_an_id_outside_the_vocabulary_is_named_with_its_place(number: int) -> None:
    tokenizer = trained("t5")
    for ask in (tokenizer.decode, tokenizer.pieces):
        with pytest.raises(RequestError, match=rf"id {number} at position 2 is outside the vocabulary of 800 tokens"):
            ask([5, 6, number])


def test_an_id_without_a_token_can_be_shown_instead() -> None:
    tokenizer = trained("gpt2")
    ids = tokenizer.encode("The statement")
    assert tokenizer.decode([*ids, 500, 501, *ids], errors="replace") == "The statement\ufffd\ufffdThe statement"
    with pytest.raises(RequestError, match="errors='ignore'"):
        tokenizer.decode(ids, errors="ignore")  # type: ignore[arg-type]


def test_rows_of_ids_as_tensors_or_lists_and_nothing_else() -> None:
    import torch

    tokenizer = trained("t5")
    ids = tokenizer.encode("The statement")
    assert tokenizer.decode(torch.tensor(ids)) == tokenizer.decode(tuple(ids)) == "The statement"
    assert tokenizer.decode([]) == ""
    assert tokenizer.decode([*torch.tensor(ids)]) == tokenizer.decode([*torch.tensor(ids).numpy()]) == "The statement"
    bad: list[Any] = [torch.tensor([ids, ids]), [1.5], ["a"], 7]
    for rows in bad:
        with pytest.raises(RequestError):
            tokenizer.decode(rows)


@pytest.mark.parametrize(
    ("text", "said"), [(3, "text 1 is int 3"), (None, "text 1 is NoneType"), ("a\ud83d", "position 1")]
)
def test_what_is_no_text_is_refused(text: Any, said: str) -> None:
    with pytest.raises(RequestError, match=said):
        trained("t5").encode_batch(["fine", text])
    with pytest.raises(RequestError, match="put it in a list"):
        trained("t5").encode_batch("one string")


# --- files that there are not, or that are damaged ------------------------------------------------------------


def test_a_directory_without_a_tokenizer(tmp_path: Path) -> None:
    assert not Tokenizer.is_in(tmp_path)
    with pytest.raises(RequestError, match=r"holds no tokenizer: expected one of tokenizer\.json"):
        Tokenizer.load(tmp_path)
    with pytest.raises(RequestError, match="does not exist"):
        Tokenizer.load(tmp_path / "nowhere")
    (tmp_path / "file").write_text("x")
    with pytest.raises(RequestError, match="is a file, not a directory"):
        Tokenizer.load(tmp_path / "file")


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


Damage = Callable[[dict[str, bytes]], dict[str, bytes]]
DAMAGED: list[tuple[str, Damage, str]] = [
    ("t5", lambda f: {**f, "tokenizer.json": cut(f["tokenizer.json"])}, "tokenizer.json is not readable JSON"),
    ("t5", lambda f: {**f, "tokenizer.json": b"[]"}, "tokenizer.json holds a list"),
    ("t5", lambda f: {**f, "tokenizer.json": b"{}"}, "tokenizer.json holds no vocabulary"),
    ("t5", lambda f: {**f, "tokenizer.json": b'{"model": {"type": "BPE", "vocab": [1]}}'}, "holds no vocabulary"),
    ("t5", lambda f: {**f, "tokenizer.json": b'{"model": {"vocab": {}}, "added_tokens": [1]}'}, "no vocabulary"),
    ("t5", lambda f: {**f, "tokenizer.json": b'{"model": {"type": "X", "vocab": {}}}'}, "tokenizer.json is not a voc"),
    ("t5", lambda f: {**f, "tokenizer_config.json": b"\xff{}"}, "tokenizer_config.json is not readable JSON"),
    ("t5", lambda f: {"spiece.model": f["spiece.model"], **config("T5Tokenizer", pad_token=3)}, "pad_token = 3: exp"),
    ("t5", lambda f: {**f, "tokenizer_config.json": b'{"padding_side": "up"}'}, "padding_side = 'up'"),
    ("t5", lambda f: {**f, "tokenizer_config.json": b'{"added_tokens_decoder": {"x": "y"}}'}, "added_tokens_decoder"),
    ("t5", lambda f: {"spiece.model": cut(f["spiece.model"]), **config("T5Tokenizer")}, "spiece.model is not a Sent"),
    ("t5", lambda f: {"spiece.model": f["spiece.model"]}, "spiece.model alone is not enough.*convention='t5'"),
    ("t5", lambda f: {"spiece.model": f["spiece.model"], **config("BertTokenizer")}, "does not go with BertTokenizer"),
    ("t5", lambda f: {"spiece.model": f["spiece.model"], **config("T5Tokenizer", extra_ids=-1)}, "extra_ids = -1"),
    ("t5", lambda f: {"spiece.model": f["spiece.model"], **config("XTokenizer")}, "names XTokenizer"),
    ("t5", lambda f: {"spiece.model": b"version https://git-lfs.github.com/spec/v1\n"}, "Git LFS pointer"),
    ("bert", lambda f: {"vocab.txt": b"\xff\n", **config("BertTokenizer")}, "vocab.txt is not UTF-8"),
    ("bert", lambda f: {"vocab.txt": b"a\nb\n", **config("BertTokenizer", cls_token=None)}, "no such token"),
    ("gpt2", lambda f: {"vocab.json": f["vocab.json"], **config("GPT2Tokenizer")}, "no merges.txt"),
    ("gpt2", lambda f: {**vocabulary(f), "merges.txt": b"#version\nx y\n"}, "merges.txt line 2 merges 'x y'"),
    ("gpt2", lambda f: {**vocabulary(f), "vocab.json": b'{"a": "b"}'}, "vocab.json is not a map"),
]  # fmt: skip


def config(name: str, **settings: Any) -> dict[str, bytes]:
    return {"tokenizer_config.json": json.dumps({"tokenizer_class": name, **settings}).encode()}


def vocabulary(files: dict[str, bytes]) -> dict[str, bytes]:
    return {"vocab.json": files["vocab.json"], "merges.txt": files["merges.txt"], **config("GPT2Tokenizer")}


@pytest.mark.parametrize(("convention", "damage", "said"), DAMAGED, ids=[said for _, _, said in DAMAGED])
def test_damaged_files_get_one_line_that_names_the_place(
    convention: str, damage: Damage, said: str, tmp_path: Path
) -> None:
    for name, data in damage(trained(convention).files).items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(RequestError, match=said) as caught:
        Tokenizer.load(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_vocabulary_file_alone_with_the_convention_said() -> None:
    files = vocabulary_files(trained("t5", byte_fallback=False))
    tokenizer = Tokenizer.from_files(files, convention="t5")
    assert tokenizer.encode_batch(SENTENCES) == trained("t5", byte_fallback=False).encode_batch(SENTENCES)
    with pytest.raises(RequestError, match="no tokenizer convention 't6': expected one of t5, bert"):
        Tokenizer.from_files(files, convention="t6")


def test_added_tokens_that_leave_ids_out_are_refused() -> None:
    files = trained("t5").files
    document = json.loads(files["tokenizer.json"])
    document["added_tokens"].append({**document["added_tokens"][0], "id": 900, "content": "<late>"})
    with pytest.raises(RequestError, match="'<late>' the id 900, but it follows the others as 800"):
        Tokenizer.from_files({**files, "tokenizer.json": json.dumps(document).encode()})


def test_importing_it_loads_neither_torch_nor_the_libraries() -> None:
    import subprocess
    import sys

    code = "import sys, lathe.text; print({'torch', 'tokenizers', 'sentencepiece'} & set(sys.modules))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "set()\n"


def test_the_hub_fetches_every_file_that_a_tokenizer_can_have() -> None:
    from lathe.checkpoint.hub import SETTINGS_FILES
    from lathe.text import files

    assert {*files.FILES, f"{files.TEMPLATES}/*.jinja"} <= set(SETTINGS_FILES)
