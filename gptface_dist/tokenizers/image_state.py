"""The training state of an image tokenizer (networks, optimizers, use of codes) and one training step."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import VQModel
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from gptface_dist.tokenizers.codebook import choose_rows, histogram, quantise
from gptface_dist.tokenizers.discriminator import PatchDiscriminator, adaptive_weight, discriminator_loss
from gptface_dist.tokenizers.image import decode_vectors
from gptface_dist.tokenizers.image_options import ImageArchitecture, ImageTrainingOptions
from gptface_dist.tokenizers.losses import laplacian_loss, learning_rate
from gptface_dist.tokenizers.metrics import psnr
from gptface_dist.tokenizers.processes import Processes
from gptface_dist.tokenizers.vgg import VGGLoss


class Autoencoder(nn.Module):
    """A ``VQModel`` with our quantisation between its encoder and its decoder."""

    def __init__(self, model: VQModel, precision: str):
        super().__init__()
        self.model = model
        self._bf16 = precision == "bf16"

    def latents(self, pixels: Tensor) -> Tensor:
        """Encoder outputs, float32 [B, D, h, w]."""
        with torch.autocast(pixels.device.type, torch.bfloat16, enabled=self._bf16):
            return self.model.quant_conv(self.model.encoder(pixels)).float()

    def forward(self, pixels: Tensor, quantised: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Reconstruction, encoder outputs, codes, codebook loss, commitment loss; a tuple, because DDP supports those.

        Unless ``quantised``, the decoder gets the encoder's outputs themselves and the commitment loss is 0.
        """
        latents = self.latents(pixels)
        result = quantise(latents, self.codebook)
        if not quantised:
            result = replace(result, latents=latents, commitment_loss=torch.zeros_like(result.commitment_loss))
        with torch.autocast(pixels.device.type, torch.bfloat16, enabled=self._bf16):
            reconstruction = decode_vectors(self.model, result.latents)
        return reconstruction.float(), latents, result.codes, result.codebook_loss, result.commitment_loss

    @property
    def codebook(self) -> nn.Parameter:
        """The code vectors [K, D]."""
        return self.model.quantize.embedding.weight

    @property
    def last_layer(self) -> nn.Parameter:
        """Weight of the decoder's last convolution, whose gradients set the adaptive weight of the adversarial loss."""
        return self.model.decoder.conv_out.weight


@dataclass(frozen=True)
class StepRecord:
    """Metrics of one step. Tensors stay on the device, so that the host does not wait for the step."""

    losses: dict[str, Tensor]
    """Scalars by name: means over this process's share of the batch."""
    counts: Tensor
    """Number of uses of each code, over all processes: int64 [K]."""
    rate: float
    """Learning rate of the step."""


class ImageTrainingState:
    """Everything that training changes. After every step it is equal to the bit on all processes: they add the same sums."""

    def __init__(self, architecture: ImageArchitecture, options: ImageTrainingOptions, processes: Processes):
        self.options, self.processes = options, processes
        self.step = 0
        device = processes.device
        # The weights depend on the seed alone; fork_rng preserves the caller's random state.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(options.seed)
            self.autoencoder = Autoencoder(VQModel(**architecture.vqmodel()), options.precision).to(device)
            self._adversary = _Adversary(architecture, options, processes) if options.adversarial > 0 else None
        self.last_used = torch.zeros(architecture.codes, dtype=torch.int64, device=device)
        """Step at which each code was last used or revived."""
        self._vgg = VGGLoss(Path(options.vgg_weights)).to(device) if options.vgg > 0 else None
        book = self.autoencoder.codebook
        rest = [parameter for parameter in self.autoencoder.parameters() if parameter is not book]
        betas = (options.beta1, options.beta2)
        groups: list[dict[str, Any]] = [{"params": rest}, {"params": [book], "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, betas=betas, weight_decay=options.weight_decay)
        self._run: Callable[[Tensor, bool], Any] = _parallel(self.autoencoder, processes)

    def train_step(self, pixels: Tensor) -> StepRecord:
        """One optimizer step on this process's share of a global batch, float32 [b, 3, S, S] on the device."""
        options = self.options
        rate = learning_rate(self.step, options.steps, options.warmup, options.learning_rate)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        if self.step in (0, options.warmup):
            # diffusers initialises all codes within 1/K of zero: replace them by encoder outputs.
            with torch.no_grad():
                self._reseed(torch.arange(len(self.last_used), device=pixels.device), self.autoencoder.latents(pixels))
        # An untrained encoder's outputs differ in few directions, and codes taken from them would confine it to these
        # (colours are lost for good): latents are not quantised during the warm-up.
        quantised = self.step >= options.warmup
        reconstruction, latents, codes, codebook_loss, commitment_loss = self._run(pixels, quantised)
        picture_loss, losses = self._picture_loss(reconstruction, pixels)
        loss = picture_loss + options.codebook * (codebook_loss + options.commitment * commitment_loss)
        adversary = self._adversary if self.step >= options.adversarial_start else None
        if adversary is not None:
            adversarial = adversary.against(reconstruction)
            losses["adversarial"], weight = adversarial.detach(), self._adaptive_weight(picture_loss, adversarial)
            losses["adversarial_weight"] = weight
            loss = loss + options.adversarial * weight * adversarial
        self.optimizer.zero_grad()
        loss.backward()
        losses["gradient_norm"] = nn.utils.clip_grad_norm_(self.autoencoder.parameters(), options.clip)
        self.optimizer.step()
        if adversary is not None:
            losses["discriminator"] = adversary.learn(pixels, reconstruction.detach(), rate)
        counts = self.processes.sum(histogram(codes, len(self.last_used)))
        self.last_used[counts > 0] = self.step
        self._revive(latents.detach())
        self.step += 1
        losses |= {"loss": loss.detach(), "codebook": codebook_loss.detach(), "commitment": commitment_loss.detach()}
        losses["psnr"] = psnr(reconstruction.detach().clamp(-1, 1), pixels).mean()
        return StepRecord(losses, counts, rate)

    def _picture_loss(self, reconstruction: Tensor, original: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum of all reconstruction losses, and each unweighted loss, detached."""
        options = self.options
        parts = {}
        if options.l1 > 0:
            parts["l1"] = functional.l1_loss(reconstruction, original)
        if options.l2 > 0:
            parts["l2"] = functional.mse_loss(reconstruction, original)
        if options.laplacian > 0:
            parts["laplacian"] = laplacian_loss(reconstruction, original)
        if self._vgg is not None:
            parts["vgg"] = self._vgg(reconstruction, original)
        total = torch.stack([getattr(options, name) * part for name, part in parts.items()]).sum()
        return total, {name: part.detach() for name, part in parts.items()}

    def _adaptive_weight(self, picture_loss: Tensor, adversarial: Tensor) -> Tensor:
        layer = self.autoencoder.last_layer
        gradients = [torch.autograd.grad(loss, layer, retain_graph=True)[0] for loss in (picture_loss, adversarial)]
        # The ratio of the norms of the global batch's gradients, not a mean of the processes' ratios.
        of_picture, of_adversarial = (self.processes.mean(gradient) for gradient in gradients)
        return adaptive_weight(of_picture, of_adversarial)

    @torch.no_grad()
    def _revive(self, latents: Tensor) -> None:
        """Every ``revive_every`` steps, set dead codes to encoder outputs."""
        every = self.options.revive_every
        # Not in the last tenth, where the falling rate would leave revived codes half-trained.
        if not every or (self.step + 1) % every or self.step >= 0.9 * self.options.steps:
            return
        dead = (self.step - self.last_used >= self.options.revive_after).nonzero().flatten()
        if len(dead):
            self._reseed(dead, latents)

    def _reseed(self, which: Tensor, latents: Tensor) -> None:
        """Give codes ``which`` [n] the values of random positions of the global batch's encoder outputs (b, D, h, w each)."""
        rows = latents.permute(0, 2, 3, 1).flatten(0, 2)
        chosen = choose_rows(len(rows) * self.processes.count, len(which), self.options.seed, self.step).to(rows.device)
        # Each process fills in its own rows, in the order of ranks; the others are zero, so that the sum is exact.
        offsets = chosen - self.processes.rank * len(rows)
        local = (offsets >= 0) & (offsets < len(rows))
        values = torch.where(local[:, None], rows[offsets.clamp(0, len(rows) - 1)], 0.0)
        book = self.autoencoder.codebook
        book[which] = self.processes.sum(values)
        for moment in ("exp_avg", "exp_avg_sq"):
            if moment in self.optimizer.state[book]:
                self.optimizer.state[book][moment][which] = 0.0
        self.last_used[which] = self.step

    def state(self) -> dict[str, Any]:
        """Tensors and numbers to resume from, loadable with ``weights_only=True``."""
        return {
            "step": self.step,
            "autoencoder": self.autoencoder.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "last_used": self.last_used,
            "judge": self._adversary.state() if self._adversary else None,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Resume from a result of :meth:`state`."""
        self.step = state["step"]
        self.autoencoder.load_state_dict(state["autoencoder"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.last_used.copy_(state["last_used"])
        if self._adversary:
            self._adversary.load(state["judge"])


class _Adversary:
    """The discriminator and its optimizer."""

    def __init__(self, architecture: ImageArchitecture, options: ImageTrainingOptions, processes: Processes):
        # Two strided layers see a 64-pixel picture as patches of 34, three a larger one as patches of 70 (Isola et al.).
        self._network = PatchDiscriminator(3 if architecture.size > 64 else 2).to(processes.device)
        self._optimizer = torch.optim.AdamW(
            self._network.parameters(), lr=0.0, betas=(options.beta1, options.beta2), weight_decay=0.0
        )
        self._run: Callable[[Tensor], Tensor] = _parallel(self._network, processes)
        self._clip = options.clip

    def against(self, reconstruction: Tensor) -> Tensor:
        """The adversarial loss of a reconstruction."""
        # Past the parallel wrapper and without gradients for the discriminator: this pass trains the autoencoder only.
        self._network.requires_grad_(False)
        loss = -self._network(reconstruction).mean()
        self._network.requires_grad_(True)
        return loss

    def learn(self, real: Tensor, fake: Tensor, rate: float) -> Tensor:
        """One optimizer step of the discriminator; its loss."""
        real_logits, fake_logits = self._run(torch.cat([real, fake])).chunk(2)
        loss = discriminator_loss(real_logits, fake_logits)
        self._optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self._network.parameters(), self._clip)
        self._optimizer.param_groups[0]["lr"] = rate
        self._optimizer.step()
        return loss.detach()

    def state(self) -> dict[str, Any]:
        return {"network": self._network.state_dict(), "optimizer": self._optimizer.state_dict()}

    def load(self, state: dict[str, Any]) -> None:
        self._network.load_state_dict(state["network"])
        self._optimizer.load_state_dict(state["optimizer"])


def _parallel(module: nn.Module, processes: Processes) -> nn.Module:
    """The module in DDP, which averages gradients over processes; the module itself for a single process.

    Shares are equal, so the average of their means is the mean over the global batch.
    """
    if processes.count == 1:
        return module
    ids = [processes.device.index] if processes.device.type == "cuda" else None
    return DistributedDataParallel(module, device_ids=ids, gradient_as_bucket_view=True)
