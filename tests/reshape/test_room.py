"""Whether a resize fits into memory: the estimate holds what is held, and counts only what is done."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import lathe
from lathe.reshape.room import reason_to_stream, resize_bytes
from lathe.reshape.text import TextSettings

SIZES = {"d_model": 256, "d_ff": 32, "vocab_size": 500, "n_heads": 1, "n_kv_heads": 1, "d_head": 32, "n_layers": 12}
LLAMA = lathe.preset("llama-3.2-1b").with_(SIZES)
TEXT = TextSettings(file="text.txt", tokens=4096, rows=16, length=128)
CUT = LLAMA.with_({"d_model": 128})

# In a process of its own, which gives freed memory back at once; a small cut first brings in the libraries.
MEASURE = """
import re, sys
from pathlib import Path
import torch
import lathe
from lathe.reshape import resize

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

def batches(vocab):
    ids = torch.randint(0, vocab, (32, 128), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": part} for part in ids.split(16)]

dtype, sizes = getattr(torch, sys.argv[1]), eval(sys.argv[2])
base = lathe.preset("llama-3.2-1b")
tiny = base.with_(d_model=16, d_ff=16, vocab_size=50, n_heads=1, n_kv_heads=1, d_head=8, n_layers=1)
resize(lathe.Model(tiny, seed=0).to(dtype), {"d_model": 8}, calibrate=batches(50), search=1)
before = peak()
model = lathe.Model(base.with_(sizes), seed=0).to(dtype)
resize(model, {"d_model": 128}, calibrate=batches(500), search=1)
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
@pytest.mark.skipif("LATHE_LARGE" not in os.environ, reason="takes minutes: set LATHE_LARGE=1")
@pytest.mark.parametrize(("dtype", "itemsize"), [("float32", 4), ("bfloat16", 2)])
def test_a_searched_and_fitted_cut_takes_no_more(dtype: str, itemsize: int, monkeypatch: pytest.MonkeyPatch) -> None:
    found = subprocess.run(
        [sys.executable, "-c", MEASURE, dtype, repr(SIZES)],
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    monkeypatch.setattr("lathe.reshape.room._WASTE", 0)
    told = resize_bytes(LLAMA, CUT, itemsize, TEXT)
    assert 0.3 * told < int(found.stdout) < told


@pytest.mark.parametrize("how", [{"search": 0}, {"refit": False}, {"method": "select"}])
def test_only_a_search_takes_what_it_takes(how: dict[str, Any]) -> None:
    assert resize_bytes(LLAMA, CUT, 4, TEXT, how) < 0.7 * resize_bytes(LLAMA, CUT, 4, TEXT)
    narrow = LLAMA.with_({"d_ff": 16})
    assert resize_bytes(LLAMA, narrow, 4, TEXT, how) == resize_bytes(LLAMA, narrow, 4, TEXT)


def test_where_nothing_is_looked_for_nothing_is_counted() -> None:
    bert = lathe.preset("bert-base-uncased")  # its norms' output is the stream
    cut = bert.with_({"d_model": 384})
    assert resize_bytes(bert, cut, 4, TEXT) == resize_bytes(bert, cut, 4, TEXT, {"search": 0})


def test_sixteen_bits_are_fitted_in_thirty_two() -> None:
    assert resize_bytes(LLAMA, CUT, 2, TEXT) > resize_bytes(LLAMA, CUT, 4, TEXT)


def test_a_budget_counts_what_cuts_of_the_width_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = LLAMA.with_(d_model=32, n_layers=1)
    lathe.Model(small, seed=0).save(tmp_path / "small")
    room = resize_bytes(small, small, 4, TEXT)
    monkeypatch.setattr("lathe.reshape.room.free_bytes", lambda device: room)
    assert reason_to_stream(str(tmp_path / "small"), {}, TEXT) == ""
    assert "streaming" in reason_to_stream(str(tmp_path / "small"), {}, TEXT, budget=True)
    assert reason_to_stream(str(tmp_path / "small"), {"d_ff": 16}, TEXT) == ""
