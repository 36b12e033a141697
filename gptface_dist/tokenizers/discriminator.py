"""The patch discriminator of a VQGAN, its hinge losses, and the adaptive weight that keeps it in proportion."""

import torch
from torch import Tensor, nn
from torch.nn import functional


class PatchDiscriminator(nn.Module):
    """Judges overlapping patches: pixels [B, 3, S, S] -> one logit a patch [B, 1, S', S'] (Isola et al. 2017).

    Group instead of batch normalisation, so that a picture's logits depend neither on the batch nor on its split over
    processes.
    """

    def __init__(self, layers: int = 3, channels: int = 64):
        super().__init__()
        parts: list[nn.Module] = [nn.Conv2d(3, channels, 4, 2, 1), nn.LeakyReLU(0.2)]
        width = channels
        for layer in range(1, layers + 1):
            wider = channels * min(2**layer, 8)
            stride = 2 if layer < layers else 1
            parts += [nn.Conv2d(width, wider, 4, stride, 1, bias=False), nn.GroupNorm(32, wider), nn.LeakyReLU(0.2)]
            width = wider
        self.body = nn.Sequential(*parts, nn.Conv2d(width, 1, 4, 1, 1))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)

    def forward(self, pictures: Tensor) -> Tensor:
        """Logits [B, 1, S', S']; positive means real."""
        return self.body(pictures)


def discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Hinge: mean of ``max(0, 1 - real)`` and ``max(0, 1 + fake)``, halved."""
    return 0.5 * (functional.relu(1 - real).mean() + functional.relu(1 + fake).mean())


def adaptive_weight(of_pixels: Tensor, of_discriminator: Tensor) -> Tensor:
    """Factor of the adversarial loss from both losses' gradients at the decoder's last layer (Esser et al. 2021, eq. 7).

    ``|of_pixels| / (|of_discriminator| + 1e-4)``, at most 1e4.
    """
    return (torch.linalg.vector_norm(of_pixels) / (torch.linalg.vector_norm(of_discriminator) + 1e-4)).clamp(0, 1e4).detach()
