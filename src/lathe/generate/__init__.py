"""Text out of a model: greedy, sampled or searched for with beams, through the static cache.

`settings` says what may be asked for, `prompt` makes it whole, `rows` is a batch in flight (a model and its
cache), `history` and `filters` change the next token's logits, `draw` chooses from them, `single` and `beams` are
the loops, `stops` ends a row at a text, `memory` asks whether a batch fits, `decode` puts them together, and
`text` goes from prompts to text. Where more prompts wait than go at once, `continuous` lets them take turns: `slots`
are the places in the cache, and `flights` chooses the tokens of the rows that stand there. `speculative` lets a
smaller model write ahead.
"""

from lathe.generate.decode import Decoded, decode, generate, steps
from lathe.generate.settings import Settings

__all__ = ["Decoded", "Settings", "decode", "generate", "steps"]
