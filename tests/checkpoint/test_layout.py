"""Which files hold the weights, and what is said when they do not."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from lathe.checkpoint.layout import find_weights, one_line, read_weight_map, shard_name
from lathe.errors import RequestError

ALL = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


def _index(directory, name, weight_map):
    (directory / name).write_text(json.dumps({"metadata": {"total_size": 8}, "weight_map": weight_map}))


def test_the_order_of_preference(tmp_path):
    for suffix, shard in (("model.safetensors", "s.safetensors"), ("pytorch_model.bin", "p.bin")):
        (tmp_path / suffix).touch()
        (tmp_path / shard).touch()
        _index(tmp_path, f"{suffix}.index.json", {"a": shard})
    expected = [
        ("model.safetensors", False, False),
        ("s.safetensors", True, False),
        ("pytorch_model.bin", False, True),
        ("p.bin", True, True),
    ]
    for present, (file, indexed, pickled) in zip(ALL, expected):
        weights = find_weights(tmp_path)
        assert weights.files == (tmp_path / file,)
        assert weights.weight_map == ({"a": tmp_path / file} if indexed else None)
        assert weights.index == (tmp_path / present if indexed else None)
        assert weights.pickled == pickled
        (tmp_path / present).unlink()


def test_nothing_to_read(tmp_path):
    with pytest.raises(RequestError, match=r"nowhere does not exist: give a directory that holds model.safetensors"):
        find_weights(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(RequestError, match="file is a file, not a directory"):
        find_weights(tmp_path / "file")
    (tmp_path / "file").unlink()
    with pytest.raises(RequestError, match=r"holds no weights: expected .* or .*; found nothing"):
        find_weights(tmp_path)
    (tmp_path / "config.json").touch()
    (tmp_path / "tf_model.h5").touch()
    with pytest.raises(RequestError, match=r"found config.json, tf_model.h5$"):
        find_weights(tmp_path)


def test_a_missing_shard_is_named(tmp_path):
    _index(tmp_path, "model.safetensors.index.json", {"a": "1.safetensors", "b": "2.safetensors"})
    (tmp_path / "1.safetensors").touch()
    with pytest.raises(RequestError, match=r"index.json names 2.safetensors, which .* does not hold"):
        find_weights(tmp_path)


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/b", "..", ".", "", "a\\b", "a\0b", 3, None])
def test_a_shard_stays_in_its_directory(tmp_path, name):
    _index(tmp_path, "model.safetensors.index.json", {"layer.weight": name})
    with pytest.raises(RequestError) as caught:
        find_weights(tmp_path)
    assert f"says that layer.weight is in {name!r}: expected the name of a file in the same directory" in str(
        caught.value
    )


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000])
def test_an_index_that_cannot_be_read(tmp_path, content):
    path = tmp_path / "model.safetensors.index.json"
    path.write_bytes(content)
    with pytest.raises(RequestError, match=r"index.json is not a readable index of weights: \S") as caught:
        read_weight_map(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', "3"])
def test_an_index_without_a_map(tmp_path, content):
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(content)
    with pytest.raises(RequestError, match="is not an index of weights: it has no weight_map"):
        read_weight_map(path)


def test_shard_names():
    assert [shard_name(n, 3) for n in (1, 2, 3)] == [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
    assert shard_name(1, 1) == "model.safetensors"


def test_one_line():
    assert one_line(ValueError("a\n  b\tc")) == "a b c"
    assert one_line(ValueError()) == "ValueError"
    assert len(one_line("x" * 1000)) == 300


def test_what_moves_files_starts_without_torch():
    code = (
        "import sys, lathe.checkpoint, lathe.checkpoint.atomic, lathe.checkpoint.digest, lathe.checkpoint.hub, "
        "lathe.checkpoint.layout; assert not {'torch', 'huggingface_hub', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path)})
