"""Chat templates: the text and ids of stock transformers, the formats as their makers published them, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lathe.errors import RequestError
from lathe.text import Tokenizer
from lathe.text.templates import TEMPLATES
from tests.text.samples import trained

transformers = pytest.importorskip("transformers")

USER = {"role": "user", "content": " Why is the sky blue? "}
TALK = [USER, {"role": "assistant", "content": "Light.\n"}, {"role": "user", "content": "한국어로 <b>?"}]
SYSTEM = {"role": "system", "content": "Be brief."}
HEADERS = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]

# One that uses what the environment has to give: controls, filters, the white space rules, generation marks.
RICH = """\
{# white space #}
{% set names = namespace(count=0) %}
{% for message in messages %}
    {% if message.role == "tool" %}
        {% continue %}
    {% endif %}
    {% set names.count = names.count + 1 %}
<{{ message.role }} n="{{ names.count }}">{{ message | tojson }}
    {% if message.role == "assistant" %}
        {% set tone = "kind" %}
        {% generation %}
            {% set tone = "strict" %}
{{ message.content }}{{ tone }}{{ eos_token }}
        {% endgeneration %}
{{ tone }}
    {% endif %}
    {% if loop.index > 5 %}{% break %}{% endif %}
{% endfor %}
{{ mood is defined and mood }}{{ tools is none }}{{ dict(a=1)["a"] }}
{% if add_generation_prompt %}<assistant>{% endif %}"""


def write(tokenizer: Tokenizer, directory: Path, template: Any, where: str) -> Path:
    """The tokenizer with a template in a directory."""
    tokenizer.save(directory)
    if where == "file":
        (directory / "chat_template.jinja").write_text(template, encoding="utf-8")
    else:
        config = directory / "tokenizer_config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), "chat_template": template}))
    return directory


def agree(directory: Path, messages: list[dict[str, Any]], **options: Any) -> None:
    ours, theirs = Tokenizer.load(directory), transformers.AutoTokenizer.from_pretrained(directory)
    for prompt in (False, True):
        text = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt, **options)
        assert ours.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt, **options) == text
        ids = theirs.apply_chat_template(messages, return_dict=False, add_generation_prompt=prompt, **options)
        assert ours.apply_chat_template(messages, add_generation_prompt=prompt, **options) == ids


def with_headers() -> Tokenizer:
    """A byte-level tokenizer with Llama 3's marks."""
    files = trained("gpt2").files
    config = {**json.loads(files["tokenizer_config.json"]), "additional_special_tokens": HEADERS}
    return Tokenizer.from_files({**files, "tokenizer_config.json": json.dumps(config).encode()})


@pytest.mark.parametrize("where", ["file", "setting"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_the_built_in_templates_are_those_of_transformers_ids(name: str, where: str, tmp_path: Path) -> None:
    tokenizer = with_headers() if name == "llama-3" else trained("llama")
    directory = write(tokenizer, tmp_path / "model", tokenizer.chat_template(name), where)
    for messages in ([USER], TALK, [SYSTEM, *TALK]):
        agree(directory, messages)
        loaded = Tokenizer.load(directory)
        assert loaded.apply_chat_template(messages) == tokenizer.apply_chat_template(messages, chat_template=name)


@pytest.mark.parametrize("where", ["file", "setting"])
def test_what_the_environment_gives_is_what_transformers_gives(where: str, tmp_path: Path) -> None:
    directory = write(trained("llama"), tmp_path / "model", RICH, where)
    talk: list[dict[str, Any]] = [
        SYSTEM,
        *TALK,
        {"role": "tool", "content": None, "name": "x", "parts": [{"text": "<&>", "n": 1.5}]},
        USER,
    ]
    agree(directory, talk)
    agree(directory, talk, mood="merry")


def test_several_templates_have_names_and_files_go_before_the_setting(tmp_path: Path) -> None:
    listed = [{"name": "default", "template": "d"}, {"name": "rag", "template": "r{{ messages[0].content }}"}]
    directory = write(trained("llama"), tmp_path / "model", listed, "setting")
    agree(directory, [USER])
    agree(directory, [USER], chat_template="rag")
    (directory / "chat_template.jinja").write_text("file", encoding="utf-8")
    (directory / "additional_chat_templates").mkdir()
    (directory / "additional_chat_templates" / "more.jinja").write_text("m", encoding="utf-8")
    agree(directory, [USER])
    agree(directory, [USER], chat_template="more")
    assert set(Tokenizer.load(directory).chat_templates) == {"default", "more"}
    Tokenizer.load(directory).save(tmp_path / "saved")
    assert Tokenizer.load(tmp_path / "saved").files == Tokenizer.load(directory).files


def test_what_transformers_saves_is_read(tmp_path: Path) -> None:
    stock = transformers.AutoTokenizer.from_pretrained(
        write(trained("llama"), tmp_path / "model", TEMPLATES["vicuna"].source, "setting")
    )
    stock.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "chat_template.jinja").is_file()
    agree(tmp_path / "saved", [SYSTEM, *TALK])


def text(name: str, messages: list[dict[str, Any]], prompt: bool = False) -> str:
    tokenizer = with_headers() if name == "llama-3" else trained("llama")
    found = tokenizer.apply_chat_template(messages, chat_template=name, tokenize=False, add_generation_prompt=prompt)
    assert tokenizer.bos_id is not None
    return found.replace(tokenizer.pieces([tokenizer.bos_id])[0], "<s>", 1) if name == "llama-3" else found


@pytest.mark.parametrize(
    ("name", "plain", "whole"),
    [
        (
            "llama-2",
            "<s>[INST] Why is the sky blue? [/INST]",
            (
                "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\n Why is the sky blue? [/INST] Light. </s>"
                "<s>[INST] 한국어로 <b>? [/INST]"
            ),
        ),
        (
            "llama-3",
            (
                "<s><|start_header_id|>user<|end_header_id|>\n\nWhy is the sky blue?<|eot_id|>"
                "<|start_header_id|>assistant<|end_header_id|>\n\n"
            ),
            (
                "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
                "<|start_header_id|>user<|end_header_id|>\n\nWhy is the sky blue?<|eot_id|>"
                "<|start_header_id|>assistant<|end_header_id|>\n\nLight.<|eot_id|>"
                "<|start_header_id|>user<|end_header_id|>\n\n한국어로 <b>?<|eot_id|>"
                "<|start_header_id|>assistant<|end_header_id|>\n\n"
            ),
        ),
        (
            "vicuna",
            (
                "<s>A chat between a curious user and an artificial intelligence assistant. The assistant gives "
                "helpful, detailed, and polite answers to the user's questions. USER: Why is the sky blue? ASSISTANT:"
            ),
            "<s>Be brief. USER: Why is the sky blue? ASSISTANT: Light.</s>USER: 한국어로 <b>? ASSISTANT:",
        ),
        (
            "alpaca",
            (
                "<s>Below is an instruction that describes a task. Write a response that appropriately completes the "
                "request.\n\n### Instruction:\nWhy is the sky blue?\n\n### Response:"
            ),
            (
                "<s>Be brief.\n\n### Instruction:\nWhy is the sky blue?\n\n### Response:Light.</s>"
                "\n\n### Instruction:\n한국어로 <b>?\n\n### Response:"
            ),
        ),
    ],
)
def test_the_built_in_templates_are_the_published_formats(name: str, plain: str, whole: str) -> None:
    assert text(name, [USER], prompt=True) == plain
    assert text(name, [SYSTEM, *TALK], prompt=True) == whole


@pytest.mark.parametrize(
    ("messages", "options", "says"),
    [
        ([], {"chat_template": "vicuna"}, "expected a list of at least one message"),
        ("hello", {"chat_template": "vicuna"}, "expected a list of at least one message"),
        (["hello"], {"chat_template": "vicuna"}, "message 0 is 'hello'"),
        ([[USER]], {"chat_template": "vicuna"}, "message 0 is [{"),
        ([{**USER, "image": object()}], {"chat_template": "vicuna"}, "holds a object"),
        ([USER, USER], {"chat_template": "llama-2"}, "have to alternate"),
        ([USER], {}, "no chat template, as a base model's has none"),
        ([USER], {"chat_template": "vicunia"}, "expected alpaca, vicuna, llama-2, llama-3"),
        ([USER], {"chat_template": "llama-3"}, "which this tokenizer lacks"),
        ([USER], {"chat_template": "{% if %}"}, "not jinja that can be run"),
        ([USER], {"chat_template": "{{ ''.__class__.__mro__ }}{{ ''.__class__.mro() }}"}, "does not take these"),
        ([USER], {"chat_template": "{{ messages[3].content.x }}"}, "does not take these messages"),
        ([USER], {"chat_template": "{{ messages.append(1) }}"}, "does not take these messages"),
        ([USER], {"chat_template": "vicuna", "mood": "merry"}, "reads no such variable"),
        ([USER], {"chat_template": "vicuna", "tools": [{}]}, "tools: not supported"),
        ([USER], {"chat_template": "vicuna", "documents": [{}]}, "documents: not supported"),
    ],
)
def test_what_cannot_be_rendered_is_refused_in_one_line(messages: Any, options: dict[str, Any], says: str) -> None:
    with pytest.raises(RequestError) as refused:
        trained("llama").apply_chat_template(messages, **options)
    assert says in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("setting", [3, [{"name": "x"}], ["x"], [{"name": 1, "template": "x"}]])
def test_a_damaged_template_setting_is_refused(setting: Any, tmp_path: Path) -> None:
    directory = write(trained("llama"), tmp_path / "model", setting, "setting")
    with pytest.raises(RequestError, match="neither a text nor a list"):
        Tokenizer.load(directory).apply_chat_template([USER])


def test_a_template_that_is_not_text_is_refused(tmp_path: Path) -> None:
    directory = write(trained("llama"), tmp_path / "model", "x", "file")
    (directory / "chat_template.jinja").write_bytes(b"\xff{{ messages }}")
    with pytest.raises(RequestError, match=r"chat_template\.jinja is not UTF-8"):
        Tokenizer.load(directory).apply_chat_template([USER])
