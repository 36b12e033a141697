"""From the configuration to a rank's loader: every step of the data path, in order."""

import functools
from pathlib import Path

import numpy as np

from gptface_dist.data.batch import Batch, BatchBuilder
from gptface_dist.data.folder import ShardFolder
from gptface_dist.data.loader import Deal, Loader
from gptface_dist.data.options import DataConfig
from gptface_dist.data.stream import BlockReader, Source, read_skip_list
from gptface_dist.data.tokens import TokenDecoder, TokenSample, check_sources
from gptface_dist.errors import UserError
from gptface_dist.tokenizers.vocabulary import VOCABULARY_NAME, Vocabulary

TokenLoader = Loader[TokenSample, Batch[np.ndarray]]


def read_vocabulary(config: DataConfig) -> Vocabulary:
    """The vocabulary of the tokenizers that made the tokens."""
    return Vocabulary.load(Path(config.tokenizers) / VOCABULARY_NAME)


def open_sources(config: DataConfig, vocabulary: Vocabulary) -> tuple[list[Source], tuple[int, int]]:
    """The sources, and the rows and columns of their images' codes.

    :class:`UserError` when there is none, or one is missing or was made by other tokenizers.
    """
    if not config.sources:
        raise UserError("data.sources is empty: name at least one folder of token shards")
    sources = [Source(ShardFolder.open(source.path), source.weight) for source in config.sources]
    return sources, check_sources(sources, vocabulary)


def token_loader(config: DataConfig, rank: int = 0, ranks: int = 1) -> TokenLoader:
    """The loader of data-parallel rank ``rank`` of ``ranks``.

    :class:`UserError` when a source is missing, was made by other tokenizers, or the batch sizes do not fit.
    """
    deal = Deal(config.global_batch, config.micro_batch, config.order.block, rank, ranks)
    vocabulary = read_vocabulary(config)
    sources, grid = open_sources(config, vocabulary)
    skip = frozenset[str]() if config.skip_list is None else read_skip_list(Path(config.skip_list))
    reader = functools.partial(BlockReader[TokenSample], sources, TokenDecoder(vocabulary), config.order, skip)
    build = BatchBuilder(vocabulary, grid, config.order.seed, config.masking, config.batch)
    return Loader(reader, build, deal, config.workers, config.max_bad_fraction)
