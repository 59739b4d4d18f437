"""Chat templates by name, for models whose tokenizers bring none.

Each is written from what the model's makers published about its format:

- `alpaca`: `PROMPT_DICT["prompt_no_input"]` and the targets in `train.py` of github.com/tatsu-lab/stanford_alpaca:
  the answer follows "### Response:" at once and ends with the end-of-sequence token. Alpaca was trained on single
  instructions; further turns repeat the two headings. A system message takes the place of the opening sentence.
- `vicuna`: version 1.1 and later, `conv_vicuna_v1.1` in `fastchat/conversation.py` of github.com/lm-sys/FastChat.
  A system message takes the place of the opening sentences.
- `llama-2`: `chat_completion` in `llama/generation.py` of github.com/meta-llama/llama: the system message stands
  within the first instruction, and each pair of messages in `<s>` and `</s>`.
- `llama-3`: `ChatFormat` in `llama/tokenizer.py` of github.com/meta-llama/llama3: each message after its role and
  before `<|eot_id|>`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Template:
    """A template and the tokens that it marks turns with, without which it would be spelled in pieces."""

    source: str
    tokens: tuple[str, ...] = ()


# The system message comes off the front; the other turns have to alternate, as the models were trained.
_TURNS = """\
{%- set system = messages[0].content | trim if messages[0].role == "system" else none -%}
{%- set turns = messages if system is none else messages[1:] -%}
{%- for turn in turns -%}
{%- if turn.role != ("user" if loop.index0 % 2 == 0 else "assistant") -%}
{{- raise_exception("after a system message, messages have to alternate: user, assistant, user") -}}
{%- endif -%}
{%- endfor -%}
"""

ALPACA = (
    "{{- bos_token -}}\n"
    + _TURNS
    + """\
{%- if system is none -%}
{%- set system = "Below is an instruction that describes a task. " +
    "Write a response that appropriately completes the request." -%}
{%- endif -%}
{{- system -}}
{%- for turn in turns -%}
{%- if turn.role == "user" -%}
{{- "\\n\\n### Instruction:\\n" + turn.content | trim + "\\n\\n### Response:" -}}
{%- else -%}
{{- turn.content | trim -}}{{- eos_token -}}
{%- endif -%}
{%- endfor -%}
"""
)

VICUNA = (
    "{{- bos_token -}}\n"
    + _TURNS
    + """\
{%- if system is none -%}
{%- set system = "A chat between a curious user and an artificial intelligence assistant. " +
    "The assistant gives helpful, detailed, and polite answers to the user's questions." -%}
{%- endif -%}
{{- system + " " -}}
{%- for turn in turns -%}
{%- if turn.role == "user" -%}
{{- "USER: " + turn.content | trim + " " -}}
{%- else -%}
{{- "ASSISTANT: " + turn.content | trim -}}{{- eos_token -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- "ASSISTANT:" -}}
{%- endif -%}
"""
)

LLAMA_2 = (
    _TURNS
    + """\
{%- for turn in turns -%}
{%- if turn.role == "user" -%}
{%- set content = turn.content -%}
{%- if loop.first and system is not none -%}
{%- set content = "<<SYS>>\\n" + messages[0].content + "\\n<</SYS>>\\n\\n" + content -%}
{%- endif -%}
{{- bos_token -}}{{- "[INST] " + content | trim + " [/INST]" -}}
{%- else -%}
{{- " " + turn.content | trim + " " -}}{{- eos_token -}}
{%- endif -%}
{%- endfor -%}
"""
)

LLAMA_3 = """\
{{- bos_token -}}
{%- for message in messages -%}
{{- "<|start_header_id|>" + message.role + "<|end_header_id|>\\n\\n" + message.content | trim + "<|eot_id|>" -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- "<|start_header_id|>assistant<|end_header_id|>\\n\\n" -}}
{%- endif -%}
"""

TEMPLATES: dict[str, Template] = {
    "alpaca": Template(ALPACA),
    "vicuna": Template(VICUNA),
    "llama-2": Template(LLAMA_2),
    "llama-3": Template(LLAMA_3, ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")),
}
