"""Evaluate an image tokenizer's reconstructions: PSNR, SSIM, use of the codebook, and a sheet of pictures."""

import io
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from gptface_dist.errors import UserError
from gptface_dist.tokenizers.codebook import histogram, perplexity, share_used
from gptface_dist.tokenizers.image import ImageTokenizer
from gptface_dist.tokenizers.metrics import psnr, ssim

GAP = 2
"""Pixels between the pictures of a sheet."""


@dataclass(frozen=True)
class ImageEvaluation:
    """Means over pictures. Originals and reconstructions are compared after rounding to 8 bits a channel."""

    pictures: int
    """Number of pictures."""
    psnr: float
    """Peak signal-to-noise ratio in dB, the mean of the pictures' values."""
    ssim: float
    """Structural similarity, the mean of the pictures' values; 1 for equal pictures."""
    codes_used: float
    """Share of the codebook that occurs in these pictures. Few pictures cannot use many codes."""
    perplexity: float
    """``exp`` of the entropy of the codes' frequencies in these pictures."""


def evaluate(tokenizer: ImageTokenizer, batches: Iterable[Tensor], sheet_rows: int = 8) -> tuple[ImageEvaluation, Image.Image]:
    """Encode and decode pictures, float32 [B, 3, S, S] in [-1, 1]; the sheet shows the first ``4 * sheet_rows``."""
    counts = torch.zeros(tokenizer.codes, dtype=torch.int64)
    scores: list[tuple[Tensor, Tensor]] = []
    shown: list[tuple[Tensor, Tensor]] = []
    for batch in batches:
        codes = tokenizer.encode(batch)
        counts += histogram(codes, tokenizer.codes).cpu()
        original, reconstruction = to_bytes(batch), to_bytes(tokenizer.decode(codes))
        x, y = from_bytes(reconstruction), from_bytes(original)
        scores.append((psnr(x, y), ssim(x, y)))
        shown += zip(original, reconstruction, strict=True) if len(shown) < 4 * sheet_rows else ()
    if not scores:
        raise UserError("there is no picture to evaluate on")
    psnrs, ssims = (torch.cat(values) for values in zip(*scores, strict=True))
    result = ImageEvaluation(len(psnrs), float(psnrs.mean()), float(ssims.mean()), share_used(counts), perplexity(counts))
    return result, sheet(shown[: 4 * sheet_rows])


def to_bytes(pixels: Tensor) -> Tensor:
    """Pixels in [-1, 1] [..., 3, H, W] -> uint8 on the CPU."""
    return ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()


def from_bytes(pixels: Tensor) -> Tensor:
    """uint8 -> float32 in [-1, 1]."""
    return pixels.float() / 127.5 - 1


def sheet(pairs: list[tuple[Tensor, Tensor]], columns: int = 4) -> Image.Image:
    """Pairs of pictures (original, reconstruction), uint8 [3, S, S], side by side, ``columns`` pairs a row."""
    side = pairs[0][0].shape[-1]
    rows = -(-len(pairs) // columns)
    cell = (2 * side + 3 * GAP, side + GAP)
    image = Image.new("RGB", (columns * cell[0], rows * cell[1]), "white")
    for number, pair in enumerate(pairs):
        left, top = number % columns * cell[0], number // columns * cell[1]
        for place, picture in enumerate(pair):
            image.paste(Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy()), (left + place * (side + GAP), top))
    return image


def to_png(image: Image.Image) -> bytes:
    """The bytes of a PNG file of the picture."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
