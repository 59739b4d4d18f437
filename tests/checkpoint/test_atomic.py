"""All or nothing: what is left on the disk after saves that end well, badly, or by a kill."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from lathe.checkpoint import atomic
from lathe.checkpoint.atomic import atomic_directory, atomic_file, recover, scratch_directory
from lathe.errors import LatheError, RequestError


def _tree(directory: Path) -> dict[str, str]:
    """Every file below `directory`, hidden ones too, with its text."""
    return {path.relative_to(directory).as_posix(): path.read_text() for path in directory.rglob("*") if path.is_file()}


def _old(target: Path) -> dict[str, str]:
    target.mkdir()
    (target / "config.json").write_text("old")
    (target / "extra").write_text("old")
    return {"config.json": "old", "extra": "old"}


def _save(target: Path, fill: Callable[[Path], object], save: Any = atomic_directory, **options: Any) -> None:
    with save(target, **options) as temporary:
        fill(temporary)


def _python(code: str, *arguments: object) -> list[str]:
    return [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]


@pytest.fixture(autouse=True)
def _path_for_processes(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))


# --- saves that end well -------------------------------------------------------------------------------


def test_the_directory_appears_whole(tmp_path):
    target = tmp_path / "runs" / "first" / "model"
    with atomic_directory(target) as folder:
        (folder / "nested").mkdir()
        (folder / "nested" / "a").write_text("A")
        (folder / "b").write_text("B")
        assert not target.exists()
        assert folder.parent == target.parent
    assert _tree(tmp_path) == {"runs/first/model/nested/a": "A", "runs/first/model/b": "B"}
    assert list(target.parent.iterdir()) == [target]


def test_the_directory_has_the_usual_permissions(tmp_path):
    (tmp_path / "plain").mkdir()
    with atomic_directory(tmp_path / "saved"):
        pass
    with atomic_file(tmp_path / "file"):
        pass
    (tmp_path / "plain file").touch()
    assert (tmp_path / "saved").stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "plain file").stat().st_mode


def test_an_empty_directory_may_be_there_already(tmp_path):
    (tmp_path / "model").mkdir()
    with atomic_directory(tmp_path / "model") as folder:
        (folder / "a").write_text("A")
    assert _tree(tmp_path) == {"model/a": "A"}


@pytest.mark.parametrize("exchange", [True, False])
def test_replacing_takes_all_of_the_old_away(tmp_path, monkeypatch, exchange):
    if not exchange:  # a filesystem that cannot let two directories change places
        monkeypatch.setattr(atomic, "_exchange", lambda first, second: False)
    target = tmp_path / "model"
    _old(target)
    with atomic_directory(target, replace=True) as folder:
        (folder / "config.json").write_text("new")
    assert _tree(tmp_path) == {"model/config.json": "new"}
    assert list(tmp_path.iterdir()) == [target]


def test_directories_change_places_in_one_step_here(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "is").write_text(name)
    assert atomic._exchange(tmp_path / "a", tmp_path / "b")
    assert _tree(tmp_path) == {"a/is": "b", "b/is": "a"}


def test_a_link_is_followed(tmp_path):
    _old(tmp_path / "step-1")
    (tmp_path / "latest").symlink_to("step-1")
    with atomic_directory(tmp_path / "latest", replace=True) as folder:
        (folder / "config.json").write_text("new")
    assert (tmp_path / "latest").is_symlink()
    assert _tree(tmp_path / "step-1") == {"config.json": "new"}


def test_a_file_appears_whole_and_keeps_its_suffix_on_the_way(tmp_path):
    target = tmp_path / "plots" / "loss.svg"
    with atomic_file(target) as temporary:
        assert temporary.suffix == ".svg"
        temporary.write_text("<svg/>")
        assert not target.exists()
    with atomic_file(target, replace=True) as temporary:
        temporary.write_text("<svg>2</svg>")
    assert _tree(tmp_path) == {"plots/loss.svg": "<svg>2</svg>"}


# --- saves that end badly ------------------------------------------------------------------------------


def _half(error: type[BaseException]) -> Callable[[Path], None]:
    """Something that begins to write and then fails."""

    def fill(temporary: Path) -> None:
        (temporary / "config.json" if temporary.is_dir() else temporary).write_text("half")
        raise error

    return fill


def _never(temporary: Path) -> None:
    pytest.fail(f"the save should have been refused, but {temporary} was to be filled")


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("save", [atomic_directory, atomic_file])
def test_nothing_is_left_of_a_save_that_fails(tmp_path, save, error):
    with pytest.raises(error):
        _save(tmp_path / "runs" / "new" / "model", _half(error), save)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("exchange", [True, False])
def test_a_failed_replacement_leaves_the_old_one(tmp_path, monkeypatch, exchange):
    if not exchange:
        monkeypatch.setattr(atomic, "_exchange", lambda first, second: False)
    target = tmp_path / "model"
    old = _old(target)
    with pytest.raises(RuntimeError):
        _save(target, _half(RuntimeError), replace=True)
    assert _tree(target) == old
    assert list(tmp_path.iterdir()) == [target]


def test_a_directory_that_holds_something_is_refused(tmp_path):
    target = tmp_path / "model"
    old = _old(target)
    with pytest.raises(RequestError, match=f"{target} already exists and is not empty: choose another directory"):
        _save(target, _never)
    assert _tree(target) == old


def test_a_file_in_the_way_is_refused_even_for_replacing(tmp_path):
    target = tmp_path / "notes.txt"
    target.write_text("mine")
    for replace in (False, True):
        with pytest.raises(RequestError, match="is a file, where a directory is to be written"):
            _save(target, _never, replace=replace)
    with pytest.raises(RequestError, match="already exists: choose another name"):
        _save(target, _never, atomic_file)
    assert _tree(tmp_path) == {"notes.txt": "mine"}


def test_a_directory_in_the_way_of_a_file_is_refused(tmp_path):
    with pytest.raises(RequestError, match="is a directory, where a file is to be written"):
        _save(tmp_path, _never, atomic_file, replace=True)


@pytest.mark.parametrize("name", ["file/x", "file/x/y/z"])
@pytest.mark.parametrize("save", [atomic_directory, atomic_file])
def test_a_place_below_a_file_cannot_be_written(tmp_path, save, name):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(RequestError, match=rf"cannot write to {tmp_path}/{name}: {tmp_path}/file is a file"):
        _save(tmp_path / name, _never, save)
    assert _tree(tmp_path) == {"file": "mine"}


def test_a_place_where_nothing_can_be_made(tmp_path):
    with pytest.raises(RequestError, match=r"cannot write to /proc/lathe/model: .+; choose another place"):
        _save(Path("/proc/lathe/model"), _never)


def test_the_working_directory_is_not_replaced(tmp_path, monkeypatch):
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a" / "b")
    for place in (Path(), Path(".."), tmp_path):
        with pytest.raises(RequestError, match="would be replaced, but it holds"):
            _save(place, _never, replace=True)


def test_what_appears_during_the_save_is_not_overwritten(tmp_path):
    target = tmp_path / "model"
    with pytest.raises(RequestError, match="already exists and is not empty"):
        _save(target, lambda _: _old(target))
    assert _tree(tmp_path) == {"model/config.json": "old", "model/extra": "old"}
    with pytest.raises(RequestError, match="already exists: choose another name"):
        _save(tmp_path / "a", lambda _: (tmp_path / "a").write_text("first"), atomic_file)
    assert (tmp_path / "a").read_text() == "first"
    assert {path.name for path in tmp_path.iterdir()} == {"a", "model"}


# --- full disks ----------------------------------------------------------------------------------------


def _onto_a_full_disk(temporary: Path) -> None:
    (temporary / "model.safetensors").symlink_to("/dev/full")  # the kernel's own
    (temporary / "model.safetensors").write_bytes(bytes(4096))


def _behind_another_error(temporary: Path) -> None:
    try:
        Path("/dev/full").write_text("x")
    except OSError as error:
        raise RuntimeError(f"{temporary} could not be written") from error


def test_a_full_disk_is_one_line_and_leaves_what_was_there(tmp_path):
    target = tmp_path / "model"
    old = _old(target)
    with pytest.raises(LatheError) as caught:
        _save(target, _onto_a_full_disk, replace=True, nbytes=4096)
    message = str(caught.value)
    assert message.startswith(f"cannot write {target}: No space left on device; ")
    assert message.endswith("bytes are free now; free some space or choose another place; nothing was changed there")
    assert "needed" not in message  # as much is free again
    assert caught.value.exit_code == 1
    assert _tree(target) == old
    assert list(tmp_path.iterdir()) == [target]


def test_a_full_disk_is_recognised_behind_another_error(tmp_path):
    with pytest.raises(LatheError, match="No space left on device"):
        _save(tmp_path / "a", _behind_another_error, atomic_file)
    assert list(tmp_path.iterdir()) == []


def test_a_save_inside_another_tells_of_its_own_place(tmp_path):
    with pytest.raises(LatheError, match=r"cannot write \S*run: No space left"), atomic_directory(tmp_path / "model"):
        _save(tmp_path / "run", _onto_a_full_disk)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_known_to_be_too_small_is_refused_at_once(tmp_path):
    with pytest.raises(LatheError, match=r"1,000,000,000,000,000,000 bytes are needed, [\d,]+ bytes are free"):
        _save(tmp_path / "new" / "model", _never, nbytes=10**18)
    assert list(tmp_path.iterdir()) == []


SAVE = """
    import resource, sys
    from pathlib import Path
    from lathe.checkpoint.atomic import atomic_directory
    from lathe.errors import LatheError
    if len(sys.argv) > 2:
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
    try:
        with atomic_directory(sys.argv[1], replace=True) as folder:
            for name in "ab":
                (folder / name).write_bytes(bytes(800_000))
    except LatheError as error:
        sys.exit(str(error))
"""


def test_a_limit_on_the_size_of_files(tmp_path):
    target = tmp_path / "model"
    old = _old(target)
    done = subprocess.run(_python(SAVE, target, 500_000), capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith(f"cannot write {target}: File too large; raise the limit")
    assert done.stderr.count("\n") == 1
    assert _tree(target) == old
    assert list(tmp_path.iterdir()) == [target]


def _may_mount() -> bool:
    """Whether a user namespace with a filesystem of its own can be made; it needs no privilege on most systems."""
    try:
        probe = subprocess.run(["unshare", "-Urm", "true"], capture_output=True, check=False)
    except FileNotFoundError:
        return False
    return probe.returncode == 0


@pytest.mark.skipif(not _may_mount(), reason="this system lets nobody mount a small filesystem")
def test_a_filesystem_of_one_mebibyte(tmp_path):
    script = tmp_path / "save.py"
    script.write_text(textwrap.dedent(SAVE))
    disk = tmp_path / "disk"
    disk.mkdir()
    shell = """
        set -e; mount -t tmpfs -o size=1m none "$1"; mkdir "$1/model"; echo old > "$1/model/config.json"
        "$3" "$2" "$1/model" && exit 9
        cat "$1/model/config.json"; ls -A "$1" "$1/model"
    """
    done = subprocess.run(
        ["unshare", "-Urm", "sh", "-c", shell, "sh", disk, script, sys.executable],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr.startswith(f"cannot write {disk}/model: No space left on device; ")
    assert done.stderr.count("\n") == 1
    assert done.stdout.split() == ["old", f"{disk}:", "model", f"{disk}/model:", "config.json"]


# --- kills ---------------------------------------------------------------------------------------------

HANG = """
    import signal, sys, time
    # A shell that runs the tests in the background hands them an ignored SIGINT, and a child would inherit it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    from lathe.checkpoint import atomic
    with getattr(atomic, sys.argv[2])(sys.argv[1], replace=True) as temporary:
        half = temporary / "config.json" if temporary.is_dir() else temporary
        half.write_text("half")
        print("ready", flush=True)
        time.sleep(60)
"""


def _hanging_save(target: Path, kind: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(_python(HANG, target, kind), stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("kind", ["atomic_directory", "atomic_file"])
def test_the_leftovers_of_a_kill_are_gone_after_the_next_save(tmp_path, kind):
    target = tmp_path / "model"
    with _hanging_save(target, kind) as process:
        process.kill()
    assert not target.exists()
    (leftover,) = tmp_path.iterdir()
    (tmp_path / f"{leftover.name}.old").touch()  # the temporaries of other targets are not touched
    with getattr(atomic, kind)(target):
        pass
    assert {path.name for path in tmp_path.iterdir()} == {"model", f"{leftover.name}.old"}


def test_a_scratch_is_gone_afterwards_and_so_is_what_a_kill_left_of_one(tmp_path):
    killed = tmp_path / f".lathe-new-{'0' * 12}.model"
    killed.mkdir()
    with scratch_directory(tmp_path / "model") as folder:
        (folder / "numbers").write_text("many")
        assert list(tmp_path.iterdir()) == [folder]
    assert not list(tmp_path.iterdir())
    with suppress(ValueError), scratch_directory(tmp_path / "new" / "parents" / "model") as folder:
        assert folder.parent == tmp_path
        raise ValueError
    assert not list(tmp_path.iterdir())
    with pytest.raises(LatheError, match="model: No space left"), scratch_directory(tmp_path / "model"):
        raise OSError(28, "No space left on device")


@pytest.mark.parametrize("kind", ["atomic_directory", "atomic_file"])
def test_a_save_that_is_still_running_is_left_alone(tmp_path, kind):
    target = tmp_path / "model"
    with _hanging_save(target, kind) as process:
        with getattr(atomic, kind)(target):
            pass
        assert len(list(tmp_path.iterdir())) == 2
        process.kill()
    with getattr(atomic, kind)(target, replace=True):
        pass
    assert list(tmp_path.iterdir()) == [target]


def test_a_terminal_interrupt_cleans_up(tmp_path):
    with _hanging_save(tmp_path / "model", "atomic_directory") as process:
        process.send_signal(signal.SIGINT)
    assert list(tmp_path.iterdir()) == []


REPLACE_FOR_EVER = """
    import itertools, sys
    from lathe.checkpoint.atomic import atomic_directory
    for version in itertools.count():
        with atomic_directory(sys.argv[1], replace=True) as folder:
            for name in ("a", "b"):
                (folder / name).write_text(str(version))
        if version == int(sys.argv[2]):
            print("ready", flush=True)
"""


@pytest.mark.parametrize("after", [0, 1, 2, 5])
def test_at_whatever_moment_a_kill_comes_one_version_is_whole(tmp_path, after):
    target = tmp_path / "model"
    with subprocess.Popen(_python(REPLACE_FOR_EVER, target, after), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.kill()
    versions = {(target / name).read_text() for name in ("a", "b")}
    assert len(versions) == 1
    assert int(versions.pop()) >= after
    with atomic_directory(target, replace=True) as folder:
        (folder / "a").write_text("last")
    assert _tree(tmp_path) == {"model/a": "last"}


KILLED_BETWEEN_RENAMES = """
    import os, signal, sys
    from pathlib import Path
    from lathe.checkpoint import atomic
    atomic._exchange = lambda first, second: False
    rename = Path.rename
    def rename_unless_into_place(self, to):
        if to == Path(sys.argv[1]):
            os.kill(os.getpid(), signal.SIGKILL)
        return rename(self, to)
    Path.rename = rename_unless_into_place
    with atomic.atomic_directory(sys.argv[1], replace=True) as folder:
        (folder / "config.json").write_text("new")
"""


def test_without_the_exchange_a_kill_between_the_two_renames_is_recovered(tmp_path):
    target = tmp_path / "model"
    old = _old(target)
    assert subprocess.run(_python(KILLED_BETWEEN_RENAMES, target), check=False).returncode == -signal.SIGKILL
    assert not target.exists()
    assert recover(target)
    assert _tree(target) == old
    assert not recover(target)
    with atomic_directory(target, replace=True) as folder:
        (folder / "config.json").write_text("new")
    assert _tree(tmp_path) == {"model/config.json": "new"}


def test_where_there_are_no_locks_nothing_is_removed_and_the_old_one_still_comes_back(tmp_path, monkeypatch):
    target = tmp_path / "model"
    old = _old(target)
    subprocess.run(_python(KILLED_BETWEEN_RENAMES, target), check=False)
    monkeypatch.setattr(atomic, "_try_lock", lambda descriptor: None)
    assert recover(target)
    assert _tree(target) == old
    _save(target, lambda temporary: (temporary / "config.json").write_text("newer"), replace=True)
    assert _tree(target) == {"config.json": "newer"}
    assert len(list(tmp_path.iterdir())) == 2  # and what the killed save had written


def test_a_save_recovers_before_it_decides_that_nothing_is_there(tmp_path):
    target = tmp_path / "model"
    old = _old(target)
    subprocess.run(_python(KILLED_BETWEEN_RENAMES, target), check=False)
    with pytest.raises(RequestError, match="already exists and is not empty"):
        _save(target, _never)
    assert _tree(target) == old
