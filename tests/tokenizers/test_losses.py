"""Losses and metrics against other people's code (scikit-image, scipy) or their formulas."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from scipy import ndimage
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import nn

from gptface_dist.errors import UserError
from gptface_dist.tokenizers.discriminator import PatchDiscriminator, adaptive_weight, discriminator_loss
from gptface_dist.tokenizers.losses import blur, laplacian_loss, laplacian_pyramid, learning_rate
from gptface_dist.tokenizers.metrics import psnr, ssim
from gptface_dist.tokenizers.vgg import VGGLoss


def pair(size: int = 24, width: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """A smooth picture and a noisy copy of it, two of each, in [-1, 1]."""
    rng = np.random.default_rng(size)
    smooth = ndimage.gaussian_filter(rng.normal(size=(2, 3, size, width or size)), (0, 0, 2, 2)) * 3
    noisy = smooth + rng.normal(size=smooth.shape) * np.array([0.05, 0.3]).reshape(2, 1, 1, 1)
    return tuple(torch.from_numpy(x.clip(-1, 1).astype(np.float32)) for x in (noisy, smooth))  # type: ignore[return-value]


@pytest.mark.parametrize(("size", "width"), [(11, None), (24, None), (40, 17)])
def test_ssim_and_psnr_are_those_of_scikit_image(size: int, width: int | None) -> None:
    noisy, smooth = pair(size, width)
    for number in range(2):
        x, y = noisy[number].double().numpy(), smooth[number].double().numpy()
        expected = structural_similarity(
            x, y, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=2, channel_axis=0
        )
        assert float(ssim(noisy, smooth)[number]) == pytest.approx(expected, abs=1e-6)
        assert float(psnr(noisy, smooth)[number]) == pytest.approx(peak_signal_noise_ratio(y, x, data_range=2), abs=1e-4)


def test_equal_pictures() -> None:
    _, smooth = pair()
    assert torch.equal(ssim(smooth, smooth), torch.ones(2))
    assert torch.equal(psnr(smooth, smooth), torch.full((2,), float("inf")))
    assert float(laplacian_loss(smooth, smooth)) == 0


def test_ssim_of_too_small_pictures() -> None:
    with pytest.raises(ValueError, match="at least 11 pixels"):
        ssim(torch.zeros(1, 3, 10, 20), torch.zeros(1, 3, 10, 20))


def test_blur_is_the_binomial_filter_of_scipy() -> None:
    noisy, _ = pair(9, 14)
    kernel = np.array([1, 4, 6, 4, 1]) / 16
    expected = ndimage.convolve1d(ndimage.convolve1d(noisy.numpy(), kernel, 2, mode="nearest"), kernel, 3, mode="nearest")
    torch.testing.assert_close(blur(noisy), torch.from_numpy(expected), atol=1e-6, rtol=0)


def test_the_pyramid_by_its_definition() -> None:
    noisy, smooth = pair(16)
    fine, middle, rest = laplacian_pyramid(noisy)
    torch.testing.assert_close(fine, noisy - blur(noisy))
    torch.testing.assert_close(middle + blur(blur(noisy)[:, :, ::2, ::2]), blur(noisy)[:, :, ::2, ::2])
    assert tuple(rest.shape) == (2, 3, 4, 4)
    levels = zip(laplacian_pyramid(noisy), laplacian_pyramid(smooth), strict=True)
    expected = sum(float((x - y).abs().mean()) for x, y in levels)
    assert float(laplacian_loss(noisy, smooth)) == pytest.approx(expected)


def test_the_rate_by_hand() -> None:
    assert [learning_rate(step, 10, 4, 1.0) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert learning_rate(4, 10, 4, 1.0) == 1.0
    assert learning_rate(7, 10, 4, 1.0) == pytest.approx(0.5)
    assert learning_rate(10, 10, 4, 1.0) == pytest.approx(0)
    assert learning_rate(0, 10, 0, 3.0) == 3.0


def test_hinge_losses_by_hand() -> None:
    real, fake = torch.tensor([2.0, 0.0]), torch.tensor([-3.0, 1.0])
    assert float(discriminator_loss(real, fake)) == pytest.approx(0.5 * (0.5 + 1.0))


def test_the_adaptive_weight_by_hand() -> None:
    weight = adaptive_weight(torch.tensor([3.0, 4.0]), torch.tensor([0.0, 0.5], requires_grad=True))
    assert float(weight) == pytest.approx(5 / 0.5001)
    assert not weight.requires_grad
    assert float(adaptive_weight(torch.full((3,), 1e9), torch.zeros(3))) == 1e4


@pytest.mark.parametrize(("layers", "field"), [(2, 34), (3, 70)])
def test_a_logit_sees_a_patch_and_no_other_picture(layers: int, field: int) -> None:
    network = PatchDiscriminator(layers, channels=32)
    # Without the normalisation, which looks at all of the picture, a logit's field is its patch.
    for name, module in network.body.named_children():
        if isinstance(module, nn.GroupNorm):
            setattr(network.body, name, nn.Identity())
    pictures = torch.zeros(2, 3, 96, 96, requires_grad=True)
    logits = network(pictures + 0.1)
    middle = logits.shape[-1] // 2
    logits[0, 0, middle, middle].backward()
    assert pictures.grad is not None
    seen = pictures.grad[0].abs().sum(0).nonzero()
    assert (seen.amax(0) - seen.amin(0) + 1).tolist() == [field, field]
    assert float(pictures.grad[1].abs().sum()) == 0


def torchvision_vgg16() -> nn.Sequential:
    """``vgg16().features`` by the configuration "D" of Simonyan & Zisserman 2015, as torchvision lays it out."""
    layers: list[nn.Module] = []
    width = 3
    for item in [64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0]:
        layers += [nn.Conv2d(width, item, 3, padding=1), nn.ReLU()] if item else [nn.MaxPool2d(2)]
        width = item or width
    return nn.Sequential(*layers)


def test_the_feature_loss_by_its_definition(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = torchvision_vgg16().eval()
    for module in network:
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    save_file({f"features.{name}": tensor for name, tensor in network.state_dict().items()}, tmp_path / "vgg.safetensors")
    noisy, smooth = pair(32)
    expected = 0.0
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    x, y = ((p * 0.5 + 0.5 - mean.view(3, 1, 1)) / deviation.view(3, 1, 1) for p in (noisy, smooth))
    with torch.no_grad():
        for module in network:
            if isinstance(module, nn.MaxPool2d):
                a, b = (f / f.square().sum(1, keepdim=True).sqrt().clamp(min=1e-8) for f in (x, y))
                expected += float((a - b).square().sum(1).mean())
            x, y = module(x), module(y)
    loss = VGGLoss(tmp_path / "vgg.safetensors")
    assert float(loss(noisy, smooth)) == pytest.approx(expected, rel=1e-5)
    assert not any(parameter.requires_grad for parameter in loss.parameters())
    assert float(loss(smooth, smooth)) == 0


def test_what_is_no_vgg(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        VGGLoss(tmp_path / "vgg.safetensors")
    save_file({"features.0.weight": torch.zeros(64, 3, 3, 3)}, tmp_path / "vgg.safetensors")
    with pytest.raises(UserError, match="holds no VGG-16"):
        VGGLoss(tmp_path / "vgg.safetensors")
