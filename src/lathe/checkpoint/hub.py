"""Checkpoints from the Hugging Face hub, and back to it.

A model is named by a local directory or by a hub id (`gpt2`, `google/flan-t5-small`). A hub id is fetched into
the cache that all Hugging Face libraries share, once per commit. What they understand works here as well,
because `huggingface_hub` does the talking: `HF_ENDPOINT` (another hub), `HF_HOME` and `HF_HUB_CACHE` (where
the cache is), `HF_HUB_OFFLINE=1` (the cache alone), `HF_TOKEN` (private and gated models).

Only what belongs to a checkpoint is fetched: the configuration, the tokenizer, generation settings and chat
templates, and the weights, as safetensors where the repository has them and as PyTorch pickles where it has
nothing else. A file enters the cache when it is complete, so a broken connection leaves no half file.

Needs no torch.
"""

from __future__ import annotations

import errno
import glob
import os
import warnings
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

from lathe.checkpoint.atomic import recover
from lathe.checkpoint.layout import (
    PICKLE,
    PICKLE_INDEX,
    SAFETENSORS,
    SAFETENSORS_INDEX,
    WEIGHT_FILES,
    find_weights,
    one_line,
    read_weight_map,
)
from lathe.errors import LatheError, RequestError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

# Everything but the weights that makes a checkpoint: the names that the Hugging Face libraries give it.
SETTINGS_FILES = (
    "config.json",
    "generation_config.json",
    "lathe.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tokenizer.model",
    "chat_template.json",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
)
_WEIGHT_PATTERNS = (*WEIGHT_FILES, "model-*-of-*.safetensors", "pytorch_model-*-of-*.bin")
_DOCUMENTS = ("README.md", "LICENSE", "LICENSE.*")

_PATIENCE = 10.0  # seconds for the hub to answer at all
_BUSY = frozenset({408, 429})  # ask again later: for a copy in the cache the same as no answer
_UNAUTHORISED = frozenset({401, 403})
_LOG_IN = "log in with `hf auth login` or set HF_TOKEN"


def fetch(
    model: str | os.PathLike[str],
    revision: str | None = None,
    *,
    weights: bool = True,
    local_files_only: bool = False,
) -> Path:
    """The directory of a checkpoint: a local one as it is, a hub id from the cache, downloaded if need be.

    When the hub cannot be reached and the cache has the model, the cached copy is used and a warning says so.

    Args:
        model: a directory, or a hub id (`name` or `organisation/name`). A directory of that name wins.
        revision: a branch, tag or commit of the hub's repository; its main branch if None.
        weights: False leaves the weights out: enough to plan with, or to tokenize.
        local_files_only: use the cache alone and ask the hub nothing (as `HF_HUB_OFFLINE=1` does).

    Raises:
        RequestError: neither a directory nor a model on the hub, no such revision, no access, no weights in it,
            or not in the cache when only the cache may be used.
        LatheError: the hub cannot be reached, or the connection broke.

    Example:
        fetch("google/flan-t5-small")                    # …/snapshots/<commit>
        fetch("meta-llama/Llama-3.1-405B", weights=False)
    """
    name = os.fspath(model)
    local = _local_directory(model, name)
    if local is not None:
        if revision is not None:
            raise RequestError(f"revision={revision!r} was given, but {name} is a local directory: leave it out")
        return local
    with _explained("fetched from", name, revision):
        if local_files_only or _offline():
            return _snapshot(name, revision, weights, cached=True)
        trouble = _trouble_reaching(name, revision)
        if trouble is None:
            return _snapshot(name, revision, weights, cached=False)
    try:
        with _explained("fetched from", name, revision):
            directory = _snapshot(name, revision, weights, cached=True)
    except RequestError as error:
        raise LatheError(
            f"{_endpoint()} cannot be reached ({trouble}) and the cache does not hold {_named(name, revision)}: "
            "check the connection, or give a local directory"
        ) from error
    warnings.warn(
        f"{_endpoint()} cannot be reached ({trouble}): using {_named(name, revision)} from the cache, {directory}",
        stacklevel=2,
    )
    return directory


def push(
    directory: str | os.PathLike[str],
    model_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    message: str = "Upload a checkpoint with Lathe",
) -> str:
    """Share a checkpoint: make a branch of a hub repository hold what `directory` holds, in one commit.

    The repository and the branch are made if they are missing. Only files of a checkpoint go up (settings,
    tokenizer, weights, README, licence), not what else lies in the directory; checkpoint files that the branch
    has and the directory has not are removed in the same commit, so old and new weights never mix.

    Args:
        directory: a checkpoint with weights.
        model_id: `name` (under the logged-in user) or `organisation/name`.
        private: whether a new repository is private; None leaves it to the account's default. For one that
            exists it must be what it is.
        revision: the branch; main if None.
        message: the commit's message.

    Returns:
        The address of the commit.

    Raises:
        RequestError: no weights in `directory`, not logged in, no right to write there, or `private`
            contradicts the repository.
        LatheError: the hub cannot be reached, or the upload broke; the branch is then what it was.
    """
    folder = Path(directory)
    find_weights(folder)
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    mine = {name: path for name, path in sorted(files.items()) if _belongs(name) or _matches(name, _DOCUMENTS)}
    with _explained("shared on", model_id, revision):
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

        if _offline():
            raise RequestError(f"cannot share {model_id}: HF_HUB_OFFLINE is set; unset it to reach {_endpoint()}")
        api = HfApi()
        repository = api.create_repo(model_id, private=private, exist_ok=True).repo_id
        is_private = bool(api.model_info(repository).private)
        if private is not None and private != is_private:
            state = "private" if is_private else "public"
            raise RequestError(
                f"{repository} exists and is {state}, but private={private} was asked for: change it on "
                f"{_endpoint()} first, or choose another name"
            )
        if revision is not None:
            api.create_branch(repository, branch=revision, exist_ok=True)
        there = api.list_repo_files(repository, revision=revision)
        stale = [name for name in there if _belongs(name) and name not in mine]
        commit = api.create_commit(
            repository,
            [
                *(CommitOperationDelete(path_in_repo=name) for name in stale),
                *(CommitOperationAdd(path_in_repo=name, path_or_fileobj=path) for name, path in mine.items()),
            ],
            commit_message=message,
            revision=revision,
        )
        return str(commit.commit_url)


def _local_directory(model: object, name: str) -> Path | None:
    """The local directory that `name` means; None where it can only be a hub id."""
    path = Path(name).expanduser()
    if not path.exists():
        recover(path)
    if name and path.is_dir():  # an empty name would mean the working directory
        return path
    if path.is_file():
        raise RequestError(f"{name} is a file: expected the directory of a checkpoint, or a hub id")
    if not isinstance(model, str) or not name or name.startswith((".", "/", "~")) or name.endswith("/"):
        raise RequestError(f"there is no directory {name!r}: give the directory of a checkpoint, or a hub id")
    return None


# --- the snapshot --------------------------------------------------------------------------------------


def _snapshot(name: str, revision: str | None, weights: bool, *, cached: bool) -> Path:
    directory = _download(name, revision, SETTINGS_FILES, cached)
    if weights:
        # The snapshot is named after its commit: from here on the branch may move on, this stays one checkpoint.
        _download_weights(name, directory, cached)
    return directory


def _download_weights(name: str, directory: Path, cached: bool) -> None:
    commit = directory.name
    for single, index in ((SAFETENSORS, SAFETENSORS_INDEX), (PICKLE, PICKLE_INDEX)):
        _download(name, commit, (single, index), cached)
        if (directory / single).is_file():
            return
        if (directory / index).is_file():
            shards = sorted(set(read_weight_map(directory / index).values()))
            _download(name, commit, [glob.escape(shard) for shard in shards], cached)
            find_weights(directory)
            return
    where = "the cached copy of " if cached else ""
    raise RequestError(
        f"{where}{name} (commit {commit}) has no weights that can be read: expected {SAFETENSORS} or {PICKLE}, "
        "or their shards with an index"
    )


def _download(name: str, revision: str | None, patterns: Sequence[str], cached: bool) -> Path:
    from huggingface_hub import snapshot_download

    # The configuration is in every request, since one that matches no file at all is warned about.
    wanted = ["config.json", *patterns]
    found = snapshot_download(name, revision=revision, allow_patterns=wanted, local_files_only=cached)
    return Path(found)


def _belongs(name: str) -> bool:
    """Whether a file of a repository is part of a checkpoint."""
    return _matches(name, SETTINGS_FILES) or _matches(name, _WEIGHT_PATTERNS)


def _matches(name: str, patterns: Sequence[str]) -> bool:
    # `*` of fnmatch crosses folders; a checkpoint's files do not.
    return any(name.count("/") == pattern.count("/") and fnmatchcase(name, pattern) for pattern in patterns)


# --- the hub and its errors ----------------------------------------------------------------------------


def _endpoint() -> str:
    from huggingface_hub import constants

    return constants.ENDPOINT


def _offline() -> bool:
    from huggingface_hub import constants

    return constants.HF_HUB_OFFLINE


def _trouble_reaching(name: str, revision: str | None) -> str | None:
    """Ask the hub for the model. None if it answered; why not, if it did not. Other answers are raised."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError  # type: ignore[attr-defined]

    try:
        HfApi().model_info(name, revision=revision, timeout=_PATIENCE)
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status < 500 and status not in _BUSY:
            raise
        return f"it answers with status {status}"
    except (HTTPError, OSError) as error:
        return one_line(error)
    except HFValidationError:
        raise
    except (ValueError, KeyError, TypeError, AssertionError) as error:
        raise LatheError(
            f"{_endpoint()} does not answer as a hub does ({one_line(error)}): check HF_ENDPOINT"
        ) from error
    return None


@contextmanager
def _explained(done: str, name: str, revision: str | None) -> Iterator[None]:
    """Turn whatever `huggingface_hub` raises into one line; `done` is what was being done, in its words."""
    try:
        yield
    except LatheError:
        raise
    except Exception as error:
        raise _explain(error, done, name, revision) from error


def _explain(error: Exception, done: str, name: str, revision: str | None) -> LatheError:
    from huggingface_hub import constants, errors

    where = _endpoint()
    if isinstance(error, errors.HFValidationError):
        return RequestError(
            f"{name!r} is neither a directory nor a hub id: expected a path that exists, `name` or `organisation/name`"
        )
    if isinstance(error, errors.GatedRepoError):
        return RequestError(f"{name} is gated: accept its terms at {where}/{name}, then {_LOG_IN}")
    if isinstance(error, errors.RevisionNotFoundError):
        return RequestError(
            f"{name} on {where} has no revision {revision or constants.DEFAULT_REVISION!r}: give a branch, a tag or "
            "a commit of it"
        )
    status = _status(error)
    if isinstance(error, errors.RepositoryNotFoundError) or status == 404:
        return RequestError(
            f"{name} is neither a directory here nor a model on {where}: check the name; if it is private, {_LOG_IN}"
        )
    if status in _UNAUTHORISED:
        return RequestError(f"{where} refuses access to {name} (status {status}): {_LOG_IN}, with the right to it")
    if isinstance(error, errors.LocalEntryNotFoundError) and status is None:
        return _not_cached(error, name, revision)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return LatheError(
            f"the disk is full: {name} does not fit into {constants.HF_HUB_CACHE}; free some space, or set HF_HUB_CACHE"
        )
    reason = f"status {status}" if status is not None else one_line(error)
    return LatheError(f"{name} could not be {done} {where} ({reason}): nothing half is kept there, try again")


def _not_cached(error: Exception, name: str, revision: str | None) -> LatheError:
    """The cache alone was to be used, or the connection was lost between two files."""
    cause = error.__cause__
    if cause is None or _offline():
        return RequestError(
            f"the cache does not hold all of {_named(name, revision)}, and only the cache may be used: fetch it "
            "once with HF_HUB_OFFLINE unset and local_files_only=False, or give a local directory"
        )
    return LatheError(f"{_endpoint()} stopped answering ({one_line(cause)}) while {name} was fetched: try again")


def _status(error: BaseException | None) -> int | None:
    """The HTTP status that `error`, or what it was raised from, carries."""
    while error is not None:
        response = getattr(error, "response", None)
        if response is not None:
            return int(response.status_code)
        error = error.__cause__
    return None


def _named(name: str, revision: str | None) -> str:
    return name if revision is None else f"{name} at revision {revision}"
