"""What is printed: a Markdown table for each shape, then how Lathe stands to the best of its peers, and its aims."""

from __future__ import annotations

import datetime
import os
import platform
from collections.abc import Iterable
from pathlib import Path

from benchmarks.generation.aims import aims_table
from benchmarks.generation.bandwidth import Bandwidth
from benchmarks.generation.checks import Agreement
from benchmarks.generation.rounds import Figures
from benchmarks.generation.shapes import Shape

MIB = 2**20
NO_FIGURE = "–"


def machine(threads: int, bandwidth: Bandwidth) -> str:
    """The date and the machine's shape, in a line."""
    today = datetime.datetime.now(tz=datetime.UTC).date().isoformat()
    rate = bandwidth.bytes_per_second / 1e9
    return (
        f"{today}; {processor()}, {os.cpu_count()} cores, {threads} threads for each contestant; "
        f"reads {rate:.1f} GB/s past the cache ({bandwidth.how})"
    )


def processor() -> str:
    """The processor's name, with what it has for dot products."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return platform.processor() or platform.machine()
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in reversed(lines))}
    flags = set(facts.get("flags", "").split())
    units = [
        name for name in ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8") if name in flags
    ]
    return " ".join([facts.get("model name", platform.machine()), f"({', '.join(units)})" if units else ""]).strip()


def shape_table(shape: Shape, found: Iterable[Figures], agreement: Agreement | None, bandwidth: Bandwidth) -> str:
    """One shape's heading, table, and ratios."""
    rows = list(found)
    tasks = list(dict.fromkeys(name for row in rows for name in row.medians))
    heads = [
        *[f"{task.replace('-', ', batch ')}" for task in tasks],
        *([] if shape.kind == "encoder" else ["of the bandwidth limit"]),
        "first token cold / warm",
        "memory, first token",
        *(["error, of the spread"] if any(row.errors for row in rows) else []),
    ]
    lines = [
        f"### {shape.name}: {shape.parameters() / 1e6:.1f}M parameters" + _reads(shape, bandwidth),
        "",
        *([agreement.line() + ".", ""] if agreement else []),
        "| tokens/s | " + " | ".join(heads) + " |",
        "|---|" + "---:|" * len(heads),
    ]
    for row in rows:
        if row.reason:
            lines.append(f"| {row.name} | {row.reason.replace('|', '/')} |" + " |" * (len(heads) - 1))
            continue
        cells = [f"{row.medians[task]:,.0f}" if task in row.medians else NO_FIGURE for task in tasks]
        if shape.kind != "encoder":
            cells.append(NO_FIGURE if row.share is None else f"{row.share:.0%}")
        cells.append(_seconds(row))
        peak = row.peak_bytes.get("first token")
        cells.append(NO_FIGURE if peak is None else f"{peak / MIB:,.0f} MiB")
        if any(each.errors for each in rows):
            cells.append(_errors(row))
        lines.append(f"| {row.name} | " + " | ".join(cells) + " |")
    versions = dict.fromkeys(row.version for row in rows if row.version)
    lines += ["", "; ".join(versions)] if versions else []
    held = aims_table(rows) if shape.aimed and any(row.ours and row.medians for row in rows) else []
    return "\n".join([*lines, *ratios(rows, tasks), *held])


def ratios(rows: list[Figures], tasks: list[str]) -> list[str]:
    """Lathe's rows over the best peer of as many bits, over the best of any, and over `transformers`."""
    ours = [row for row in rows if row.ours and row.medians and not row.reason]
    peers = [row for row in rows if not row.ours and row.medians and not row.reason]
    if not ours or not peers:
        return []
    lines = ["", "| ratio to the best peer: of as many bits / of any / to transformers | " + " | ".join(tasks) + " |"]
    lines.append("|---|" + "---:|" * len(tasks))
    for row in ours:
        cells = []
        for task in tasks:
            same = _over(row, [peer for peer in peers if peer.bits == row.bits], task)
            plain = _over(row, [peer for peer in peers if peer.name == "transformers"], task)
            cells.append(f"{same} / {_over(row, peers, task)} / {plain}")
        lines.append(f"| {row.name} | " + " | ".join(cells) + " |")
    best = [max(peers, key=lambda peer: peer.medians.get(task, 0.0)).name for task in tasks]
    lines.append("| best peer of any width | " + " | ".join(best) + " |")
    return lines


def _over(row: Figures, peers: list[Figures], task: str) -> str:
    rates = [peer.medians[task] for peer in peers if task in peer.medians]
    return f"{row.medians[task] / max(rates):.2f}×" if rates and task in row.medians else NO_FIGURE


def _reads(shape: Shape, bandwidth: Bandwidth) -> str:
    if shape.kind == "encoder":
        return ""
    weights = sum(shape.read_a_step())
    limit = bandwidth.bytes_per_second / weights
    return f", a step reads {weights / 1e6:.1f}M of them: at most {limit:,.0f} steps/s at a byte each"


def _seconds(row: Figures) -> str:
    cold, warm = row.first_token.get("cold"), row.first_token.get("warm")
    return NO_FIGURE if cold is None or warm is None else f"{cold:.2f} / {warm:.2f} s"


def _errors(row: Figures) -> str:
    # Logits say more than the log-probabilities of some tokens; these are shown of all, so that all can be compared.
    names = {"log_probs": "log-probabilities", "logits": "logits", "hidden": "hidden states"}
    return (
        ", ".join(f"{row.errors[name]:.1e} {said}" for name, said in names.items() if name in row.errors) or NO_FIGURE
    )
