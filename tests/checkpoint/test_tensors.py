"""Tensors in and out: held against safetensors, torch and huggingface_hub, and against damaged files."""

from __future__ import annotations

import json
import os
import pickle
import resource
import subprocess
import sys
import textwrap
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from lathe.checkpoint.atomic import atomic_directory
from lathe.checkpoint.tensors import open_tensors, write_tensors
from lathe.errors import LatheError, RequestError

DTYPES = [
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.uint16,
    torch.uint32,
    torch.uint64,
    torch.bool,
]


def _model() -> dict[str, Tensor]:
    return {
        "embed.weight": torch.randn(7, 4),
        "layer.0.weight": torch.randn(4, 4),
        "layer.0.bias": torch.randn(4),
        "layer.1.weight": torch.randn(4, 4).to(torch.bfloat16),
        "scale": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
        "steps": torch.arange(3),
    }


def _bytes(tensor: Tensor) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).tolist())


def _same(first: Tensor, second: Tensor) -> bool:
    return (first.dtype, first.shape, _bytes(first)) == (second.dtype, second.shape, _bytes(second))


def _assert_holds(directory: Path, expected: dict[str, Tensor]) -> None:
    with open_tensors(directory) as source:
        assert sorted(source.names()) == sorted(expected)
        assert len(source) == len(expected)
        for name, tensor in expected.items():
            assert name in source
            assert source.shape(name) == tuple(tensor.shape)
            assert source.dtype(name) == tensor.dtype
            assert _same(source.tensor(name), tensor)
        assert source.nbytes == sum(tensor.nbytes for tensor in expected.values())
        assert {name for name, _ in source.items()} == set(expected)


# --- round trips ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("shard", [10**9, 120, 64, 1])
def test_what_is_written_is_read(tmp_path, shard):
    model = _model()
    files = write_tensors(tmp_path, model, max_shard_bytes=shard)
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in files}
    _assert_holds(tmp_path, model)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype(tmp_path, dtype):
    tensors = {"a": torch.randint(0, 2, (3, 5)).to(dtype), "b": torch.ones(2, dtype=torch.float32)}
    write_tensors(tmp_path, tensors)
    _assert_holds(tmp_path, tensors)
    loaded = load_file(tmp_path / "model.safetensors")
    assert all(_same(loaded[name], tensor) for name, tensor in tensors.items())


def test_tensors_that_are_not_contiguous_or_share_memory(tmp_path):
    base = torch.randn(6, 4)
    tensors = {"base": base, "turned": base.T, "part": base[1:3], "columns": base[:, ::2], "tied": base}
    tensors["repeated"] = torch.randn(1, 4).expand(3, 4)
    tensors["learnt"] = torch.nn.Parameter(torch.randn(2, 2))
    write_tensors(tmp_path, tensors)
    _assert_holds(tmp_path, {name: tensor.detach() for name, tensor in tensors.items()})


def test_the_bytes_are_those_of_the_safetensors_library(tmp_path):
    tensors = {
        "b.é": torch.randn(3),
        "a\t": torch.randn(2, 2).half(),
        "z": torch.arange(3),
        "flag": torch.tensor([True]),
    }
    tensors |= {"bf": torch.randn(2).bfloat16(), "u8": torch.ones(3, dtype=torch.uint8)}
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    (tmp_path / "ours").mkdir()
    (ours,) = write_tensors(tmp_path / "ours", tensors)
    assert ours.read_bytes() == (tmp_path / "theirs").read_bytes()


def test_the_same_tensors_give_the_same_bytes(tmp_path):
    model = _model()
    outcomes = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        files = write_tensors(tmp_path / name, iter(model.items()), max_shard_bytes=100, metadata={"z": "1", "a": "2"})
        outcomes.append({path.name: path.read_bytes() for path in files})
    assert outcomes[0] == outcomes[1]


def test_every_tensor_starts_at_a_multiple_of_its_element(tmp_path):
    (path,) = write_tensors(tmp_path, {"odd": torch.ones(3, dtype=torch.int8), "wide": torch.ones(1).double()})
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    assert length % 8 == 0
    assert header["wide"]["data_offsets"] == [0, 8]
    assert header["odd"]["data_offsets"] == [8, 11]


# --- the layout of shards ------------------------------------------------------------------------------


@settings(max_examples=25)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=12),
    limit=st.integers(1, 20),
)
def test_shards_are_those_of_huggingface_hub(tmp_path_factory, sizes, limit):
    directory = tmp_path_factory.mktemp("shards")
    tensors = {f"t{number}": torch.zeros(size, dtype=torch.int8) for number, size in enumerate(sizes)}
    files = write_tensors(directory, tensors, max_shard_bytes=limit)
    split = split_torch_state_dict_into_shards(
        tensors, max_shard_size=limit, filename_pattern="model{suffix}.safetensors"
    )
    written = {path.name: set(load_file(path)) for path in files if path.suffix == ".safetensors"}
    assert written == {name: set(tensors) for name, tensors in split.filename_to_tensors.items()}
    if split.is_sharded:
        index = json.loads((directory / "model.safetensors.index.json").read_text())
        assert index == {"metadata": split.metadata, "weight_map": split.tensor_to_filename}


def test_transformers_opens_the_shards(tmp_path):
    from transformers import BertConfig, BertModel

    config = BertConfig(vocab_size=11, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12)
    twin = BertModel(config)
    config.save_pretrained(tmp_path)
    files = write_tensors(tmp_path, twin.state_dict(), max_shard_bytes=1000)
    assert len(files) > 3
    loaded, info = BertModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert all(_same(loaded.state_dict()[name], tensor) for name, tensor in twin.state_dict().items())


def test_lathe_opens_the_shards_of_transformers(tmp_path):
    from transformers import BertConfig, BertModel

    config = BertConfig(vocab_size=11, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12)
    twin = BertModel(config)
    twin.save_pretrained(tmp_path, max_shard_size=1000)
    assert (tmp_path / "model.safetensors.index.json").is_file()
    _assert_holds(tmp_path, dict(twin.state_dict()))


def test_at_most_one_shard_of_an_iterable_is_held(tmp_path):
    alive: set[int] = set()
    most = 0

    class Tracked(Tensor):
        def __del__(self) -> None:
            alive.discard(id(self))

    def made():
        nonlocal most
        for number in range(12):
            tensor = torch.full((4,), float(number)).as_subclass(Tracked)
            alive.add(id(tensor))
            most = max(most, len(alive))
            yield f"t{number}", tensor
            del tensor

    files = write_tensors(tmp_path, made(), max_shard_bytes=3 * 16)
    assert len(files) == 5
    assert most <= 4  # a shard, and the tensor that did not fit into it


# --- writing: errors -----------------------------------------------------------------------------------


def test_old_weights_are_not_mixed_with_new_ones(tmp_path):
    write_tensors(tmp_path, {"a": torch.ones(1)})
    with pytest.raises(RequestError, match=r"already holds model.safetensors: write to a new directory"):
        write_tensors(tmp_path, {"a": torch.zeros(1)})
    with pytest.raises(RequestError, match="is not a directory: make it before"):
        write_tensors(tmp_path / "none", {"a": torch.zeros(1)})
    _assert_holds(tmp_path, {"a": torch.ones(1)})


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, "there are no tensors to write"),
        ([("a", torch.ones(1)), ("a", torch.ones(1))], "tensor a was given twice"),
        ([("a", torch.ones(4)), ("b", torch.ones(4).to_sparse())], "b is a tensor of torch.float32, torch.sparse_coo"),
        ({"a": torch.empty(2, device="meta")}, "on meta: expected a dense tensor"),
        ({"a": torch.ones(2, dtype=torch.complex64)}, "a is a tensor of torch.complex64"),
        ({"__metadata__": torch.ones(1)}, "cannot be named __metadata__"),
    ],
)
def test_what_cannot_be_written(tmp_path, tensors, message):
    with pytest.raises(ValueError, match=message):
        write_tensors(tmp_path, tensors, max_shard_bytes=1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("limit", [0, -1])
def test_a_shard_holds_something(tmp_path, limit):
    with pytest.raises(RequestError, match=f"max_shard_bytes is {limit}: expected at least 1 byte"):
        write_tensors(tmp_path, {"a": torch.ones(1)}, max_shard_bytes=limit)


@contextmanager
def _files_of_at_most(nbytes: int) -> Iterator[None]:
    """The kernel refuses to let a file of this process grow beyond that."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def _save(target: Path, tensors: Mapping[str, Tensor], shard: int) -> None:
    with atomic_directory(target, nbytes=600_000) as folder:
        write_tensors(folder, tensors, max_shard_bytes=shard)


def test_a_full_disk_leaves_no_half_checkpoint(tmp_path):
    tensors = {"a": torch.ones(50_000), "b": torch.ones(100_000)}
    target = tmp_path / "model"
    with pytest.raises(LatheError) as caught, _files_of_at_most(300_000):
        _save(target, tensors, 200_000)
    assert str(caught.value).startswith(f"cannot write {target}: File too large; raise the limit")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(OSError, match="File too large"), _files_of_at_most(300_000):
        write_tensors(tmp_path, tensors, max_shard_bytes=200_000)
    assert list(tmp_path.iterdir()) == []


# --- memory --------------------------------------------------------------------------------------------


MEASURE = """
    import json, re, sys, torch
    from pathlib import Path
    from lathe.checkpoint.tensors import open_tensors, write_tensors

    # 16 tensors of 12 MiB: 192 MiB, in one file or in 4 shards
    ROWS, COLUMNS, COUNT, SHARDS = 1024, 3072, 16, 4
    SHARD = COUNT // SHARDS * ROWS * COLUMNS * 4

    def write_pickles(directory, tensors):
        names = {}
        for number in range(SHARDS):
            part = dict(next(tensors) for _ in range(COUNT // SHARDS))
            torch.save(part, directory / f"part{number}.bin")
            names.update(dict.fromkeys(part, f"part{number}.bin"))
        (directory / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": names}))

    def memory(kind):
        return int(re.search(kind + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

    def measure(form, write):
        directory = Path(sys.argv[1], form)
        directory.mkdir()
        write(directory, ((f"t{n}", torch.full((ROWS, COLUMNS), float(n))) for n in range(COUNT)))
        Path("/proc/self/clear_refs").write_text("5")  # the peak so far was the writing's
        before = memory("VmRSS")
        with open_tensors(directory) as source:
            opened = memory("VmHWM") - before
            model = {name: torch.empty(source.shape(name)) for name in source.names()}
            for name, tensor in source.items():
                model[name].copy_(tensor)
        assert all((model[f"t{n}"] == n).all() for n in range(COUNT))
        print(form, opened / source.nbytes, (memory("VmHWM") - before) / source.nbytes)

    measure("file", write_tensors)
    measure("shards", lambda *both: write_tensors(*both, max_shard_bytes=SHARD))
    measure("pickles", write_pickles)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="measured through /proc")
def test_a_model_never_stands_in_memory_twice(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(MEASURE), tmp_path],
        capture_output=True,
        text=True,
        check=False,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(sys.path),
            "OMP_NUM_THREADS": "1",
            "MALLOC_MMAP_THRESHOLD_": "1048576",  # what is freed goes back to the system at once
        },
    )
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [form for form, _, _ in lines] == ["file", "shards", "pickles"]
    assert all(float(opened) < 0.1 for _, opened, _ in lines), lines  # to open is to read the headers
    # The model, and the part of the files that is mapped at the moment.
    assert all(1.0 <= float(peak) < 1.4 for _, _, peak in lines), lines


def test_changing_a_tensor_changes_neither_the_file_nor_the_next_read(tmp_path):
    (path,) = write_tensors(tmp_path, {"a": torch.ones(3), "b": torch.ones(1)})
    before = path.read_bytes()
    source = open_tensors(tmp_path)
    tensor = source.tensor("a")
    source.close()
    tensor.mul_(5)
    assert tensor.tolist() == [5, 5, 5]
    assert path.read_bytes() == before
    _assert_holds(tmp_path, {"a": torch.ones(3), "b": torch.ones(1)})


def test_a_directory_can_be_replaced_while_its_tensors_are_in_use(tmp_path):
    target = tmp_path / "model"
    with atomic_directory(target) as folder:
        write_tensors(folder, {"a": torch.arange(3.0)})
    with open_tensors(target) as source, atomic_directory(target, replace=True) as folder:
        write_tensors(folder, ((name, tensor * 2) for name, tensor in source.items()))
        kept = source.tensor("a")
    assert kept.tolist() == [0, 1, 2]
    _assert_holds(target, {"a": torch.arange(3.0) * 2})


def test_two_versions_of_a_checkpoint_are_never_mixed(tmp_path):
    target = tmp_path / "model"
    for version in (1.0, 2.0):
        with atomic_directory(target, replace=True) as folder:
            write_tensors(folder, {"a": torch.full((2,), version), "b": torch.full((2,), version)}, max_shard_bytes=8)
        if version == 1.0:
            source = open_tensors(target)
            assert source.tensor("a").tolist() == [1, 1]
    with pytest.raises(LatheError, match=r"model-00002-of-00002.safetensors changed while tensors were read from it"):
        source.tensor("b")


def test_a_closed_source_reads_no_more(tmp_path):
    write_tensors(tmp_path, {"a": torch.ones(1)})
    with open_tensors(tmp_path) as source:
        tensor = source.tensor("a")
        with pytest.raises(KeyError):
            source.tensor("b")
    assert tensor.item() == 1
    with pytest.raises(ValueError, match="closed"):
        source.tensor("a")


def test_names_come_file_after_file(tmp_path):
    model = {f"t{number}": torch.ones(4) for number in range(6)}
    write_tensors(tmp_path, model, max_shard_bytes=32)
    with open_tensors(tmp_path) as source:
        files = [source.files[name].name for name in source.names()]
    assert files == sorted(files)
    assert files[0] == "model-00001-of-00003.safetensors"


# --- reading damaged safetensors -----------------------------------------------------------------------


def _refused(directory: Path) -> str:
    with pytest.raises(RequestError) as caught:
        open_tensors(directory)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@settings(max_examples=25)
@given(keep=st.integers(0, 299))
def test_a_truncated_file(tmp_path_factory, keep):
    directory = tmp_path_factory.mktemp("truncated")
    (path,) = write_tensors(directory, {"a": torch.ones(10), "b": torch.ones(30)})
    path.write_bytes(path.read_bytes()[:keep])
    message = _refused(directory)
    assert message.startswith(f"{path} is not a readable file of safetensors (")
    assert message.endswith("): copy or download it again")


@pytest.mark.parametrize(
    "content",
    [
        b"\xff" * 64,
        b"hello, world, this is no header",
        (2).to_bytes(8, "little") + b"[]",
        (2).to_bytes(8, "little") + b"\xff\xff",
        (74).to_bytes(8, "little")
        + b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]},"b":{"dtype":"F32"}}'
        + bytes(4),
        (62).to_bytes(8, "little") + b'{"a":{"dtype":"F32","shape":[18446744073709551615],"data_offse',
    ],
)
def test_a_bad_header(tmp_path, content):
    (tmp_path / "model.safetensors").write_bytes(content)
    assert "is not a readable file of safetensors (" in _refused(tmp_path)


def test_a_pointer_of_git_lfs(tmp_path):
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    for name in ("model.safetensors", "pytorch_model.bin"):
        (tmp_path / name).write_text(text)
        assert (
            _refused(tmp_path) == f"{tmp_path / name} is a Git LFS pointer, not the weights: run `git lfs pull` there"
        )
        (tmp_path / name).unlink()


def test_a_dtype_that_torch_does_not_have_plainly(tmp_path):
    header = b'{"a":{"dtype":"F8_E8M0","shape":[2],"data_offsets":[0,2]}}'
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(2))
    assert "model.safetensors: a has dtype F8_E8M0; expected one of BOOL, U8" in _refused(tmp_path)


def test_nothing_there(tmp_path):
    assert "holds no weights" in _refused(tmp_path)


def _shards(directory: Path, held: dict[str, dict[str, Tensor]], weight_map: dict[str, str]) -> None:
    for name, tensors in held.items():
        save_file(tensors, directory / name)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_an_index_that_names_what_the_shard_does_not_hold(tmp_path):
    _shards(tmp_path, {"1": {"a": torch.ones(1)}, "2": {"b": torch.ones(1)}}, {"a": "1", "b": "2", "c": "2"})
    assert _refused(tmp_path).endswith("index.json says that c is in 2, which does not hold it")
    _shards(tmp_path, {}, {"a": "2", "b": "2"})
    assert _refused(tmp_path).endswith("index.json says that a is in 2, which does not hold it")


def test_a_missing_and_an_escaping_shard(tmp_path):
    _shards(tmp_path, {"1": {"a": torch.ones(1)}}, {"a": "1", "b": "2"})
    assert "names 2, which" in _refused(tmp_path)
    _shards(tmp_path, {}, {"a": "../1"})
    assert "'../1': expected the name of a file in the same directory" in _refused(tmp_path)


def test_the_index_chooses_between_two_shards_and_nothing_else_does(tmp_path):
    held = {"1": {"a": torch.ones(1), "x": torch.ones(1)}, "2": {"b": torch.ones(1), "x": torch.zeros(1)}}
    _shards(tmp_path, held, {"a": "1", "b": "2", "x": "2"})
    _assert_holds(tmp_path, {"a": torch.ones(1), "b": torch.ones(1), "x": torch.zeros(1)})
    _shards(tmp_path, {}, {"a": "1", "b": "2"})
    assert "2 and 1 in" in _refused(tmp_path)


def test_a_tensor_that_the_index_does_not_name_is_not_dropped(tmp_path):
    _shards(tmp_path, {"1": {"a": torch.ones(1), "x": torch.zeros(1)}}, {"a": "1"})
    _assert_holds(tmp_path, {"a": torch.ones(1), "x": torch.zeros(1)})


# --- PyTorch pickles -----------------------------------------------------------------------------------


@pytest.mark.parametrize("mapped", [True, False], ids=["zip", "before 1.6"])
def test_a_pickle(tmp_path, mapped):
    model = {**_model(), "learnt": torch.nn.Parameter(torch.randn(3))}
    torch.save(OrderedDict(model), tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=mapped)
    _assert_holds(tmp_path, {name: tensor.detach() for name, tensor in model.items()})


def test_tied_and_partial_tensors_of_a_pickle(tmp_path):
    table = torch.randn(6, 4)
    model = {"embed": table, "head": table, "rows": table[2:4], "turned": table.T}
    torch.save(model, tmp_path / "pytorch_model.bin")
    _assert_holds(tmp_path, model)
    (tmp_path / "again").mkdir()
    with open_tensors(tmp_path) as source:
        write_tensors(tmp_path / "again", source.items())
    _assert_holds(tmp_path / "again", model)


def test_sharded_pickles(tmp_path):
    model = _model()
    names = list(model)
    parts = {"p1.bin": names[:3], "p2.bin": names[3:]}
    for file, part in parts.items():
        torch.save({name: model[name] for name in part}, tmp_path / file)
    weight_map = {name: file for file, part in parts.items() for name in part}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    _assert_holds(tmp_path, model)


def test_safetensors_are_preferred(tmp_path):
    torch.save({"a": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    _assert_holds(tmp_path, {"a": torch.ones(1)})


class Code:
    """What a malicious checkpoint holds: an object that runs something while it is read."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize("mapped", [True, False], ids=["zip", "before 1.6"])
def test_a_pickle_with_code_is_refused_and_not_run(tmp_path, mapped):
    trace = tmp_path / "it ran"
    torch.save(
        {"a": torch.ones(1), "b": Code(trace)}, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=mapped
    )
    message = _refused(tmp_path)
    assert "holds more than tensors: reading it would call posix.mkdir, which Lathe never allows" in message
    assert not trace.exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_plain_pickle_with_code_is_not_run(tmp_path):
    trace = tmp_path / "it ran"
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps({"a": Code(trace)}, protocol))
        _refused(tmp_path)
        assert not trace.exists()


def test_a_whole_module_is_refused(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "pytorch_model.bin")
    assert "it would call torch.nn.modules.linear.Linear" in _refused(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.ones(1)], "holds an object of type list: expected a dictionary of name to tensor"),
        (torch.ones(1), "holds a tensor of torch.float32"),
        ({"epoch": 3}, "'epoch' is an object of type int; expected a dictionary of name to dense tensor"),
        ({"model": {"a": torch.ones(1)}}, "'model' is an object of type dict; expected"),
        ({1: torch.ones(1)}, "1 is a tensor of torch.float32, torch.strided, on cpu; expected a dictionary of name"),
        ({"a": torch.ones(2).to_sparse()}, "'a' is a tensor of torch.float32, torch.sparse_coo"),
    ],
)
def test_a_pickle_of_something_else(tmp_path, content, message):
    torch.save(content, tmp_path / "pytorch_model.bin")
    assert message in _refused(tmp_path)


@pytest.mark.parametrize("content", [b"", b"hello world", b"PK\x03\x04 and no more", b"\x80\x02}q\x00."])
def test_a_file_that_is_no_pickle_of_torch(tmp_path, content):
    (tmp_path / "pytorch_model.bin").write_bytes(content)
    assert "is not a readable file of PyTorch weights (" in _refused(tmp_path)


@pytest.mark.parametrize("keep", [0.05, 0.5, 0.95])
def test_a_truncated_pickle(tmp_path, keep):
    path = tmp_path / "pytorch_model.bin"
    torch.save(_model(), path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    assert "is not a readable file of PyTorch weights (" in _refused(tmp_path)
