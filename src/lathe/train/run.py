"""A training run in a directory: it can be killed at any instant and goes on as if it had not been.

    RUN/checkpoints/    see `lathe.train.checkpointing`
    RUN/metrics.jsonl   a line for each step, the same however often the run was interrupted
    RUN/speed.jsonl     seconds of training up to each step
    RUN/tensorboard/    where it is asked for

Everything that the next step depends on is in a checkpoint: weights, the optimiser's moments, the counts, the
last losses (for the spike's judge), the best evaluation, the position in the data. Dropout is drawn from
(seed, step) and needs no state. So a resumed run takes bit for bit the steps that the killed one would have
taken, on the same hardware. A budget of seconds is the exception: it counts time.

One run at a time: the directory is locked while it trains, and the system drops the lock with the process.

Several ranks are one run. The main rank alone looks at the directory, locks it, and writes; what it found, and
whether it could write, it tells the others, so that all go on or all end with the same line. A checkpoint says
nothing about ranks: another number of them continues from it, sharded or not, with the samples that come next. The
steps are then the same but for the order of sums and what dropout draws; as many ranks as before repeat them bit
for bit.
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any, Protocol

from lathe.checkpoint.atomic import atomic_file
from lathe.data.batch import Batch
from lathe.errors import LatheError, RequestError
from lathe.model.transformer import Transformer
from lathe.train.checkpointing import Checkpoints, Stored
from lathe.train.evaluate import fingerprint
from lathe.train.loop import Run, StepReport, TrainResult, train
from lathe.train.loss import LossFunction, objective_loss
from lathe.train.ranks import ALONE, Ranks
from lathe.train.records import METRICS, SPEED, Board, Lines, metrics, speed
from lathe.train.settings import SaveSettings, TrainSettings

# What may change between two parts of a run: nothing of it changes what a step computes.
_FREE = ("spike", "checkpointing", "evaluate_every", "parallel")
# What records of older runs do not hold. There it is not known, and anything is accepted.
_VALIDATION = "validation"
_LATER = (_VALIDATION, "start_weights")


class Resumable(Protocol):
    """Batches with a position that can be saved; `lathe.data.Batches` is one."""

    def __iter__(self) -> Iterator[Batch]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


def fit(
    model: Transformer,
    batches: Resumable,
    settings: TrainSettings,
    folder: Path,
    *,
    write_model: Callable[[Path], object],
    save: SaveSettings | None = None,
    evaluation: Sequence[Batch] | None = None,
    loss_fn: LossFunction = objective_loss,
    resume: bool = False,
    asked: Mapping[str, Any] | None = None,
    notes: Mapping[str, str] | None = None,
    on_step: Callable[[StepReport], None] | None = None,
    ranks: Ranks = ALONE,
) -> TrainResult:
    """Train `model` in place, and keep in `folder` what it takes to go on.

    Args:
        write_model: writes the model as a directory at the path that it is given (`model.save`); on the main rank.
        evaluation: a fixed set; the checkpoint with the lowest loss on it is kept as `best`.
        resume: go on where the run in `folder` stopped; start there if it holds none.
        asked: more that a resume must ask again, as plain JSON values (the rows of a batch).
        notes: text files to write into `folder`, name to content; not where the run is finished already.
        on_step: called after each step, on every rank.
        ranks: the processes that share the work; each calls this with the same arguments and its own rows.

    Returns:
        The steps that this process made; none where the run was finished already.

    Raises:
        RequestError: `folder` holds a run (and this is no resume), or one of another model, data or settings.
        LatheError: the loss ran away, the disk is full, or no checkpoint is whole. The line names the last
            good checkpoint.
    """
    save = save or SaveSettings()
    if save.patience is not None and evaluation is None:
        raise RequestError("patience counts evaluations and there is nothing to evaluate on; give validation data")
    checkpoints = Checkpoints(folder / "checkpoints", save.keep)
    with ExitStack() as held:

        def look() -> Stored | None:
            _refuse(folder, resume)
            held.enter_context(_locked(folder))
            return checkpoints.newest()

        stored = ranks.from_main(look)
        run = Run(model, settings, loss_fn, ranks)
        validation = None if evaluation is None else fingerprint(evaluation)
        wanted = _asked(model, settings, {**(asked or {}), _VALIDATION: validation})
        if stored is not None:
            _restore(stored, wanted, batches, run)
        keeper = _Keeper(folder, checkpoints, stored, wanted, run, batches, save, write_model)
        held.enter_context(closing(keeper))
        finished = run.stopped or run.progress >= 1.0
        # What a finished run says of itself stays: nothing is done that these notes could be about.
        ranks.from_main(lambda: keeper.begin({} if finished else notes or {}))
        if finished:
            return TrainResult()

        def after(report: StepReport) -> None:
            keeper.after(report)
            if on_step is not None:
                on_step(report)

        try:
            return train(
                model, batches, settings, loss_fn=loss_fn, evaluation=evaluation, on_step=after, run=run, ranks=ranks
            )
        except LatheError as error:
            raise type(error)(f"{error}; {keeper.last_good}") from error


class _Keeper:
    """Writes down each step and saves when it is time: judged on every rank, written by the main one."""

    def __init__(
        self,
        folder: Path,
        checkpoints: Checkpoints,
        stored: Stored | None,
        asked: Mapping[str, Any],
        run: Run,
        batches: Resumable,
        save: SaveSettings,
        write_model: Callable[[Path], object],
    ) -> None:
        state = stored.state if stored is not None else {}
        self.folder, self.checkpoints, self.stored = folder, checkpoints, stored
        self.asked, self.run, self.batches = asked, run, batches
        self.save, self.write_model = save, write_model
        self.best_step: int | None = state.get("best_step")
        self.best_loss: float | None = state.get("best_loss")
        self.without_better: int = state.get("without_better", 0)
        self.saved: Path | None = stored.path if stored is not None else None
        self.lines: dict[str, Lines] = {}
        self.board: Board | None = None
        run.stopped = self._out_of_patience()

    def begin(self, notes: Mapping[str, str]) -> None:
        """Put the directory where the run goes on from: links, notes, and the lines up to the checkpoint."""
        lengths: Mapping[str, int] = {}
        if self.stored is not None:
            self.checkpoints.link(self.stored.step, self.best_step)
            lengths = self.stored.state["lengths"]
        for name, text in notes.items():
            with atomic_file(self.folder / name, replace=True) as made:
                made.write_text(text, encoding="utf-8")
        for name in (METRICS, SPEED):
            self.lines[name] = Lines(self.folder / name, lengths.get(name, 0))
        if self.save.tensorboard:
            self.board = Board(self.folder / "tensorboard", self.run.steps)

    @property
    def last_good(self) -> str:
        """The end of a line that says what a person can go back to."""
        if self.saved is None:
            return "there is no checkpoint yet"
        return f"the last good checkpoint is {self.saved}"

    def after(self, report: StepReport) -> None:
        """Record the step; save where it is time to."""
        better = self._judge(report)
        if self.run.ranks.main:
            self._write(report)
        self.run.stopped = self._out_of_patience()
        every = self.save.every
        due = every is not None and report.step % every == 0
        if due or better or self.run.stopped or report.progress >= 1.0:
            self._save(report.step)

    def _write(self, report: StepReport) -> None:
        self.lines[METRICS].write(metrics(report))
        self.lines[SPEED].write(speed(report))
        if self.board is not None:
            self.board.write(report)

    def close(self) -> None:
        """Let go of the files."""
        for lines in self.lines.values():
            lines.close()
        if self.board is not None:
            self.board.close()

    def _judge(self, report: StepReport) -> bool:
        """Whether this step's evaluation is the best so far."""
        if report.evaluation is None:
            return False
        better = self.best_loss is None or report.evaluation.loss < self.best_loss
        self.without_better = 0 if better else self.without_better + 1
        if better:
            self.best_step, self.best_loss = report.step, report.evaluation.loss
        return better

    def _out_of_patience(self) -> bool:
        return self.save.patience is not None and self.without_better >= self.save.patience

    def _save(self, step: int) -> None:
        self.run.publish()
        moments = self.run.tensors()

        def write() -> Path:
            state = {
                "run": self.run.state_dict(),
                "data": self.batches.state_dict(),
                "best_step": self.best_step,
                "best_loss": self.best_loss,
                "without_better": self.without_better,
                "asked": self.asked,
                # Flushed before the checkpoint is in place: what it counts on is there.
                "lengths": {name: lines.sync() for name, lines in self.lines.items()},
            }
            return self.checkpoints.save(step, self.write_model, moments, state, self.best_step)

        self.saved = self.run.ranks.from_main(write)


def _restore(stored: Stored, asked: Mapping[str, Any], batches: Resumable, run: Run) -> None:
    """Put a checkpoint's state into a fresh run; the model is not touched where it was asked something else."""
    _refuse_other(stored, {**asked, _VALIDATION: stored.state["asked"].get(_VALIDATION)})
    try:
        batches.load_state_dict(stored.state["data"])
    except RequestError as error:
        raise RequestError(f"the run in {stored.path.parent.parent}: {error}") from None
    # Last, since it follows from the data's settings: what is named is what was changed.
    _refuse_other(stored, asked)
    run.load_state_dict(stored.state["run"], stored.moments(), stored.weights())


def _refuse_other(stored: Stored, asked: Mapping[str, Any]) -> None:
    """Raise `RequestError` where a run was asked something else."""
    record = stored.state["asked"]
    difference = first_difference(record, {key: asked[key] for key in asked if key in record or key not in _LATER})
    if difference is not None:
        name, then, now = difference
        raise RequestError(
            f"the run in {stored.path.parent.parent} was started with {name}={then} and this one says {now}; "
            "resume with the same, or start a new run in another directory"
        )


def _asked(model: Transformer, settings: TrainSettings, more: Mapping[str, Any]) -> dict[str, Any]:
    """What a run must be asked again to go on, as plain JSON values; its data knows itself."""
    training = {key: value for key, value in settings.to_dict().items() if key not in _FREE}
    values = {"architecture": model.architecture.to_dict(), **training, **more}
    plain: dict[str, Any] = json.loads(json.dumps(values))
    return plain


def first_difference(then: Any, now: Any, path: str = "") -> tuple[str, Any, Any] | None:
    """The first place where two trees differ: its dotted name and both values."""
    if isinstance(then, dict) and isinstance(now, dict):
        for key in [*now, *(key for key in then if key not in now)]:
            found = first_difference(then.get(key), now.get(key), f"{path}.{key}" if path else key)
            if found is not None:
                return found
        return None
    return None if then == now else (path, _written(then), _written(now))


def _written(value: Any) -> str:
    return "none" if value is None else str(value)


def _refuse(folder: Path, resume: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise RequestError(f"{folder} is a file, where a run's directory is to be: choose another name")
    held = {entry.name for entry in folder.iterdir()} - {".lock"} if folder.is_dir() else set()
    if not held:
        return
    if not held & {METRICS, "checkpoints"}:
        raise RequestError(f"{folder} holds something that is no run: choose another directory")
    if not resume:
        raise RequestError(f"{folder} already holds a run: resume it, or choose another directory")


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("wb")
    except OSError as error:
        raise RequestError(f"cannot write to {folder}: {error.strerror}; choose another place") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RequestError(f"another process trains in {folder}: wait for it, or choose another place") from None
        yield
