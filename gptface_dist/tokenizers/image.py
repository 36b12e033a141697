"""The image tokenizer: a VQ autoencoder in diffusers' format, as a function from pixels to codes and back.

Behaviour of diffusers 0.42.1 that this module relies on or avoids:

- ``VQModel.encode`` stops before quantisation, and ``VQModel.decode`` quantises its input, unless ``force_not_quantize``;
  with ``lookup_from_codebook`` in the configuration that flag instead means "these are codes". One call thus has three
  meanings; here the decoder receives code vectors directly, which is right for every configuration.
- ``norm_type="spatial"`` (MoVQ) gives the decoder the code vectors a second time.
- ``mid_block_add_attention=False`` leaves out the attention of the middle block only; ``Attn...Block2D`` levels keep theirs.
- ``force_upcast`` and ``scaling_factor`` change nothing in ``VQModel``.
- ``from_pretrained`` fills tensors that the file lacks with random numbers and a warning; here that is an error.
"""

import os
import shutil
from pathlib import Path

import torch
from diffusers import VQModel
from torch import Tensor

from gptface_dist.errors import UserError, one_line
from gptface_dist.tokenizers.codebook import nearest
from gptface_dist.tokenizers.image_files import CONFIG_NAME, WEIGHTS_NAME, image_sha256, read_config

PICTURES_ON_GPU = 16


class ImageTokenizer:
    """A trained image tokenizer, in float32."""

    def __init__(self, model: VQModel, digest: str):
        """Wrap a ``VQModel``; ``digest`` is :func:`~gptface_dist.tokenizers.image_files.image_sha256` of its folder."""
        self._model = model.float().eval().requires_grad_(False)
        self.sha256 = digest
        """Identity of the tokenizer: a hash of its configuration and weights."""

    @classmethod
    def load(cls, folder: Path, device: torch.device | str = "cpu") -> "ImageTokenizer":
        """Load a folder that diffusers saved as a ``VQModel``; :class:`UserError` where it is none or incomplete."""
        read_config(folder)
        try:
            # Without low_cpu_mem_usage diffusers neither needs accelerate nor warns that it is missing. It draws weights
            # before it reads them: fork_rng preserves the caller's random state.
            with torch.random.fork_rng(devices=[]):
                model, info = VQModel.from_pretrained(
                    folder, use_safetensors=True, local_files_only=True, low_cpu_mem_usage=False, output_loading_info=True
                )
        except Exception as error:  # a broken file, a foreign configuration and wrong shapes raise many kinds
            raise UserError(f"{folder} cannot be read as a VQModel: {one_line(error)}") from None
        if lost := [*info["missing_keys"], *info["unexpected_keys"]]:
            raise UserError(f"{folder / WEIGHTS_NAME} does not fit {CONFIG_NAME}: {len(lost)} tensors differ, first {lost[0]}")
        if (model.config.in_channels, model.config.out_channels) != (3, 3):
            raise UserError(f"{folder} is a VQModel for pictures of {model.config.in_channels} channels: RGB is needed")
        return cls(model.to(device), image_sha256(folder))

    def save(self, folder: Path) -> None:
        """Write the model in diffusers' format and update :attr:`sha256`; readers see nothing or all of it."""
        self.sha256 = save_model(self._model, folder)

    @property
    def codes(self) -> int:
        """Size of the codebook."""
        return self._model.config.num_vq_embeddings

    @property
    def factor(self) -> int:
        """Down-sampling factor: side in pixels of the square that one code stands for."""
        return int(2 ** (len(self._model.config.block_out_channels) - 1))

    @property
    def device(self) -> torch.device:
        """Device of the model's parameters."""
        return self._model.device

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Float32 [B, 3, H, W] in [-1, 1] -> int64 [B, H / factor, W / factor], on the model's device.

        A picture's codes do not depend on the pictures beside it. The last bits of a convolution differ with the size of
        the batch (2e-6 was measured on the CPU), which can turn a near tie between two codes. So the network always sees
        batches of one size: 1 on the CPU, 16 on a GPU, the last one filled up. Between devices, numbers of threads or
        versions of torch near ties can still turn.

        :class:`UserError` where H or W is no multiple of the factor; ``ValueError`` where the pixels are something else.
        """
        if pixels.dtype != torch.float32 or pixels.ndim != 4 or pixels.shape[1] != 3:
            raise ValueError(f"pixels must be float32 [B, 3, H, W], not {pixels.dtype} {tuple(pixels.shape)}")
        if pixels.numel() and not bool((pixels.abs() <= 1).all()):
            raise ValueError("pixels must be within [-1, 1]")
        height, width = pixels.shape[-2:]
        if height % self.factor or width % self.factor or not height * width:
            raise UserError(f"pictures of {width}x{height} pixels do not divide into {self.factor}x{self.factor} patches")
        at_once = PICTURES_ON_GPU if self.device.type == "cuda" else 1
        codes = torch.empty(len(pixels), height // self.factor, width // self.factor, dtype=torch.int64, device=self.device)
        # TensorFloat-32, torch's default for convolutions on GPUs, has 10 bits of mantissa: it would turn many more ties.
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            for start in range(0, len(pixels), at_once):
                part = pixels[start : start + at_once].to(self.device)
                filled = torch.cat([part, part.new_zeros(at_once - len(part), *part.shape[1:])])
                rows = self._model.encode(filled).latents.permute(0, 2, 3, 1)
                ids = nearest(rows.reshape(-1, rows.shape[-1]), self._model.quantize.embedding.weight)
                codes[start : start + at_once] = ids.view(rows.shape[:-1])[: len(part)]
        return codes

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Integer [B, h, w] in ``[0, codes)`` -> float32 [B, 3, h * factor, w * factor] in [-1, 1], on the model's device."""
        if codes.ndim != 3 or codes.is_floating_point():
            raise ValueError(f"codes must be integers [B, h, w], not {codes.dtype} {tuple(codes.shape)}")
        if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < self.codes:
            raise ValueError(f"codes must be within 0 and {self.codes - 1}, not {int(codes.min())} to {int(codes.max())}")
        if not len(codes):  # diffusers' attention cannot shape an empty batch
            return torch.zeros(0, 3, *(side * self.factor for side in codes.shape[1:]), device=self.device)
        vectors = self._model.quantize.embedding(codes.long().to(self.device))
        return decode_vectors(self._model, vectors.permute(0, 3, 1, 2).contiguous()).clamp(-1, 1)


def decode_vectors(model: VQModel, vectors: Tensor) -> Tensor:
    """The decoder of a ``VQModel``: code vectors [B, D, h, w] -> pixels [B, 3, H, W], not clamped."""
    spatial = vectors if model.config.norm_type == "spatial" else None
    return model.decoder(model.post_quant_conv(vectors), spatial)


def save_model(model: VQModel, folder: Path) -> str:
    """Write a ``VQModel`` in diffusers' format; other files in the folder stay. Returns its identity.

    The weights come first, under their final name only when whole, and the configuration last: a folder with a
    configuration has its weights.
    """
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / ".saving"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        model.save_pretrained(temporary, safe_serialization=True)
        # diffusers leaves the weights readable for their owner alone.
        shutil.copymode(temporary / CONFIG_NAME, temporary / WEIGHTS_NAME)
        (folder / CONFIG_NAME).unlink(missing_ok=True)
        for name in (WEIGHTS_NAME, CONFIG_NAME):
            with (temporary / name).open("rb") as file:
                os.fsync(file.fileno())
            (temporary / name).replace(folder / name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return image_sha256(folder)
