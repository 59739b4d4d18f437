"""Text out of a model: greedy and sampled, through the static cache.

`settings` says what may be asked for, `prompt` makes it whole, `rows` is a batch in flight (a model and its
cache), `filters` changes the next token's logits, `draw` chooses from them, `decode` is the loop, and `text`
goes from prompts to text.
"""

from lathe.generate.decode import generate
from lathe.generate.settings import Settings

__all__ = ["Settings", "generate"]
