"""What an adapter's two files leave unsaid, noted beside them: the head it was trained under, and how layers share.

PEFT's files say what is added to which model. A head that is new with the adapter (a classifier on a pretrained
encoder) is in the file, but what kind of head it is, is not: PEFT expects the base to have it. Lathe writes the head's
description as `head.json`, so that the plain base serves; without that file, the base's own head is taken.

An adapter may give each layer its own part where the base's layers share their weights (`lathe resize … remainder=8`).
`sharing.json` says how the layers are to share then.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lathe.architecture import Architecture, Head
from lathe.errors import RequestError

HEAD, SHARING = "head.json", "sharing.json"


def write_notes(directory: Path, architecture: Architecture) -> None:
    """Write what an adapter's own files do not say of the model under it."""
    patterns = {name: str(stack.sharing) for name, stack in architecture.stacks}
    for name, note in ((HEAD, architecture.head.to_dict()), (SHARING, patterns)):
        (directory / name).write_text(json.dumps(note, indent=2) + "\n", encoding="utf-8")


def adapted_architecture(directory: str | Path, base: Architecture) -> Architecture:
    """The base with the head, and with the sharing of layers, that the adapter was made for.

    Raises:
        RequestError: a description that cannot be read.
    """
    head, sharing = (_beside(directory, name) for name in (HEAD, SHARING))
    if sharing is not None:
        base = base.with_({f"{name}.sharing": pattern for name, pattern in sharing.items()})
    if head is None:
        return base
    made = Head.from_dict(head)
    return base if made == base.head else base.with_({"head": made.to_dict()})


def _beside(directory: str | Path, name: str) -> dict[str, Any] | None:
    path = Path(directory).expanduser() / name
    if not path.is_file():
        return None
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RequestError(f"{path} is not JSON ({error}); is the file complete?") from None
    return found
