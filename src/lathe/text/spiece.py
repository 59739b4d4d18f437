"""A SentencePiece model file (`spiece.model`, `tokenizer.model`, `sentencepiece.bpe.model`): reading, other pieces.

The file is a protocol buffer, `sentencepiece_model.proto` of the SentencePiece project. What matters in it:

    ModelProto      1 pieces (repeated), 2 trainer_spec, 3 normalizer_spec, 4 self_test_data
    SentencePiece   1 piece, 2 score, 3 type
    TrainerSpec     3 model_type, 4 vocab_size, 35 byte_fallback, 40-43 unk_id, bos_id, eos_id, pad_id
    NormalizerSpec  2 precompiled_charsmap

A message is a row of fields, each a varint `number << 3 | wire type` and a value: another varint (wire type 0),
eight bytes (1), a varint length and that many bytes (2), or four bytes (5). That is little enough to read here,
which saves a dependency on protobuf.

Both algorithms give each piece a score. Unigram (Kudo 2018, section 3.2) takes the cut of a word whose pieces'
log probabilities have the largest sum. In BPE the score is minus the rank of a merge; the merges themselves are
not in the file, but follow from it: every way to cut a piece into two others is one (`merges`).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Literal

from lathe.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

_VARINT, _EIGHT_BYTES, _LENGTH, _FOUR_BYTES = 0, 1, 2, 5
_PIECE, _TRAINER, _SELF_TEST = 1, 2, 4  # fields of the whole file
_MODELS: dict[int, Literal["unigram", "bpe"]] = {1: "unigram", 2: "bpe"}


class Kind(IntEnum):
    """What a piece is for."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3  # never found in text: <pad>, </s>
    USER_DEFINED = 4  # always one piece where it stands in text
    UNUSED = 5
    BYTE = 6  # <0x00> … <0xFF>, for characters that no piece holds


@dataclass(frozen=True)
class Piece:
    """One entry of the vocabulary; its place in the list is its id."""

    text: str
    score: float
    kind: Kind


@dataclass(frozen=True)
class SentencePieceModel:
    """What a SentencePiece file holds.

    Attributes:
        charsmap: the compiled table of its normalisation; empty where text is taken as it stands.
    """

    model: Literal["unigram", "bpe"]
    pieces: tuple[Piece, ...]
    byte_fallback: bool
    charsmap: bytes


def parse(data: bytes, name: str) -> SentencePieceModel:
    """Read the bytes of a SentencePiece file; `name` is what errors call it.

    Raises:
        RequestError: the bytes are not a whole SentencePiece model, or of a kind other than unigram and BPE.
    """
    try:
        return _parse(data, name)
    except (IndexError, ValueError, struct.error) as error:
        if isinstance(error, RequestError):
            raise
        raise RequestError(
            f"{name} is not a SentencePiece model, or is cut short: copy or download it again"
            " (a tiktoken file of that name needs the tokenizer.json that stands beside it)"
        ) from error


def merges(pieces: tuple[Piece, ...]) -> list[tuple[str, str]]:
    """The merges of a BPE model, first to be applied first.

    A piece of lower id was merged earlier. Of the ways to make one piece, that with the shorter left part is
    first, as in transformers.
    """
    ids = {piece.text: number for number, piece in enumerate(pieces) if piece.kind == Kind.NORMAL}
    found = [
        (number, cut, text[:cut], text[cut:])
        for text, number in ids.items()
        for cut in range(1, len(text))
        if text[:cut] in ids and text[cut:] in ids
    ]
    return [(left, right) for _, _, left, right in sorted(found)]


def with_pieces(data: bytes, name: str, pieces: Sequence[Piece], places: Mapping[int, int]) -> bytes:
    """The bytes of a SentencePiece file with other pieces; everything else in it stays as it is.

    Sentences that the file would test itself with are left out, since their pieces may be gone.

    Args:
        places: where each of the old pieces stands now; those that are gone are missing.
    """
    parse(data, name)
    out = [_encoded(_PIECE, _piece_bytes(piece)) for piece in pieces]
    for field, value, raw in _raw_fields(data):
        if field == _TRAINER:
            out.append(_encoded(_TRAINER, _trainer_bytes(_bytes(value), len(pieces), places)))
        elif field not in (_PIECE, _SELF_TEST):
            out.append(raw)
    return b"".join(out)


def _piece_bytes(piece: Piece) -> bytes:
    kind = b"" if piece.kind == Kind.NORMAL else _encoded(3, int(piece.kind))
    score = bytes([2 << 3 | _FOUR_BYTES]) + struct.pack("<f", piece.score)
    return _encoded(1, piece.text.encode("utf-8")) + score + kind


def _trainer_bytes(data: bytes, count: int, places: Mapping[int, int]) -> bytes:
    """The trainer's settings with the places of the special pieces as they are now."""
    out = []
    for field, value, raw in _raw_fields(data):
        if field == 4:
            raw = _encoded(4, count)
        elif 40 <= field <= 43:
            # A negative number, which stands for none, is written as 64 bits.
            place = _number(value)
            raw = _encoded(field, place if place >> 63 else places.get(place, (1 << 64) - 1))
        out.append(raw)
    return b"".join(out)


def _encoded(field: int, value: int | bytes) -> bytes:
    """One field of a message."""
    if isinstance(value, int):
        return _varint_bytes(field << 3 | _VARINT) + _varint_bytes(value)
    return _varint_bytes(field << 3 | _LENGTH) + _varint_bytes(len(value)) + value


def _varint_bytes(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _parse(data: bytes, name: str) -> SentencePieceModel:
    pieces: list[Piece] = []
    trainer: bytes | None = None
    normalizer: bytes | None = None
    for field, value in _fields(data):
        if field == 1:
            pieces.append(_piece(_bytes(value)))
        elif field == 2:
            trainer = _bytes(value)
        elif field == 3:
            normalizer = _bytes(value)
    # The settings follow the pieces, so a file without them is cut short.
    if trainer is None or normalizer is None or not pieces:
        raise ValueError("no pieces or no settings")
    settings = dict(_fields(trainer))
    model = _MODELS.get(_number(settings.get(3, 1)))
    if model is None:
        raise RequestError(f"{name} is a SentencePiece model of words or characters: expected unigram or BPE")
    return SentencePieceModel(
        model=model,
        pieces=tuple(pieces),
        byte_fallback=bool(settings.get(35, 0)),
        charsmap=_bytes(dict(_fields(normalizer)).get(2, b"")),
    )


def _piece(data: bytes) -> Piece:
    fields = dict(_fields(data))
    (score,) = struct.unpack("<f", _bytes(fields.get(2, b"\0\0\0\0")))
    return Piece(
        _bytes(fields[1]).decode("utf-8") if 1 in fields else "", score, Kind(_number(fields.get(3, Kind.NORMAL)))
    )


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The fields of one message: number and value."""
    return ((number, value) for number, value, _ in _raw_fields(data))


def _raw_fields(data: bytes) -> Iterator[tuple[int, int | bytes, bytes]]:
    """The fields of one message: number, value, and the bytes that both stand in."""
    at = 0
    while at < len(data):
        start = at
        key, at = _varint(data, at)
        number, wire = key >> 3, key & 7
        if wire == _VARINT:
            value, at = _varint(data, at)
            yield number, value, data[start:at]
            continue
        if wire == _LENGTH:
            length, at = _varint(data, at)
        elif wire in (_EIGHT_BYTES, _FOUR_BYTES):
            length = 8 if wire == _EIGHT_BYTES else 4
        else:
            raise ValueError(f"wire type {wire}")
        if number == 0 or at + length > len(data):
            raise ValueError("a field reaches past the end")
        yield number, data[at : at + length], data[start : at + length]
        at += length


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """The number that starts at `at`, seven bits a byte, lowest first; and where the next thing starts."""
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
        if shift > 63:
            raise ValueError("a number of more than 64 bits")


def _bytes(value: int | bytes) -> bytes:
    if not isinstance(value, bytes):
        raise ValueError("a number where bytes were expected")
    return value


def _number(value: int | bytes) -> int:
    if not isinstance(value, int):
        raise ValueError("bytes where a number was expected")
    return value
