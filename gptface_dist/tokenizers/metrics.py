"""PSNR and SSIM of reconstructions, per picture."""

import torch
from torch import Tensor
from torch.nn import functional


def psnr(reconstruction: Tensor, original: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of pixels in [-1, 1]: [B, C, H, W] twice -> float32 [B]; infinite where equal."""
    error = (reconstruction.float() - original.float()).square().mean((1, 2, 3))
    return 10 * torch.log10(4 / error)


def ssim(reconstruction: Tensor, original: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004) of pixels in [-1, 1]: [B, C, H, W] twice -> float32 [B].

    Gaussian window 11x11, sigma 1.5, K1 = 0.01, K2 = 0.03; the mean over channels and over all windows inside the
    picture, of at least 11 pixels a side. In float64: variances are differences of nearly equal numbers.
    """
    if min(original.shape[-2:]) < 11:
        raise ValueError(f"SSIM needs pictures of at least 11 pixels a side, got {tuple(original.shape)}")
    channels = original.shape[1]
    offsets = torch.arange(11, dtype=torch.float64, device=original.device) - 5
    window = torch.exp(-offsets.square() / (2 * 1.5**2))
    window = window / window.sum()

    def local_mean(x: Tensor) -> Tensor:
        x = functional.conv2d(x, window.view(1, 1, 11, 1).expand(channels, 1, 11, 1), groups=channels)
        return functional.conv2d(x, window.view(1, 1, 1, 11).expand(channels, 1, 1, 11), groups=channels)

    x, y = reconstruction.double(), original.double()
    mean_x, mean_y = local_mean(x), local_mean(y)
    variance_x = local_mean(x * x) - mean_x.square()
    variance_y = local_mean(y * y) - mean_y.square()
    covariance = local_mean(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2  # the range of pixels is 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x.square() + mean_y.square() + c1)
    structure = (2 * covariance + c2) / (variance_x + variance_y + c2)
    return (luminance * structure).mean((1, 2, 3)).float()
