"""The documented formula of model FLOPs against torch's own counter."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from gptface_dist.data.batch import MaskedBatch, within
from gptface_dist.model.flops import TFLOPS, Work, peak_tflops
from gptface_dist.model.options import ModelOptions
from gptface_dist.model.parameters import initialise
from gptface_dist.model.plain import GPTFace
from gptface_dist.objectives.milm_itm import MilmItm
from gptface_dist.sequence import IGNORE, IMAGE, TEXT
from gptface_dist.tokenizers.vocabulary import Vocabulary

VOCABULARY = Vocabulary(text_size=43, image_codes=24, text_sha256="a" * 64, image_sha256="b" * 64)


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize(("sequences", "length", "text", "image"), [(2, 24, 5, 11), (3, 17, 0, 8), (1, 32, 3, 0)])
def test_formula_is_what_torch_counts(activation: str, sequences: int, length: int, text: int, image: int) -> None:
    options = ModelOptions(
        layers=3, hidden=32, heads=4, ffn=48, activation=activation, text_positions=length, rows=8, columns=8
    )
    model = GPTFace(options, VOCABULARY)
    initialise(model, 0)
    tokens = torch.zeros(sequences, length, dtype=torch.long)
    segments = torch.full_like(tokens, TEXT)
    segments[:, length // 2 :] = IMAGE
    positions = torch.zeros(sequences, length, 2, dtype=torch.long)
    labels = torch.full_like(tokens, IGNORE)
    labels.view(-1)[:text] = 1
    labels.view(-1)[text : text + image] = VOCABULARY.image_offset + 1
    objective, lengths = MilmItm(), torch.full((sequences,), length)
    masked = [within(labels, ids).nonzero() for ids in (VOCABULARY.text_range, VOCABULARY.image_range)]
    pairs = torch.ones(sequences, dtype=torch.long)
    batch = MaskedBatch(tokens, segments, positions, lengths, False, labels, pairs, *masked)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        losses = objective.losses(model(tokens, segments, positions, lengths), batch, model, {})
        torch.stack([each.loss for each in losses]).sum().backward()
    work = Work(sequences * length, sequences * length**2, (text, image, sequences))
    assert objective.flops(options, VOCABULARY, work) == counter.get_total_flops()


def test_unknown_devices_have_no_peak() -> None:
    assert peak_tflops("", "bfloat16") is None
    assert peak_tflops("NVIDIA GeForce RTX 4090", "bfloat16") is None
    assert peak_tflops("NVIDIA H200", "float32") is None, "float32 products run at more than one precision"
    assert peak_tflops("NVIDIA H200", "bfloat16") == TFLOPS["NVIDIA H200"]["bfloat16"]
