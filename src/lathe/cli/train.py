"""`lathe train RUN.yaml [key=value …]` and `lathe train MODEL --data FILE objective=… steps=…`.

`torchrun --nproc-per-node 2 -m lathe train …` is the same on several processes; the first of them speaks for all.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lathe.cli.settings import parse_settings
from lathe.errors import RequestError

if TYPE_CHECKING:
    from lathe.cli.output import Advance
    from lathe.train.job import Job
    from lathe.train.loop import StepReport, TrainResult
    from lathe.train.ranks import Ranks

_PARTS = 1000  # of a budget that is not counted in steps


def command(
    model: Annotated[
        str,
        typer.Argument(
            metavar="RUN.yaml|MODEL",
            help="A run file; or a preset or an architecture's JSON file (new weights), a model's directory, a hub id.",
        ),
    ],
    settings: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...",
            help="Any key of the run: objective=causal, steps=2000, optimizer.lr=3e-4, data.rows=32, d_model=256, "
            "adapter.rank=8.",
        ),
    ] = None,
    data: Annotated[str | None, typer.Option(help="The text to train on; data.train=FILE.")] = None,
    validation: Annotated[str | None, typer.Option(help="Text to evaluate on; data.validation=FILE.")] = None,
    out: Annotated[str | None, typer.Option(help="Where the run is kept; out=DIRECTORY.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cuda, mps, cpu; device=NAME.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where the run stopped; start if it did not.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Train a model, and keep checkpoints that can be resumed and opened anywhere."""
    from lathe.train.ranks import joined

    options = {"data.train": data, "data.validation": validation, "out": out, "device": device}
    with joined() as ranks:  # first of all, so that whatever goes wrong is said once
        words = _words(settings or [], options)
        if Path(model).suffix in (".yaml", ".yml"):
            _train(read_run(Path(model)), words, ranks, resume, as_json)
        else:
            _train({}, {**words, "model": model}, ranks, resume, as_json)


def _words(settings: list[str], options: Mapping[str, str | None]) -> dict[str, Any]:
    words: dict[str, Any] = dict(parse_settings(settings))
    for key, value in options.items():
        if value is None:
            continue
        if key in words or (key == "data.train" and "data" in words):
            raise RequestError(f"{key} is set twice, by an option and by a word; set it once")
        words[key] = value
    return words


def _train(tree: Any, words: dict[str, Any], ranks: Ranks, resume: bool, as_json: bool) -> None:
    from lathe.cli.output import progress, say
    from lathe.train.job import open_job
    from lathe.train.request import read_request

    request = read_request(tree, words)
    if not ranks.main:
        open_job(request, ranks).run(resume=resume)
        return
    say(f"reading {', '.join(request.data.files(validation=False) or request.data.tasks)}")
    job = open_job(request, ranks)
    say(f"{_about(job)}; the run is kept in {request.folder}")
    total = request.steps or _PARTS
    with progress("training", total) as advance:
        result = job.run(resume=resume, on_step=_Meter(job, total, advance))
    _show(request.folder, result, as_json)


def _show(folder: Path, result: TrainResult, as_json: bool) -> None:
    from lathe.cli.output import answers, emit_json

    answer = _answer(folder)
    if as_json:
        emit_json(answer)
        return
    if not result.steps:
        answers().print(f"the run in {folder} is finished already; nothing was left to do", soft_wrap=True)
        return
    found = answer["evaluation"]
    held_out = f", validation loss {found['loss']:.4f}" if found else ""
    answers().print(f"step {answer['step']}: loss {answer['loss']:.4f}{held_out}; {answer['model']}", soft_wrap=True)


def _about(job: Job) -> str:
    from lathe.adapt import adapter_names
    from lathe.blueprint import stored

    model, corpus = job.subject.model, job.batches.corpus
    parameters = sum(p.size for p in stored(model.architecture) if p.trained)
    if adapter_names(model):
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        parameters_of = f"{trained:,} parameters of an adapter on {parameters:,}"
    else:
        parameters_of = f"{parameters:,} parameters"
    place = model.device.type if job.ranks.size == 1 else f"{model.device.type}, {job.ranks.size} processes"
    return (
        f"{parameters_of} on {place}; {len(corpus):,} documents of {corpus.n_tokens:,} tokens, "
        f"objective {job.request.objective['name']}"
    )


class _Meter:
    """Tells the progress bar how it goes: loss, tokens a second, share of the machine's peak, time left."""

    def __init__(self, job: Job, total: int, advance: Advance) -> None:
        from lathe.train.machine import matrix_peak

        self.job, self.total, self.advance = job, total, advance
        self.training = job.request.training(job.subject.model.device.type)
        self.peak = job.ranks.size * matrix_peak(job.subject.model.device, self.training.precision)
        self.shown = 0
        self.before: tuple[int, int, float, float] | None = None  # tokens, targets, progress, clock: at the first step

    def __call__(self, report: StepReport) -> None:
        now = time.perf_counter()
        done = int(report.progress * self.total + 1e-6)
        note = f"loss {report.loss:.3f}"
        if self.before is None:
            self.before = (report.tokens, report.targets, report.progress, now)
        else:
            note += self._speed(report, now)
        if report.evaluation is not None:
            note += f", validation {report.evaluation.loss:.3f}"
        self.advance(done - self.shown, note)
        self.shown = done

    def _speed(self, report: StepReport, now: float) -> str:
        from lathe.train.machine import flops_of_training

        assert self.before is not None
        tokens, targets, progress, clock = self.before
        seconds = max(now - clock, 1e-9)
        flops = flops_of_training(
            self.job.subject.model.architecture,
            self.job.request.data.length,
            report.tokens - tokens,
            report.targets - targets,
            self.training.checkpointing,
        )
        if self.job.request.adapter is not None:
            # The base's own gradients are not made: one of the three or four products of each matrix.
            flops *= 3 / 4 if self.training.checkpointing else 2 / 3
        left = (1 - report.progress) * seconds / max(report.progress - progress, 1e-9)
        share = flops / seconds / self.peak
        return f", {(report.tokens - tokens) / seconds:,.0f} tokens/s, {share:.0%} of peak, {_time(left)} left"


def _time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _answer(folder: Path) -> dict[str, Any]:
    """How the run stands, read from what it wrote down: it may have been finished before."""
    metrics, seconds = (_lines(folder / name) for name in ("metrics.jsonl", "speed.jsonl"))
    last = metrics[-1]
    evaluations = [{"step": line["step"], **line["evaluation"]} for line in metrics if "evaluation" in line]
    best = folder / "checkpoints" / "best"
    return {
        "run": str(folder),
        "model": str(folder / "checkpoints" / "last"),
        "best": str(best) if best.exists() else None,
        **{key: last[key] for key in ("step", "tokens", "loss")},
        "seconds": seconds[-1]["seconds"],
        "evaluation": evaluations[-1] if evaluations else None,
        "best_evaluation": min(evaluations, key=lambda each: each["loss"]) if evaluations else None,
    }


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def read_run(path: Path) -> Any:
    """The tree of a run file, YAML or the `run.json` that a run leaves; `RequestError` where there is none."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RequestError(f"there is no run file {path}") from None
    except UnicodeDecodeError as error:
        raise RequestError(f"{path} is not UTF-8 (byte {error.start}): expected a run as YAML") from None
    if path.suffix != ".json":
        return _read_yaml(path, text)
    try:
        return json.loads(text)
    except ValueError as error:
        raise RequestError(f"{path} is not JSON ({error}): expected a run as lathe train wrote it") from None


def _read_yaml(path: Path, text: str) -> Any:
    """Values without quotes are read as on the command line: `3e-4` is a number there, and `none` is none."""
    import yaml

    class Loader(yaml.SafeLoader):
        """YAML's own types, and those of words."""

    Loader.add_constructor(_WORD, lambda _, node: parse_settings([f"value={node.value}"])["value"])
    try:
        loader = Loader(text)  # refuses characters that no YAML holds
        node = loader.get_single_node()
        if node is None:
            return None
        _mark_words(node, set())
        return loader.construct_document(node)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" (line {mark.line + 1})" if mark is not None else ""
        raise RequestError(f"{path} is not YAML{where}: expected keys and values, as steps: 2000") from None


_WORD = "!word"


def _mark_words(node: Any, seen: set[int]) -> None:
    """Tag the text values of mappings that stand without quotes; what is in quotes is text, whatever it looks like."""
    import yaml

    if id(node) in seen:  # a node that is named may stand in several places, inside itself too
        return
    seen.add(id(node))
    for _, value in node.value if isinstance(node, yaml.MappingNode) else ():
        if isinstance(value, yaml.ScalarNode):
            if value.style is None and value.tag == "tag:yaml.org,2002:str":
                value.tag = _WORD
        else:
            _mark_words(value, seen)
