"""Text to train on and to try, and the tokenizers trained on it, each once for all tests."""

from __future__ import annotations

from functools import cache
from pydoc_data import topics
from typing import Any

from lathe.text import Tokenizer, train_tokenizer

KOREAN = """\
오늘은 날씨가 아주 맑아서 아침 일찍 산책을 나갔다.
공원에는 벌써 많은 사람들이 운동을 하고 있었다.
나는 벤치에 앉아 새로 산 책을 읽기 시작했다.
책의 첫 장은 작은 마을에 사는 소년의 이야기였다.
소년은 매일 저녁 바닷가에서 별을 세곤 했다.
어느 날 그는 별 하나가 바다로 떨어지는 것을 보았다.
이 영화는 처음부터 끝까지 정말 재미있었다.
배우들의 연기가 훌륭하고 음악도 무척 아름다웠다.
하지만 이야기가 조금 길어서 중간에 지루하기도 했다.
다음에 시간이 있으면 친구와 함께 다시 보고 싶다.
파이썬은 배우기 쉽고 강력한 프로그래밍 언어이다.
함수는 이름과 매개변수와 본문으로 이루어진다.
모델의 크기를 줄이면 메모리를 적게 쓰고 더 빨라진다.
토크나이저는 문장을 작은 조각으로 나누는 일을 한다.
조각마다 번호가 있고 모델은 그 번호를 읽는다.
안녕하세요 여러분, 반갑습니다. 오늘도 좋은 하루 되세요.
"""

# Enough for a vocabulary of a thousand, little enough to train on in a moment.
_TOPICS = ("assert", "class", "for", "function", "import", "strings", "while", "with", "yield")
CORPUS = [KOREAN, *(topics.topics[name][:4000] for name in _TOPICS)]

SENTENCES = [
    "The statement is executed.",
    "오늘은 날씨가 맑다. 안녕하세요 여러분!",
    "  two  spaces,\ta tab\nand a line  ",
    "Café À la ``quoted'' don't stop , you 're",
    "ﬁ ① a\u00a0b c\u200bd \x00 \x07",
    "😀👨‍👩‍👧 🇰🇷",
    "<0x41> ▁ </s> <pad> [MASK] y <mask> z <extra_id_0> x <|endoftext|>",
    "1,000,000 2,5 #include <stdio.h>",
    "x" * 150,
    "",
    " ",
]

SIZES = {"bert": 900, "electra": 900, "gpt2": 500, "bart": 500}


@cache
def trained(convention: str, **options: Any) -> Tokenizer:
    """The tokenizer of a convention, trained on CORPUS."""
    return train_tokenizer(CORPUS, SIZES.get(convention, 800), convention=convention, **options)


def vocabulary_files(tokenizer: Tokenizer) -> dict[str, bytes]:
    """The vocabulary files of a family, without the JSON that spells everything out."""
    return {name: data for name, data in tokenizer.files.items() if name not in SPELT_OUT}


SPELT_OUT = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
