"""Architecture and training options of an image tokenizer, with presets. Imports no torch."""

from dataclasses import dataclass
from typing import Any, Literal

from gptface_dist.errors import UserError


@dataclass(frozen=True)
class ImageArchitecture:
    """The shape of a VQ autoencoder."""

    size: int
    """Side of the training pictures, in pixels. The model is convolutional: other multiples of ``factor`` work, too."""
    channels: tuple[int, ...]
    """Channels of each level, from full resolution down; between two levels the resolution halves."""
    layers: int
    """Residual blocks a level in the encoder; the decoder has one more."""
    codes: int
    """Entries of the codebook."""
    code_channels: int
    """Channels of a codebook entry."""
    latent_channels: int
    """Channels of the encoder's output, before the 1x1 convolution to ``code_channels``."""
    attention: bool
    """Self-attention at the coarsest level."""
    norm_groups: int = 32
    """Groups of the group normalisations; divides every number of channels."""

    def __post_init__(self) -> None:
        if self.size % self.factor or self.size < 1:
            raise UserError(f"size {self.size} is not a multiple of the down-sampling factor {self.factor}")
        if self.codes < 2 or self.codes > 1 << 16:
            raise UserError(f"codes must be 2 to 65536 (they are stored in 16 bits), not {self.codes}")
        if odd := [c for c in self.channels if c % self.norm_groups]:
            raise UserError(f"channels {odd} are not multiples of norm_groups {self.norm_groups}")

    @property
    def factor(self) -> int:
        """Down-sampling factor: side in pixels of the square that one code stands for."""
        return int(2 ** (len(self.channels) - 1))

    @property
    def grid(self) -> int:
        """Codes along one side of a picture."""
        return self.size // self.factor

    def vqmodel(self) -> dict[str, Any]:
        """Arguments of diffusers' ``VQModel``."""
        last_down, last_up = ("AttnDownEncoderBlock2D", "AttnUpDecoderBlock2D") if self.attention else (DOWN, UP)
        levels = len(self.channels)
        return {
            "block_out_channels": self.channels,
            "down_block_types": (DOWN,) * (levels - 1) + (last_down,),
            "up_block_types": (last_up,) + (UP,) * (levels - 1),
            "layers_per_block": self.layers,
            "latent_channels": self.latent_channels,
            "vq_embed_dim": self.code_channels,
            "num_vq_embeddings": self.codes,
            "norm_num_groups": self.norm_groups,
            "sample_size": self.size,
            "mid_block_add_attention": self.attention,
        }


DOWN, UP = "DownEncoderBlock2D", "UpDecoderBlock2D"


@dataclass(frozen=True)
class ImageTrainingOptions:
    """Optimizer, losses and intervals of an image tokenizer's training. Pixels are in [-1, 1]; losses are means over them."""

    steps: int
    """Optimizer steps."""
    batch: int
    """Pictures a step, over all processes."""
    learning_rate: float
    """Peak rate of AdamW, reached after the warm-up; then a cosine down to zero at the last step."""
    warmup: int
    """Steps over which the rate rises linearly; the decoder gets unquantised latents during these steps."""
    beta1: float = 0.5
    """AdamW's decay of the gradient's mean; low, as is usual beside a discriminator."""
    beta2: float = 0.9
    """AdamW's decay of the squared gradient's mean."""
    weight_decay: float = 0.0
    """AdamW's weight decay; the codebook has none."""
    clip: float = 1.0
    """Largest norm of the gradient; a larger one is scaled down to it."""
    l1: float = 1.0
    """Weight of the mean absolute error of pixels."""
    l2: float = 0.0
    """Weight of the mean squared error of pixels."""
    codebook: float = 1.0
    """Weight of the codebook's loss ``|sg(z) - e|^2 + commitment |z - sg(e)|^2``."""
    commitment: float = 0.25
    """Weight of the encoder's side of the codebook's loss."""
    laplacian: float = 0.0
    """Weight of the Laplacian pyramid's loss, on edges and texture at every scale; needs no network and is not LPIPS."""
    vgg: float = 0.0
    """Weight of the feature loss of a VGG-16; needs ``vgg_weights``."""
    vgg_weights: str = ""
    """Safetensors file with a VGG-16's convolutions under torchvision's names (``features.0.weight``, ...)."""
    adversarial: float = 0.0
    """Weight of the patch discriminator's loss, before the adaptive factor; 0 trains none."""
    adversarial_start: int = 0
    """Step from which the discriminator is trained and its loss is added."""
    revive_every: int = 50
    """Steps between revivals of dead codes; 0 never revives."""
    revive_after: int = 100
    """Steps without use after which a code is dead."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of the convolutions (autocast); quantisation, losses and weights stay in float32."""
    seed: int = 0
    """Seed of the initial weights and of the revivals."""
    log_every: int = 20
    """Steps between lines of ``metrics.jsonl``."""
    checkpoint_every: int = 500
    """Steps between checkpoints."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "log_every", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("l1", "l2", "codebook", "commitment", "laplacian", "vgg", "adversarial", "warmup", "learning_rate"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} must not be negative, not {getattr(self, name)}")
        if self.l1 + self.l2 + self.laplacian + self.vgg == 0:
            raise UserError("no loss looks at the picture: give l1, l2, laplacian or vgg a weight")
        if self.vgg > 0 and not self.vgg_weights:
            raise UserError("the vgg loss needs vgg_weights, a safetensors file with a VGG-16's convolutions")
        if self.precision not in ("fp32", "bf16"):
            raise UserError(f"precision must be fp32 or bf16, not {self.precision}")


@dataclass(frozen=True)
class ImagePreset:
    """An architecture with matching training options."""

    architecture: ImageArchitecture
    """Shape of the autoencoder."""
    training: ImageTrainingOptions
    """Training options for this shape."""


PRESETS = {
    # For a laptop: 256 codes a picture of 64 pixels, minutes of training on two cores.
    "tiny": ImagePreset(
        ImageArchitecture(
            size=64, channels=(16, 32, 64), layers=1, codes=512, code_channels=8, latent_channels=64, attention=False,
            norm_groups=4,
        ),
        ImageTrainingOptions(
            steps=1000, batch=8, learning_rate=2e-3, warmup=100, beta1=0.9, beta2=0.95, l1=1.0, l2=1.0, laplacian=0.1,
            revive_every=20, revive_after=30, log_every=50, checkpoint_every=100,
        ),
    ),
    # 256 codes a picture of 128 pixels; a minute or two of one GPU.
    "small": ImagePreset(
        ImageArchitecture(
            size=128, channels=(32, 64, 128, 128), layers=1, codes=512, code_channels=16, latent_channels=128, attention=False,
            norm_groups=8,
        ),
        ImageTrainingOptions(
            steps=2000, batch=64, learning_rate=1e-3, warmup=100, beta1=0.9, beta2=0.95, l1=1.0, l2=1.0, laplacian=0.1,
            revive_every=20, revive_after=30, log_every=50, checkpoint_every=250,
        ),
    ),
    # 256 codes a picture of 128 pixels; one GPU, for longer.
    "base": ImagePreset(
        ImageArchitecture(
            size=128, channels=(64, 128, 128, 256), layers=2, codes=1024, code_channels=64, latent_channels=256, attention=True
        ),
        ImageTrainingOptions(
            steps=100_000, batch=64, learning_rate=3e-4, warmup=1000, laplacian=0.1,
            adversarial=0.8, adversarial_start=20_000, revive_every=200, revive_after=500, checkpoint_every=2000,
        ),
    ),
    # The shape of the VQGAN (f=16, 1024 codes) of Esser et al. 2021: 256 codes a picture of 256 pixels; several GPUs.
    "large": ImagePreset(
        ImageArchitecture(
            size=256, channels=(128, 128, 256, 256, 512), layers=2, codes=1024, code_channels=256, latent_channels=256,
            attention=True,
        ),
        ImageTrainingOptions(
            steps=300_000, batch=96, learning_rate=4e-4, warmup=2000, laplacian=0.1,
            adversarial=0.8, adversarial_start=30_000, revive_every=200, revive_after=500, checkpoint_every=2000,
        ),
    ),
}  # fmt: skip
