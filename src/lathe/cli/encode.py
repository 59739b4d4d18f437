"""`lathe encode MODEL --file TEXTS --out VECTORS.npy`: a vector for each line of a file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lathe.errors import RequestError


def command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model's directory, or a hub id.")],
    file: Annotated[Path, typer.Option("--file", help="A UTF-8 file, one text a line, none blank.")],
    out: Annotated[Path, typer.Option(help="Where the vectors go: texts × d_model, float32, a .npy file.")],
    pool: Annotated[
        str, typer.Option(help="mean of a text's tokens, its first token, or the model's pooled.")
    ] = "mean",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, mps; the CPU unless given.")] = None,
    engine: Annotated[str, typer.Option(help="What computes: native (compiled, CPU), torch, or auto.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object about what was written.")] = False,
) -> None:
    """Write the vectors of texts, in the order of the file."""
    import numpy as np

    import lathe
    from lathe.checkpoint.atomic import atomic_file
    from lathe.cli.generate import _device
    from lathe.cli.output import emit_json, say
    from lathe.generate.encode import POOLS
    from lathe.text.corpus import read_every_line

    if out.suffix != ".npy":
        raise RequestError(f"--out {out}: expected a name that ends in .npy")
    chosen = next((each for each in POOLS if each == pool), None)
    if chosen is None:
        raise RequestError(f"--pool {pool}: expected {', '.join(POOLS)}")
    texts = read_every_line(file)
    opened = lathe.load(model, device=_device(device))
    with atomic_file(out.expanduser()) as part:  # refuses a file that is there before anything is computed
        vectors_ND = lathe.encode(opened, texts, chosen, engine=engine)
        with part.open("wb") as stream:
            np.save(stream, vectors_ND.numpy())
    say(f"wrote {len(vectors_ND):,} vectors of {vectors_ND.shape[1]:,} numbers to {out}")
    if as_json:
        emit_json({"model": model, "out": str(out), "pool": pool, "shape": list(vectors_ND.shape)})
