"""From documents to batches: token ids, packed rows, a position that can be saved and resumed."""

from lathe.data.batch import Batch
from lathe.data.batches import Batches
from lathe.data.corpus import Corpus
from lathe.data.tokenise import special_tokens, tokenise

__all__ = ["Batch", "Batches", "Corpus", "special_tokens", "tokenise"]
