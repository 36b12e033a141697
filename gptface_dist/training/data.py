"""From the configuration to the loader of one data-parallel rank."""

import functools
from pathlib import Path
from typing import Any

import numpy as np

from gptface_dist.data.loader import BatchSharding, Loader
from gptface_dist.data.options import DataConfig
from gptface_dist.data.sources import open_sources, read_vocabulary
from gptface_dist.data.stream import BlockReader, read_skip_list
from gptface_dist.objectives.objective import Objective
from gptface_dist.sequence import PaddedBatch

BatchLoader = Loader[Any, PaddedBatch[np.ndarray]]


def batch_loader(config: DataConfig, objective: Objective, rank: int = 0, ranks: int = 1) -> BatchLoader:
    """The loader of data-parallel rank ``rank`` of ``ranks``.

    :class:`UserError` if a source is missing, was made by other tokenizers, or batch sizes do not divide.
    """
    sharding = BatchSharding(config.global_batch, config.micro_batch, config.order.block, rank, ranks)
    vocabulary = read_vocabulary(config)
    sources, grid = open_sources(config, vocabulary)
    skip = frozenset[str]() if config.skip_list is None else read_skip_list(Path(config.skip_list))
    reader = functools.partial(BlockReader[Any], sources, objective.decoder(vocabulary), config.order, skip)
    collate = objective.collate(config, vocabulary, grid)
    return Loader(reader, collate, sharding, config.workers, config.max_bad_fraction)
