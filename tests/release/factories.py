"""Small releases for tests."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from gptface_dist.checkpoint.chunk_spec import ChunkSpec, chunk_specs
from gptface_dist.checkpoint.record import RunRecord
from gptface_dist.checkpoint.save import Content, save_checkpoint
from gptface_dist.checkpoint.tensor_shards import TensorChunk, TensorShards
from gptface_dist.distributed.collectives import RankGroup
from gptface_dist.model.options import ModelOptions
from gptface_dist.model.parameters import initialise
from gptface_dist.model.plain import GPTFace
from gptface_dist.model.reference_batch import reference_batch
from gptface_dist.objectives.milm_itm import MilmItm
from gptface_dist.objectives.reference_outputs import REFERENCE_NAME, ReferenceOutputs, reference_outputs
from gptface_dist.objectives.registry import ObjectiveOptions
from gptface_dist.parallel.layout import Layout
from gptface_dist.tokenizers.image import save_model
from gptface_dist.tokenizers.text import TextOptions, train_text_tokenizer
from gptface_dist.tokenizers.vocabulary import Vocabulary, join
from tests.vqmodels import small_model

GRID = (3, 4)
OPTIONS = ModelOptions(layers=2, hidden=16, heads=4, ffn=24, text_positions=19, rows=4, columns=4, init_std=0.3)
VARIANTS = {
    "gelu": OPTIONS,
    "swiglu": dataclasses.replace(OPTIONS, activation="swiglu"),
    "qk_norm": dataclasses.replace(OPTIONS, qk_norm=True),
}


def make_tokenizers(folder: Path, seed: int = 0) -> Vocabulary:
    """A folder of two small tokenizers."""
    words = [
        f"a face with {colour} hair and {thing} number {seed}"
        for colour in ("black", "brown")
        for thing in ("a hat", "glasses")
    ]
    train_text_tokenizer(words, folder / "text.model", TextOptions(size=280, character_coverage=1.0))
    save_model(small_model(seed=seed), folder / "image")
    return join(folder)


def make_model(vocabulary: Vocabulary, options: ModelOptions = OPTIONS, seed: int = 0) -> GPTFace:
    """A model none of whose parameters is without effect: no norm is 1, no bias 0."""
    model = GPTFace(options, vocabulary)
    initialise(model, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.eval()


def make_checkpoint(
    run: Path,
    model: GPTFace,
    tokenizers: Path,
    step: int = 200,
    average: GPTFace | None = None,
    outputs: Mapping[str, torch.Tensor] | None = None,
    dtype: str = "float32",
    stored_as: Callable[[str], str] = lambda name: name,
    cut: int = 499,
    moments: bool = True,
) -> Path:
    """A checkpoint of a run as training writes it, in pieces of at most about ``cut`` elements. Returns its folder.

    ``outputs`` are the model's own by default; ``stored_as`` is the table of names that the run had, and
    without ``moments`` the optimizer's state is left out.
    """
    batch = reference_batch(model.vocabulary, GRID, 16)
    recorded = ReferenceOutputs(batch, outputs or reference_outputs(MilmItm(), model, batch), dtype)
    pieces = {}
    kinds = {"weights": model} | ({"exp_avg": model, "exp_avg_sq": model} if moments else {})
    kinds |= {"ema": average} if average else {}
    for kind, held in kinds.items():
        for name, parameter in held.named_parameters():
            whole = parameter.detach()
            parts = [TensorChunk(box, _part(whole, box)) for box in _boxes(tuple(whole.shape), cut)]
            pieces[f"{kind}/{stored_as(name)}"] = TensorShards(tuple(whole.shape), parts)
    config = {
        "objective": dataclasses.asdict(ObjectiveOptions()),
        "model": dataclasses.asdict(model.options),
        "layout": dataclasses.asdict(Layout(dp=2, tp=2, zero=3)),
        "data": {
            "tokenizers": str(tokenizers),
            "sources": [{"path": "tokens/a", "weight": 1.0}, {"path": "tokens/b", "weight": 3.0}],
        },
    }
    record = RunRecord(
        step=step,
        updates=step,
        state={"samples": step * 64, "tokens": step * 999},
        config=config,
        vocabulary=dataclasses.asdict(model.vocabulary),
        metrics={"loss": 5.25, "loss/text": 3.5, "accuracy/text": 0.25, "grad_norm": 1.0},
        versions={"torch": "2.13.0", "deepspeed": "0.19.8"},
    )
    files = {REFERENCE_NAME: recorded.content()}
    return save_checkpoint(run / "checkpoints", Content(pieces, record, files), RankGroup())


def _boxes(shape: tuple[int, ...], cut: int) -> list[ChunkSpec]:
    size = math.prod(shape)
    return [box for start in range(0, size, cut) for box in chunk_specs(start, min(size, start + cut), shape)]


def _part(whole: torch.Tensor, box: ChunkSpec) -> torch.Tensor:
    return whole[tuple(slice(start, start + length) for start, length in zip(box.offsets, box.sizes, strict=True))]
