"""Text out of a model: greedy and sampled, through the static cache.

`settings` says what may be asked for, `filters` changes the next token's logits, `decode` is the loop.
"""

from lathe.generate.decode import generate
from lathe.generate.settings import Settings

__all__ = ["Settings", "generate"]
