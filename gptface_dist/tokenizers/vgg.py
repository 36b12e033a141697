"""The feature loss of a VGG-16, with weights that the user supplies.

LPIPS (Zhang et al. 2018) without its learnt weights: squared differences of channel-normalised features after the five
blocks, each averaged over positions, all channels alike. It is called by its own name because it is not LPIPS.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from gptface_dist.errors import UserError, one_line

# Convolutions of each block, and their numbers in torchvision's `vgg16().features`.
BLOCKS = (
    ((0, 3, 64), (2, 64, 64)),
    ((5, 64, 128), (7, 128, 128)),
    ((10, 128, 256), (12, 256, 256), (14, 256, 256)),
    ((17, 256, 512), (19, 512, 512), (21, 512, 512)),
    ((24, 512, 512), (26, 512, 512), (28, 512, 512)),
)
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class VGGLoss(nn.Module):
    """Distance of pictures in the features of a VGG-16; its weights are fixed."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, path: Path):
        """Load the convolutions from a safetensors file with torchvision's names; other tensors are ignored."""
        super().__init__()
        self.convolutions = nn.ModuleDict(
            {str(number): nn.Conv2d(inputs, outputs, 3, padding=1) for block in BLOCKS for number, inputs, outputs in block}
        )
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("deviation", torch.tensor(DEVIATION).view(1, 3, 1, 1), persistent=False)
        if not path.is_file():
            raise UserError(f"{path} does not exist: give a safetensors file with a VGG-16's convolutions")
        try:
            tensors = load_file(path)
            wanted = {name: tensors[f"features.{name}"] for name in self.convolutions.state_dict()}
            self.convolutions.load_state_dict(wanted)
        except Exception as error:  # safetensors, missing names and wrong shapes raise three kinds
            raise UserError(f"{path} holds no VGG-16 under torchvision's names: {one_line(error)}") from None
        self.requires_grad_(False)

    def features(self, pictures: Tensor) -> list[Tensor]:
        """Activations at the end of each block for pixels in [-1, 1], each position's channels scaled to length 1."""
        activations = []
        x = ((pictures + 1) / 2 - self.mean) / self.deviation
        for number, block in enumerate(BLOCKS):
            if number:
                x = functional.max_pool2d(x, 2)
            for name, _, _ in block:
                x = functional.relu(self.convolutions[str(name)](x))
            activations.append(functional.normalize(x, dim=1, eps=1e-8))
        return activations

    def forward(self, reconstruction: Tensor, original: Tensor) -> Tensor:
        """Mean over pictures of the blocks' summed distances; at least 16 pixels a side."""
        pairs = zip(self.features(reconstruction), self.features(original), strict=True)
        return torch.stack([(ours - theirs).square().sum(1).mean() for ours, theirs in pairs]).sum()
