"""The judge: a small convolutional network that names the traits of a face. It sees neither texts nor our model.

It learns from rendered pictures with their true attributes, half of them as the release's image tokenizer reconstructs
them, so that it can judge what the model draws; its accuracy on held-out reconstructions bounds what can be measured.
Prompts ask for all values equally often, so it treats all values as equally likely, however often faces have them.
"""

import io
import json
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from gptface_dist.data.folder import ShardFolder, Unreadable
from gptface_dist.data.pictures import decode_pixels, picture_extension
from gptface_dist.data.stream import Provenance, RawSample
from gptface_dist.errors import UserError
from gptface_dist.generation.region import LABELS
from gptface_dist.generation.study.traits import TRAITS, UNKNOWN, Values, values_of

BATCH = 32
RATE = 2e-3
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Face:
    """A rendered face with its true attributes."""

    pixels: np.ndarray
    """uint8 [S, S, 3]."""
    labels: np.ndarray
    """uint8 [S, S]: parsing mask."""
    values: Values

    @property
    def whole(self) -> bool:
        """Whether the picture shows all traits."""
        return UNKNOWN not in self.values.values()


def some(faces: Sequence[Face], count: int, rng: np.random.Generator) -> list[Face]:
    """Choose ``count`` faces at random without repetition; all of them if there are fewer."""
    return [faces[i] for i in rng.permutation(len(faces))[:count]]


def read_faces(folder: ShardFolder, count: int, size: int, on_face: Callable[[], None] = lambda: None) -> list[Face]:
    """Read the first ``count`` faces that `gptface faces render` wrote; :class:`UserError` for fewer faces or other shards."""
    faces: list[Face] = []
    for number, entry in enumerate(folder.index.shards):
        if len(faces) == count:
            break
        try:
            sidecar, file = folder.sidecar(number), folder.open_shard(number)
        except Unreadable as error:
            raise UserError(f"{folder.location}, shard {entry.name}: {error}") from None
        with closing(file):
            for key, extents in sidecar.samples[: count - len(faces)]:
                raw = RawSample(Provenance(folder.location, entry.name, key, 0), file, extents)
                try:
                    faces.append(_face(raw, size))
                except (Unreadable, KeyError, ValueError) as error:
                    raise UserError(
                        f"{folder.location}, {key}: no rendered face ({error}): make some with `gptface faces render`"
                    ) from None
                on_face()
    if len(faces) < count:
        raise UserError(f"{folder.location} holds {len(faces)} faces, {count} are needed: `gptface faces render` makes more")
    return faces


def _face(raw: RawSample, size: int) -> Face:
    attributes = json.loads(raw.read("json"))["attributes"]
    labels = np.asarray(Image.open(io.BytesIO(raw.read("mask.png"))))
    hair = float(np.mean(labels == LABELS.index("hair")))
    # Nearest neighbours: the middle of the area that each pixel of the smaller mask covers.
    rows, columns = ((np.arange(size) + 0.5) * side / size for side in labels.shape)
    smaller = labels[rows.astype(int)[:, None], columns.astype(int)]
    return Face(decode_pixels(raw.read(picture_extension(list(raw.extents))), size), smaller, values_of(attributes, hair))


class Judge(nn.Module):
    """Pixels float32 [B, 3, S, S] in [-1, 1] -> logits [B, values] of each trait."""

    def __init__(self, channels: Sequence[int] = (32, 64, 96, 128)):
        super().__init__()
        layers: list[nn.Module] = []
        width = 3
        for wider in channels:
            layers += [nn.Conv2d(width, wider, 3, 2, 1), nn.GroupNorm(8, wider), nn.GELU()]
            width = wider
        self.body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Dropout(0.3))
        self.heads = nn.ModuleDict({name: nn.Linear(9 * width, len(values)) for name, values in TRAITS.items()})

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        """Compute the logits by trait."""
        features = self.body(pixels)
        return {name: head(features) for name, head in self.heads.items()}


def to_pixels(pictures: Tensor) -> Tensor:
    """Convert uint8 [B, S, S, 3] to float32 [B, 3, S, S] in [-1, 1], on the same device."""
    return pictures.permute(0, 3, 1, 2).float() / 127.5 - 1


def train_judge(
    pictures: Sequence[np.ndarray],
    values: Sequence[Values],
    epochs: int,
    seed: int,
    on_step: Callable[[], None] = lambda: None,
    device: torch.device = CPU,
) -> Judge:
    """Train on pictures with their traits, mirrored at random. A function of the arguments, up to the device's rounding.

    All pictures stay on ``device`` as bytes during training.

    The loss adds the logarithm of each value's frequency to the logits (Menon et al. 2021, "Long-tail learning via logit
    adjustment"), so that the logits alone treat all values as equally likely.
    """
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        judge = Judge().to(device)
        everything = torch.from_numpy(np.stack(pictures)).to(device)
        truth = {name: torch.tensor([entry[name] for entry in values], device=device) for name in TRAITS}
        known = {name: torch.bincount(labels[labels != UNKNOWN], minlength=len(TRAITS[name])) for name, labels in truth.items()}
        # Add one to each count: some value may be in no picture.
        often = {name: ((count + 1) / (count + 1).sum()).log() for name, count in known.items()}
        steps = epochs * (len(pictures) // BATCH)
        optimizer = torch.optim.AdamW(judge.parameters(), RATE, weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=max(1, steps))
        for _ in range(epochs):
            # Drawn on the CPU, so that every device trains on the same order; dropout is the device's own.
            order = torch.randperm(len(pictures)).to(device)
            for start in range(0, len(order) - BATCH + 1, BATCH):
                rows = order[start : start + BATCH]
                batch = to_pixels(everything[rows])
                batch = torch.where(torch.rand(BATCH, 1, 1, 1).to(device) < 0.5, batch, batch.flip(-1))
                logits = judge(batch)
                losses = [
                    functional.cross_entropy(
                        logits[name] + often[name], truth[name][rows], ignore_index=UNKNOWN, reduction="sum"
                    )
                    / BATCH
                    for name in TRAITS
                ]
                optimizer.zero_grad()
                torch.stack(losses).sum().backward()
                optimizer.step()
                schedule.step()
                on_step()
    return judge.eval()


@torch.no_grad()
def judged(judge: Judge, pictures: Sequence[np.ndarray]) -> list[Values]:
    """Name the likeliest value of each trait, for each picture."""
    values: list[Values] = []
    device = next(judge.parameters()).device
    for start in range(0, len(pictures), BATCH):
        logits = judge(to_pixels(torch.from_numpy(np.stack(pictures[start : start + BATCH])).to(device)))
        best = {name: logits[name].argmax(-1).tolist() for name in TRAITS}
        values += [dict(zip(best, row, strict=True)) for row in zip(*best.values(), strict=True)]
    return values
