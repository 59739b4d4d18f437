"""Fetching from and sharing on a hub: the real client against a small local server.

`huggingface_hub` reads its environment when it is imported, so the calls are made in processes of their own,
each with the environment that a user would set.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lathe.checkpoint.hub import fetch
from lathe.errors import RequestError
from tests.hub_server import TOKEN, USER, HubServer

CONFIG = b'{"model_type": "none"}'
WEIGHTS = bytes(range(256)) * 40
SINGLE = {"config.json": CONFIG, "model.safetensors": WEIGHTS}
SHARDED = {
    "config.json": CONFIG,
    "tokenizer.json": b"{}",
    "generation_config.json": b"{}",
    "chat_template.jinja": b"{{ messages }}",
    "model-00001-of-00002.safetensors": WEIGHTS,
    "model-00002-of-00002.safetensors": WEIGHTS[::-1],
    "model.safetensors.index.json": json.dumps(
        {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    ).encode(),
}

LOOP = """
import json, sys, warnings
from lathe.checkpoint import hub
from lathe.errors import LatheError
assert "torch" not in sys.modules
for line in sys.stdin:
    name, args, kwargs = json.loads(line)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            answer = {"value": str(getattr(hub, name)(*args, **kwargs))}
        except LatheError as error:
            answer = {"error": str(error), "exit_code": error.exit_code}
    answer["warnings"] = [str(w.message) for w in caught if issubclass(w.category, UserWarning)]
    print(json.dumps(answer), flush=True)
"""


class Client:
    """A process that calls `lathe.checkpoint.hub` in a given environment."""

    def __init__(self, endpoint: str, cache: Path, **environment: str) -> None:
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGINGFACE"))}
        added = {
            "HF_ENDPOINT": endpoint,
            "HF_HOME": str(cache),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
            "PYTHONPATH": os.pathsep.join(sys.path),
            **environment,
        }
        self.process = subprocess.Popen(
            [sys.executable, "-c", LOOP],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**kept, **added},
        )

    def call(self, name: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps([name, args, kwargs]) + "\n")
        self.process.stdin.flush()
        answer: dict[str, Any] = json.loads(self.process.stdout.readline())
        return answer

    def fetch(self, *args: Any, **kwargs: Any) -> Path:
        answer = self.call("fetch", *args, **kwargs)
        assert "value" in answer, answer
        assert answer["warnings"] == []
        return Path(answer["value"])

    def error(self, name: str, *args: Any, **kwargs: Any) -> tuple[str, int]:
        answer = self.call(name, *args, **kwargs)
        assert "error" in answer, answer
        assert "\n" not in answer["error"]
        return answer["error"], answer["exit_code"]

    def close(self) -> None:
        self.process.communicate()


@pytest.fixture(scope="module")
def hub():
    with HubServer() as server:
        yield server


@pytest.fixture(autouse=True)
def _fresh(hub):
    hub.requests.clear()
    hub.status = 0
    hub.broken.clear()


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


def _client(endpoint: str, cache: Path, **environment: str):
    client = Client(endpoint, cache, **environment)
    yield client
    client.close()


@pytest.fixture(scope="module")
def client(hub, cache):
    yield from _client(hub.url, cache)


@pytest.fixture(scope="module")
def offline(hub, cache):
    yield from _client(hub.url, cache, HF_HUB_OFFLINE="1")


@pytest.fixture(scope="module")
def unreachable(cache):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound but not listening: a connection is refused
        yield from _client(f"http://127.0.0.1:{unused.getsockname()[1]}", cache)


@pytest.fixture(scope="module")
def member(hub, tmp_path_factory):
    yield from _client(hub.url, tmp_path_factory.mktemp("member"), HF_TOKEN=TOKEN)


def _contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


# --- local directories ---------------------------------------------------------------------------------


def test_a_local_directory_is_itself(tmp_path, monkeypatch):
    (tmp_path / "gpt2").mkdir()
    monkeypatch.chdir(tmp_path)
    assert fetch(tmp_path / "gpt2") == tmp_path / "gpt2"
    assert fetch("gpt2") == Path("gpt2")
    with pytest.raises(RequestError, match=r"revision='main' was given, but gpt2 is a local directory"):
        fetch("gpt2", "main")


@pytest.mark.parametrize("name", ["./missing", "/no/such/place", "missing/", "../up", ""])
def test_a_path_that_is_not_there_is_not_taken_for_a_hub_id(name):
    with pytest.raises(RequestError, match="there is no directory"):
        fetch(name)


def test_a_path_object_is_never_a_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RequestError, match="there is no directory 'gpt2'"):
        fetch(Path("gpt2"))


def test_a_file_is_not_a_checkpoint(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(RequestError, match="is a file: expected the directory of a checkpoint"):
        fetch(str(tmp_path / "model.safetensors"))


# --- fetching ------------------------------------------------------------------------------------------


def test_fetch_brings_the_checkpoint_and_nothing_else(hub, client, cache):
    others = {"README.md": b"#", "pytorch_model.bin": b"x", "onnx/config.json": b"{}", "training_args.bin": b"x"}
    commit = hub.add("team/sharded", {**SHARDED, **others})
    directory = client.fetch("team/sharded")
    assert directory == cache / "hub" / "models--team--sharded" / "snapshots" / commit
    assert _contents(directory) == SHARDED


def test_an_id_without_an_organisation(hub, client):
    hub.add("plain", SINGLE)
    assert _contents(client.fetch("plain")) == SINGLE


def test_a_renamed_repository_is_followed(hub, client):
    hub.add("new/home", SINGLE)
    hub.renamed["oldname"] = "new/home"
    assert _contents(client.fetch("oldname")) == SINGLE


def test_a_second_fetch_downloads_nothing(hub, client):
    hub.add("team/twice", SINGLE)
    first = client.fetch("team/twice")
    assert sorted(hub.downloads()) == ["config.json", "model.safetensors"]
    hub.requests.clear()
    assert client.fetch("team/twice") == first
    assert hub.downloads() == []


def test_without_weights_only_the_settings_travel(hub, client):
    hub.add("team/large", SHARDED)
    directory = client.fetch("team/large", weights=False)
    assert set(_contents(directory)) == {name for name in SHARDED if not name.startswith("model")}
    assert _contents(client.fetch("team/large")) == SHARDED


def test_one_file_is_preferred_to_shards_and_safetensors_to_pickles(hub, client):
    hub.add("team/both", {**SHARDED, "model.safetensors": WEIGHTS})
    assert not any(name.startswith("model-0") for name in _contents(client.fetch("team/both")))


def test_pickles_come_where_there_is_nothing_else(hub, client):
    index = json.dumps({"weight_map": {"a": "pytorch_model-00001-of-00001.bin"}}).encode()
    single = {"config.json": CONFIG, "pytorch_model.bin": WEIGHTS}
    sharded = {
        "config.json": CONFIG,
        "pytorch_model.bin.index.json": index,
        "pytorch_model-00001-of-00001.bin": WEIGHTS,
    }
    hub.add("team/pickled", {**single, "adapter_model.safetensors": b""})
    hub.add("team/pickles", sharded)
    assert _contents(client.fetch("team/pickled")) == single
    assert _contents(client.fetch("team/pickles")) == sharded


def test_revisions(hub, client):
    old = hub.add("team/moving", {**SINGLE, "vocab.txt": b"old"})
    hub.repositories["team/moving"].refs["v1.0"] = old
    new = hub.add("team/moving", {**SINGLE, "vocab.txt": b"new"})
    assert client.fetch("team/moving").name == new
    assert client.fetch("team/moving", "main").name == new
    for revision in ("v1.0", old):
        directory = client.fetch("team/moving", revision)
        assert (directory.name, (directory / "vocab.txt").read_bytes()) == (old, b"old")


def test_a_connection_that_ends_once_is_taken_up_again(hub, client):
    hub.add("team/shaky", SINGLE)
    hub.interrupted["model.safetensors"] = 1000
    assert _contents(client.fetch("team/shaky")) == SINGLE
    assert hub.downloads().count("model.safetensors") == 2


def test_private_and_gated_models_open_with_a_token(hub, member):
    hub.add("team/secret", SINGLE, private=True)
    hub.add("team/gated", SINGLE, gated=True)
    for name in ("team/secret", "team/gated"):
        assert _contents(member.fetch(name)) == SINGLE


# --- the cache alone -----------------------------------------------------------------------------------


def test_offline_the_cache_is_enough(hub, client, offline):
    hub.add("team/kept", SHARDED)
    directory = client.fetch("team/kept")
    hub.requests.clear()
    assert offline.fetch("team/kept") == directory
    assert client.fetch("team/kept", local_files_only=True) == directory
    assert client.fetch("team/kept", directory.name, local_files_only=True) == directory
    assert hub.requests == []


def test_offline_and_not_in_the_cache(hub, client, offline):
    hub.add("team/unknown", SINGLE)
    for message, code in (
        offline.error("fetch", "team/unknown"),
        client.error("fetch", "team/unknown", local_files_only=True),
    ):
        assert message.startswith("the cache does not hold all of team/unknown, and only the cache may be used")
        assert code == 2
    assert hub.requests == []


def test_offline_a_part_of_a_checkpoint_is_not_a_checkpoint(hub, client, offline):
    hub.add("team/part", SHARDED)
    directory = client.fetch("team/part", weights=False)
    assert offline.fetch("team/part", weights=False) == directory
    message, code = offline.error("fetch", "team/part")
    assert "the cache does not hold all of team/part" in message
    assert code == 2


def test_an_unreachable_hub_falls_back_to_the_cache_and_says_so(hub, client, unreachable):
    hub.add("team/saved", SINGLE)
    directory = client.fetch("team/saved")
    answer = unreachable.call("fetch", "team/saved")
    assert answer["value"] == str(directory)
    (warning,) = answer["warnings"]
    assert "cannot be reached" in warning
    assert f"using team/saved from the cache, {directory}" in warning


def test_a_hub_that_is_down_falls_back_to_the_cache_and_says_so(hub, client):
    hub.add("team/served", SINGLE)
    directory = client.fetch("team/served")
    hub.status = 503
    answer = client.call("fetch", "team/served")
    assert answer["value"] == str(directory)
    assert "it answers with status 503" in answer["warnings"][0]


# --- errors --------------------------------------------------------------------------------------------


def test_neither_a_directory_nor_a_model(hub, client):
    message, code = client.error("fetch", "team/nothing")
    assert message.startswith(f"team/nothing is neither a directory here nor a model on {hub.url}: check the name")
    assert code == 2


@pytest.mark.parametrize("name", ["three/part/name", "not an id", "double--dash", "x" * 100])
def test_what_cannot_be_a_hub_id(client, name):
    message, code = client.error("fetch", name)
    assert message == (
        f"{name!r} is neither a directory nor a hub id: expected a path that exists, `name` or `organisation/name`"
    )
    assert code == 2


def test_a_revision_that_is_not_there(hub, client):
    hub.add("team/revised", SINGLE)
    message, code = client.error("fetch", "team/revised", "v9")
    assert message == (f"team/revised on {hub.url} has no revision 'v9': give a branch, a tag or a commit of it")
    assert code == 2


def test_a_mirror_that_says_no_more_than_not_found(hub, client):
    hub.status = 404
    message, code = client.error("fetch", "team/mirrored")
    assert "team/mirrored is neither a directory here nor a model on" in message
    assert code == 2


def test_a_gated_model(hub, client):
    hub.add("team/closed", SINGLE, gated=True)
    message, code = client.error("fetch", "team/closed")
    assert message.startswith(f"team/closed is gated: accept its terms at {hub.url}/team/closed, then log in")
    assert code == 2


def test_a_private_model_looks_as_if_it_were_not_there(hub, client):
    hub.add("team/private", SINGLE, private=True)
    message, code = client.error("fetch", "team/private")
    assert "if it is private, log in with `hf auth login` or set HF_TOKEN" in message
    assert code == 2


def test_a_wrong_token(hub, tmp_path):
    hub.add("team/plain", SINGLE)
    stranger = Client(hub.url, tmp_path, HF_TOKEN="hf_wrong")
    message, code = stranger.error("fetch", "team/plain")
    assert "refuses access to team/plain (status 401)" in message
    assert code == 2
    stranger.close()


def test_a_refused_connection(unreachable):
    message, code = unreachable.error("fetch", "team/never-seen")
    assert "cannot be reached" in message
    assert "the cache does not hold team/never-seen: check the connection" in message
    assert code == 1


def test_something_that_is_not_a_hub(hub, client, tmp_path):
    hub.status = 200
    message, code = client.error("fetch", "team/model")
    assert "does not answer as a hub does" in message
    assert "check HF_ENDPOINT" in message
    assert code == 1


def test_a_connection_that_breaks_leaves_nothing_half(hub, client, cache):
    hub.add("team/broken", SINGLE)
    hub.broken["model.safetensors"] = 3000
    message, code = client.error("fetch", "team/broken")
    assert message.startswith(f"team/broken could not be fetched from {hub.url} (")
    assert code == 1
    stored = cache / "hub" / "models--team--broken"
    assert [path.read_bytes() for path in (stored / "blobs").iterdir()] == [CONFIG]
    assert not list(stored.rglob("*.incomplete"))
    hub.broken.clear()
    assert _contents(client.fetch("team/broken")) == SINGLE


def test_a_repository_without_weights(hub, client):
    commit = hub.add("team/empty", {"config.json": CONFIG, "model.gguf": b"GGUF"})
    message, code = client.error("fetch", "team/empty")
    assert message == (
        f"team/empty (commit {commit}) has no weights that can be read: expected model.safetensors or "
        "pytorch_model.bin, or their shards with an index"
    )
    assert code == 2


def test_an_index_that_points_out_of_the_repository(hub, client):
    index = json.dumps({"weight_map": {"a": "../../secrets"}}).encode()
    hub.add("team/evil", {"config.json": CONFIG, "model.safetensors.index.json": index})
    message, code = client.error("fetch", "team/evil")
    assert "'../../secrets': expected the name of a file in the same directory" in message
    assert code == 2


def test_an_index_that_names_a_shard_that_is_not_there(hub, client):
    hub.add("team/torn", {name: data for name, data in SHARDED.items() if "00002-of" not in name})
    message, code = client.error("fetch", "team/torn")
    assert "names model-00002-of-00002.safetensors, which" in message
    assert code == 2


# --- sharing -------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    directory = tmp_path / "checkpoint"
    (directory / "logs").mkdir(parents=True)
    for name, content in {**SHARDED, "README.md": b"# A model\n", "optimizer.pt": b"x", "logs/a": b"x"}.items():
        (directory / name).write_bytes(content)
    return directory


def test_push_then_fetch(hub, member, checkpoint):
    answer = member.call("push", str(checkpoint), "mine", private=True, message="First")
    repository = hub.repositories[f"{USER}/mine"]
    assert answer["value"] == f"{hub.url}/{USER}/mine/commit/{repository.refs['main']}"
    assert repository.private
    assert repository.messages[repository.refs["main"]] == "First"
    assert set(repository.files()) == {*SHARDED, "README.md", ".gitattributes"}
    assert _contents(member.fetch(f"{USER}/mine")) == SHARDED


def test_push_removes_the_weights_that_were_there_before(hub, member, checkpoint):
    hub.add(f"{USER}/again", {"model.safetensors": WEIGHTS, "vocab.txt": b"old", "notes.md": b"kept"})
    assert "value" in member.call("push", str(checkpoint), f"{USER}/again")
    assert set(hub.repositories[f"{USER}/again"].files()) == {*SHARDED, "README.md", "notes.md"}


def test_push_to_a_branch_leaves_main_alone(hub, member, checkpoint):
    hub.add(f"{USER}/branched", {"model.safetensors": WEIGHTS})
    assert "value" in member.call("push", str(checkpoint), f"{USER}/branched", revision="cut")
    assert set(hub.repositories[f"{USER}/branched"].files()) == {"model.safetensors"}
    assert set(hub.repositories[f"{USER}/branched"].files("cut")) == {*SHARDED, "README.md"}


def test_push_never_publishes_what_was_to_be_private(hub, member, checkpoint):
    before = hub.add(f"{USER}/public", SINGLE)
    message, code = member.error("push", str(checkpoint), f"{USER}/public", private=True)
    assert f"{USER}/public exists and is public, but private=True was asked for" in message
    assert code == 2
    assert hub.repositories[f"{USER}/public"].refs["main"] == before


def test_push_needs_a_login(hub, client, checkpoint):
    message, code = client.error("push", str(checkpoint), f"{USER}/anonymous")
    assert f"refuses access to {USER}/anonymous (status 401): log in" in message
    assert code == 2
    assert f"{USER}/anonymous" not in hub.repositories


def test_push_offline(hub, offline, checkpoint):
    message, code = offline.error("push", str(checkpoint), f"{USER}/anonymous")
    assert "HF_HUB_OFFLINE is set" in message
    assert code == 2


def test_push_of_a_directory_without_weights_asks_nothing_of_the_hub(hub, member, tmp_path):
    message, code = member.error("push", str(tmp_path), f"{USER}/hollow")
    assert "holds no weights" in message
    assert code == 2
    assert hub.requests == []
