"""Corpora to token shards that OLMo-core memory-maps, with a manifest that training checks."""

from .config import DataConfig, SourceConfig, TokenizerSection, load_config
from .manifest import Manifest, TokenizerRecord, verify
from .prepare import prepare
from .tokenizer import train_tokenizer

__all__ = [
    "DataConfig",
    "Manifest",
    "SourceConfig",
    "TokenizerRecord",
    "TokenizerSection",
    "load_config",
    "prepare",
    "train_tokenizer",
    "verify",
]
