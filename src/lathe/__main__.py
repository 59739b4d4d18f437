"""`python -m lathe` is `lathe`."""

from __future__ import annotations

import sys

from lathe.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
