"""`python -m benchmarks` runs every benchmark of this folder; `python -m benchmarks NAME …` those named.

A benchmark is a module here with a `main`. Each runs in a process of its own, so that none measures what
another left in memory, and one that fails does not keep the rest from running.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent


def main(names: list[str]) -> int:
    """Run the benchmarks `names`, or all; 0, or 1 where one failed, or 2 where one does not exist."""
    known = sorted(path.stem for path in FOLDER.glob("*.py") if not path.stem.startswith("_"))
    unknown = [name for name in names if name not in known]
    if unknown:
        sys.stderr.write(f"benchmarks: there is no {unknown[0]!r}; there are {', '.join(known)}\n")
        return 2
    failed = []
    for name in names or known:
        print(f"== {name}", flush=True)
        done = subprocess.run([sys.executable, "-m", f"benchmarks.{name}"], cwd=FOLDER.parent, check=False)
        if done.returncode:
            failed.append(name)
    if failed:
        sys.stderr.write(f"benchmarks: failed: {', '.join(failed)}\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
