"""From text to global batches: `load_data(config)`. `load_tokenizer` makes a tokenizer alone."""

from yocou_jax.data.pipeline import Batch, DataBundle, TrainIterator, Validation, load_data
from yocou_jax.data.tokenizer import Tokenizer, load_tokenizer

__all__ = [
    "Batch",
    "DataBundle",
    "Tokenizer",
    "TrainIterator",
    "Validation",
    "load_data",
    "load_tokenizer",
]
