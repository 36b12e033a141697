"""Checks of a run before its processes join, without importing DeepSpeed and megatron-core."""

from dataclasses import replace
from pathlib import Path

from gptface_dist.data.batch import BatchOptions
from gptface_dist.data.loader import BatchSharding
from gptface_dist.data.options import DataConfig
from gptface_dist.data.sources import open_sources, read_vocabulary
from gptface_dist.errors import UserError
from gptface_dist.model.options import ModelOptions
from gptface_dist.parallel import specs
from gptface_dist.sequence import SPECIALS_PER_SEQUENCE
from gptface_dist.tokenizers.vocabulary import Vocabulary
from gptface_dist.training import init_from
from gptface_dist.training.config import Config


def check_run(config: Config, world: int) -> Vocabulary:
    """Refuse a run of ``world`` processes with an impossible layout, missing data, or a model that does not fit them.

    Returns the joint vocabulary of the run's tokenizers.
    """
    data = config.data
    sharding = BatchSharding(data.global_batch, data.micro_batch, data.order.block, 0, max(1, config.layout.dp))
    config.layout.check(world, config.model, sharding.micro_batches, data.batch.pad_to_multiple_of)
    specs.check(config.engine, config.model, config.layout)
    config.attention_health.check(config.engine.attention, config.model.head_size)
    vocabulary = read_vocabulary(data)
    _, grid = open_sources(data, vocabulary)
    check_fit(config.model, data.batch, grid)
    if config.run.init_from:
        init_from.check_release(Path(config.run.init_from), config.objective, config.model, vocabulary)
    if config.evaluation.sources:
        check_held_out(config, vocabulary)
    return vocabulary


def held_out(config: Config) -> DataConfig:
    """Data configuration of evaluations."""
    return replace(config.data, sources=config.evaluation.sources, workers=0, skip_list=None)


def check_held_out(config: Config, vocabulary: Vocabulary) -> None:
    """Refuse evaluations that would read a sample more than once."""
    sources, grid = open_sources(held_out(config), vocabulary)
    check_fit(config.model, config.data.batch, grid)
    samples, batches = sum(sum(source.folder.counts) for source in sources), config.evaluation.batches
    if batches * config.data.global_batch > samples:
        raise UserError(
            f"evaluation.batches {batches} x data.global_batch {config.data.global_batch} are "
            f"{batches * config.data.global_batch} samples, evaluation.sources hold {samples}: at most "
            f"{samples // config.data.global_batch} batches"
        )


def check_fit(model: ModelOptions, batch: BatchOptions, grid: tuple[int, int]) -> None:
    """Refuse a model whose position embeddings are too few for the data; ``grid``: rows and columns of image codes."""
    longest = batch.text_length + SPECIALS_PER_SEQUENCE
    if longest > model.text_positions:
        raise UserError(
            f"data.batch.text_length {batch.text_length} and {SPECIALS_PER_SEQUENCE} specials need model.text_positions of "
            f"at least {longest}, got {model.text_positions}"
        )
    if grid[0] > model.rows or grid[1] > model.columns:
        raise UserError(
            f"images of {grid[0]}x{grid[1]} codes do not fit model.rows {model.rows} x model.columns {model.columns}"
        )
