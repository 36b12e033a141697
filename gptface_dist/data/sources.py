"""Open the vocabulary and the sources that a data configuration names."""

from pathlib import Path

from gptface_dist.data.folder import ShardFolder
from gptface_dist.data.options import DataConfig
from gptface_dist.data.stream import Source
from gptface_dist.data.tokens import check_sources
from gptface_dist.errors import UserError
from gptface_dist.tokenizers.vocabulary import VOCABULARY_NAME, Vocabulary


def read_vocabulary(config: DataConfig) -> Vocabulary:
    """Load ``vocabulary.json`` of the configuration's tokenizers."""
    return Vocabulary.load(Path(config.tokenizers) / VOCABULARY_NAME)


def open_sources(config: DataConfig, vocabulary: Vocabulary) -> tuple[list[Source], tuple[int, int]]:
    """Open the sources; returns them and their common grid (rows, columns) of image codes.

    :class:`UserError` when there is none, or one is missing or was made by other tokenizers.
    """
    if not config.sources:
        raise UserError("data.sources is empty: name at least one folder of token shards")
    sources = [Source(ShardFolder.open(source.path), source.weight) for source in config.sources]
    return sources, check_sources(sources, vocabulary)
