"""The structs and numbers that Python and the native step share, field by field as in `native/*.h`."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_float, c_int32, c_int64, c_void_p

PANEL = 32  # outputs that a packed panel holds

# How a matrix is stored.
FLOAT, BYTE, NIBBLE = range(3)
# What an operation does.
EMBED, NORMALISE, MULTIPLY, SELF_ATTEND, CROSS_ATTEND, KEEP, HIDDEN, MEMORY, REMEMBER, CHOOSE = range(10)
# How a product's parts are put down.
SIDE_BY_SIDE, ADD, GATED = range(3)
# Which rows an operation works on.
TOKENS, KEPT, MEMORY_TOKENS = range(3)
# The place of a buffer that is the caller's logits.
LOGITS = -1


class Linear(ctypes.Structure):
    """A matrix and its bias."""

    _fields_ = [
        ("storage", c_int32),
        ("outputs", c_int32),
        ("inputs", c_int32),
        ("group", c_int32),
        ("exact", c_int32),
        ("weight", c_void_p),
        ("scales", c_void_p),
        ("zeros", c_void_p),
        ("bias", c_void_p),
        ("short_scales", c_void_p),
    ]


class Norm(ctypes.Structure):
    """A norm's weights."""

    _fields_ = [("rms", c_int32), ("width", c_int32), ("eps", c_float), ("weight", c_void_p), ("bias", c_void_p)]


class Op(ctypes.Structure):
    """One operation."""

    _fields_ = [
        ("code", c_int32),
        ("rows", c_int32),
        ("src", c_int32),
        ("dst", c_int32),
        ("norm", c_int32),
        ("parts", c_int32 * 3),
        ("mode", c_int32),
        ("activation", c_int32),
        ("layer", c_int32),
        ("scale", c_float),
    ]


class Embed(ctypes.Structure):
    """What a token's vector is made of."""

    _fields_ = [
        ("table", c_void_p),
        ("codes", c_void_p),
        ("codes_row", c_int64),
        ("scales", c_void_p),
        ("zeros", c_void_p),
        ("bits", c_int32),
        ("groups", c_int32),
        ("types", c_void_p),
        ("positions", c_void_p),
        ("width", c_int32),
        ("scale", c_float),
    ]


class AttentionShape(ctypes.Structure):
    """How every layer of a stack attends."""

    _fields_ = [
        ("heads", c_int32),
        ("groups", c_int32),
        ("d_head", c_int32),
        ("causal", c_int32),
        ("window", c_int32),
        ("rotary", c_int32),
        ("scale", c_float),
    ]


class Spec(ctypes.Structure):
    """A program: its operations and what they read."""

    _fields_ = [
        ("ops", POINTER(Op)),
        ("n_ops", c_int32),
        ("n_hidden_ops", c_int32),
        ("n_logit_ops", c_int32),
        ("n_memory_ops", c_int32),
        ("linears", POINTER(Linear)),
        ("n_linears", c_int32),
        ("norms", POINTER(Norm)),
        ("n_norms", c_int32),
        ("widths", POINTER(c_int32)),
        ("n_widths", c_int32),
        ("vocabulary", c_int32),
        ("embed", Embed),
        ("attention", AttentionShape),
    ]


class Call(ctypes.Structure):
    """One pass of a program."""

    _fields_ = [
        ("batch", c_int32),
        ("columns", c_int32),
        ("ids", c_void_p),
        ("mask", c_void_p),
        ("positions", c_void_p),
        ("types", c_void_p),
        ("lengths", c_void_p),
        ("cache_k", POINTER(c_void_p)),
        ("cache_v", POINTER(c_void_p)),
        ("cache_row", c_int64),
        ("cache_head", c_int64),
        ("first_k", POINTER(c_void_p)),
        ("first_v", POINTER(c_void_p)),
        ("first_head", c_int64),
        ("n_first", c_int32),
        ("memory_k", POINTER(c_void_p)),
        ("memory_v", POINTER(c_void_p)),
        ("memory_row", c_int64),
        ("memory_head", c_int64),
        ("memory_token", c_int64),
        ("memory_first", POINTER(c_int32)),
        ("memory_count", POINTER(c_int32)),
        ("memory_rows", c_int32),
        ("memory_columns", c_int32),
        ("memory", c_void_p),
        ("memory_hidden_row", c_int64),
        ("cos", c_void_p),
        ("sin", c_void_p),
        ("bias", c_void_p),
        ("bias_length", c_int64),
        ("bias_zero", c_int64),
        ("keep", c_int32),
        ("threads", c_int32),
        ("logits", c_void_p),
        ("chosen", c_void_p),
        ("log_probabilities", c_void_p),
        ("hidden", c_void_p),
    ]


class Steps(ctypes.Structure):
    """Several steps of one token a row."""

    _fields_ = [
        ("most", c_int32),
        ("n_ends", c_int32),
        ("nanoseconds", c_int64),
        ("ends", c_void_p),
        ("filler", c_int64),
        ("ended", c_void_p),
        ("tokens", c_void_p),
        ("log_probabilities", c_void_p),
        ("done", c_int32),
    ]
