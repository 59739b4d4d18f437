"""One sentence's way through a model: pieces, ids, mask, vectors, scores, attention weights, and the modules.

The numbers are the model's own: norms are of the vectors it computes, scores are what its softmax is given, weights
what its attention returns. `look` gathers them as plain data, `lines` lays them out, `write_png` draws every head.

Shape suffixes: H heads, T query positions, S key positions.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lathe.blueprint import blueprint
from lathe.errors import RequestError
from lathe.generate import generate
from lathe.generate.text import is_empty
from lathe.model.attention import AttentionLayer
from lathe.model.transformer import Transformer
from lathe.report.fonts import fonts_for
from lathe.report.labels import as_written
from lathe.text.tokenizer import Tokenizer

_SHADES = " ·░▒▓█"
_WRITTEN = 8  # tokens that a decoder without text of its own writes
_COLUMNS = 12  # the most that a table of numbers shows
# Of a picture, in inches: the widest map of one head, all heads' maps together, and a line of text.
_WIDEST_MAP, _WIDEST, _LINE = 30.0, 130.0, 0.13


def look(
    model: Transformer, tokenizer: Tokenizer, text: str, *, target: str | None = None, layer: int = 1
) -> dict[str, Any]:
    """What one text becomes on its way through a model.

    Args:
        text: what the model reads.
        target: what an encoder-decoder's decoder reads after its start token; what the model writes where left out.
        layer: which layer's attention, counted from 1.

    Returns:
        `tokens` of each stack (position, id, piece, mask, norms of the token's vector and of the first layer's
        input), `attention` (of each stack, and `cross`: scores and weights, H × T × S, None where a key is hidden) and
        `modules` (name, axes, shape, size of every parameter).

    Raises:
        RequestError: a text without a token, a layer that is not there, a target without a decoder to read it.
    """
    ids = tokenizer(text)["input_ids"]
    if is_empty(tokenizer, text, ids[0].tolist()):
        raise RequestError(f"--text {text!r} holds no token; expected some text")
    for name, stack in model.architecture.stacks:
        if not 1 <= layer <= stack.n_layers:
            raise RequestError(f"layer={layer}: expected 1 to {stack.n_layers}, the layers of the {name}")
    both = model.encoder is not None and model.decoder is not None
    if target is not None and not both:
        raise RequestError("--target is what a decoder reads beside an encoder, and this model has one stack")
    inputs: dict[str, Tensor] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if both:
        inputs["decoder_input_ids"] = _decoder_ids(model, tokenizer, ids, target)
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), _scores(model) as scores:
            out = model(**inputs, output_hidden_states=True, output_attentions=True)
    finally:
        model.train(training)
    found: dict[str, Any] = {"text": text, "layer": layer, "tokens": {}, "attention": {}, "modules": _modules(model)}
    for name, _ in model.architecture.stacks:
        prefix = f"{name}_" if both else ""
        read = inputs["decoder_input_ids"] if both and name == "decoder" else ids
        hidden = getattr(out, f"{prefix}hidden_states")
        found["tokens"][name] = _tokens(model, tokenizer, read[0], hidden[0][0])
        weights = getattr(out, f"{prefix}attentions")[layer - 1][0]
        found["attention"][name] = _map(scores[name][layer - 1], weights)
    if both:
        assert out.cross_attentions is not None
        found["attention"]["cross"] = _map(scores["cross"][layer - 1], out.cross_attentions[layer - 1][0])
    return found


def _decoder_ids(model: Transformer, tokenizer: Tokenizer, ids: Tensor, target: str | None) -> Tensor:
    if target is not None:
        return model.shift_right(tokenizer(target)["input_ids"])
    if model.head.language is None:
        return model.shift_right(ids)
    return generate(model, ids, max_new_tokens=_WRITTEN)


@contextmanager
def _scores(model: Transformer) -> Iterator[dict[str, list[Tensor]]]:
    """Gather, layer by layer, what each attention's softmax is given, while the model runs."""
    found: dict[str, list[Tensor]] = {"encoder": [], "decoder": [], "cross": []}
    hooks = []
    for name, _ in model.architecture.stacks:
        for module in getattr(model, name).modules():
            if not isinstance(module, AttentionLayer):
                continue

            def seen(module: Any, args: tuple[Any, ...], given: Mapping[str, Any], name: str = name) -> None:
                kept = {key: given.get(key) for key in ("memory_BSD", "bias_BHTS", "rotation")}
                kind = name if kept["memory_BSD"] is None else "cross"
                found[kind].append(module.scores(*args, **kept)[0])

            hooks.append(module.register_forward_pre_hook(seen, with_kwargs=True))
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _tokens(model: Transformer, tokenizer: Tokenizer, ids_T: Tensor, inputs_TD: Tensor) -> list[dict[str, Any]]:
    vectors_TE = model.vectors(ids_T[None], None)[0].detach()
    return [
        {
            "position": place,
            "id": number,
            "piece": piece(tokenizer, number),
            "mask": 1,
            "vector_norm": float(vectors_TE[place].norm()),
            "input_norm": float(inputs_TD[place].norm()),
        }
        for place, number in enumerate(ids_T.tolist())
    ]


def piece(tokenizer: Tokenizer, token: int) -> str:
    """A token's own form; a model's table may have more rows than the vocabulary has tokens."""
    return tokenizer.pieces([token])[0] if token < tokenizer.vocab_size else f"<{token}>"


def _map(scores_HTS: Tensor, weights_HTS: Tensor) -> dict[str, Any]:
    hidden_HTS = scores_HTS <= torch.finfo(scores_HTS.dtype).min / 2
    rows = [
        [[None if out else score for score, out in zip(*row)] for row in zip(*head)]
        for head in zip(scores_HTS.tolist(), hidden_HTS.tolist())
    ]
    return {"scores": rows, "weights": weights_HTS.tolist()}


def _modules(model: Transformer) -> list[dict[str, Any]]:
    return [
        {
            "name": each.name,
            "axes": [axis.name for axis in each.axes],
            "shape": list(each.shape),
            "parameters": each.size if each.trained and not each.tied_to else 0,
            "tied_to": each.tied_to,
        }
        for each in blueprint(model.architecture)
    ]


def lines(found: Mapping[str, Any], head: int | None = None) -> Iterator[str]:
    """The walk as text. `head` counts from 1; None shows the mean of all heads' weights, and the first one's scores."""
    for name, tokens in found["tokens"].items():
        yield f"{name}: {len(tokens)} tokens"
        yield f"  {'place':>5} {'id':>7} {'mask':>4} {'|vector|':>9} {'|input|':>9}  piece"
        for each in tokens:
            norms = f"{each['vector_norm']:>9.2f} {each['input_norm']:>9.2f}"
            yield f"  {each['position']:>5} {each['id']:>7} {each['mask']:>4} {norms}  {each['piece']}"
        yield ""
    for name in found["attention"]:
        yield from _attention_lines(found, name, head)
    yield from _module_lines(found["modules"])


def sides(found: Mapping[str, Any], name: str) -> tuple[list[str], list[str]]:
    """The pieces of an attention's queries and of its keys."""
    queries, keys = ("decoder", "encoder") if name == "cross" else (name, name)
    rows, columns = ([each["piece"] for each in found["tokens"][side]] for side in (queries, keys))
    return rows, columns


def _attention_lines(found: Mapping[str, Any], name: str, head: int | None) -> Iterator[str]:
    maps, (rows, columns) = found["attention"][name], sides(found, name)
    if head is not None and not 1 <= head <= len(maps["scores"]):
        raise RequestError(f"--head {head}: expected 1 to {len(maps['scores'])}, the heads of the {name}")
    width = max(map(_width, rows))
    scores, shown = maps["scores"][(head or 1) - 1], columns[:_COLUMNS]
    yield f"{name}, layer {found['layer']}, head {head or 1}: q·k, scaled and with its bias" + (
        f" (the first {_COLUMNS} of {len(columns)} keys)" if len(columns) > _COLUMNS else ""
    )
    yield "  " + " " * width + "".join(f" {_cut(each)}" for each in shown)
    for label, row in zip(rows, scores):
        cells = "".join(f" {'–' if score is None else format(score, '.2f'):>6}" for score in row[:_COLUMNS])
        yield f"  {label}{' ' * (width - _width(label))}{cells}"
    weights = torch.tensor(maps["weights"])
    chosen = weights.mean(0) if head is None else weights[head - 1]
    which = "mean of all heads" if head is None else f"head {head}"
    yield f"{name}, layer {found['layer']}, {which}: attention weights, a row for each query"
    for label, row in zip(rows, chosen.tolist()):
        cells = "".join(2 * _SHADES[min(len(_SHADES) - 1, round(weight * (len(_SHADES) - 1) + 0.3))] for weight in row)
        best = max(range(len(row)), key=row.__getitem__)
        yield f"  {label}{' ' * (width - _width(label))} │{cells}│ most: {columns[best]} {row[best]:.2f}"
    yield ""


def _width(text: str) -> int:
    """The columns that a terminal gives a text: two to a Korean, Chinese or Japanese character."""
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def _cut(text: str) -> str:
    """A text in six columns, its end cut off where it has more."""
    while _width(text) > 6:
        text = text[:-1]
    return " " * (6 - _width(text)) + text


def _module_lines(modules: list[dict[str, Any]]) -> Iterator[str]:
    total = sum(each["parameters"] for each in modules)
    yield f"modules: {total:,} parameters"
    tree: dict[str, Any] = {}
    for each in modules:
        *path, last = each["name"].split(".")
        node = tree
        for part in path:
            node = node.setdefault(part, {})
        node[last] = (each,)  # a leaf; a tuple, so that no branch looks like it
    yield from _branch_lines(tree, "  ")


def _branch_lines(tree: Mapping[str, Any], indent: str) -> Iterator[str]:
    for name, node in tree.items():
        while isinstance(node, dict) and len(node) == 1:  # a module of one part stands on its part's line
            ((only, node),) = node.items()
            name += f".{only}"
        if isinstance(node, dict):
            yield f"{indent}{name}: {_held(node):,}"
            yield from _branch_lines(node, indent + "  ")
            continue
        (leaf,) = node
        axes = " × ".join(f"{axis} {size:,}" for axis, size in zip(leaf["axes"], leaf["shape"]))
        yield f"{indent}{name}  [{axes}]" + (f", is {leaf['tied_to']}" if leaf["tied_to"] else "")


def _held(node: Any) -> int:
    if isinstance(node, dict):
        return sum(_held(each) for each in node.values())
    held: int = node[0]["parameters"]
    return held


def write_png(found: Mapping[str, Any], path: Path) -> list[str]:
    """Every head's attention weights as a picture, a row of heat maps for each attention.

    Returns:
        The pieces that no font of this machine writes; in the picture the places of these tokens stand for them.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    maps = found["attention"]
    columns = max(len(each["weights"]) for each in maps.values())
    longest = max(len(tokens) for tokens in found["tokens"].values())
    # Room for every piece of a short text; a long one has to fit into a picture that can be drawn and opened.
    each = min(max(2.4, 0.24 * longest), _WIDEST_MAP, _WIDEST / columns)
    shown = max(math.ceil(_LINE * longest / each), 1)  # of the pieces of a long one, every so many are written
    pieces = {each["piece"]: None for tokens in found["tokens"].values() for each in tokens}
    families, unwritten = fonts_for(list(pieces))
    with matplotlib.rc_context({"font.size": 8, "font.family": families}):
        figure = Figure(figsize=(each * columns + 1, each * len(maps) + 0.6), layout="constrained")
        FigureCanvasAgg(figure)
        figure.suptitle(
            f"layer {found['layer']}: each row's token reads the columns' tokens", x=0.01, ha="left", fontweight="bold"
        )
        grid = figure.subplots(len(maps), columns, squeeze=False)
        for row, (name, kind) in enumerate(maps.items()):
            queries, keys = (_labels(side, unwritten) for side in sides(found, name))
            for number, axes in enumerate(grid[row]):
                if number >= len(kind["weights"]):
                    axes.set_axis_off()
                    continue
                axes.imshow(kind["weights"][number], vmin=0, vmax=1, cmap="Blues", aspect="auto")
                axes.set_title(f"{name}, head {number + 1}", loc="left")
                axes.set_xticks(range(0, len(keys), shown), keys[::shown], rotation=90)
                rows = queries[::shown]
                axes.set_yticks(range(0, len(queries), shown), rows if number == 0 else [""] * len(rows))
        figure.savefig(path, format="png", dpi=120, metadata={"Software": None})
    return unwritten


def _labels(pieces: list[str], unwritten: list[str]) -> list[str]:
    """The pieces, or the place of one that cannot be written, between dots so that it is no piece of digits."""
    return [f"·{place}·" if each in unwritten else as_written(each) for place, each in enumerate(pieces)]
