"""From documents to batches: records, token ids, packed rows, a position that can be saved and resumed."""

from lathe.data.batch import Batch
from lathe.data.batches import Batches
from lathe.data.cache import cached
from lathe.data.corpus import Corpus
from lathe.data.sources import read
from lathe.data.tasks import Task, pairs
from lathe.data.tokenise import special_tokens, tokenise, tokenise_records

__all__ = [
    "Batch",
    "Batches",
    "Corpus",
    "Task",
    "cached",
    "pairs",
    "read",
    "special_tokens",
    "tokenise",
    "tokenise_records",
]
