"""The probe: a fixed batch of sequences and the logits that a model gave for it.

A training run records its distributed model's logits with every checkpoint; conversion and loading ask whether the plain
model, with the weights that were written, gives the same. Logits and not features are compared, so that the output
embeddings and both heads are covered.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from gptface_dist.errors import UserError, one_line
from gptface_dist.files import write_atomically
from gptface_dist.model.plain import GPTFace
from gptface_dist.sequence import IGNORE, IMAGE, PADDING, SPECIALS_PER_SEQUENCE, TEXT
from gptface_dist.tokenizers.vocabulary import Vocabulary

PROBE_NAME = "probe.safetensors"
PROBE_FORMAT = "gptface-probe-1"
SEQUENCES = 4
ROWS = 8
"""Tokens of each modality, in each sequence, whose logits are recorded (fewer where it has fewer)."""


@dataclass(frozen=True)
class ProbeBatch:
    """B sequences padded to L tokens, in the form of :class:`gptface_dist.data.batch.Batch`."""

    tokens: Tensor
    """int64 [B, L]: ids; some are [MASK]."""
    labels: Tensor
    """int64 [B, L]: an id of the modality whose logits are asked for at this token, ``sequence.IGNORE`` elsewhere."""
    segments: Tensor
    """int64 [B, L]."""
    positions: Tensor
    """int64 [B, L, 2]."""
    lengths: Tensor
    """int64 [B]."""

    @property
    def padded(self) -> bool:
        """As a batch has it: captions are of different lengths."""
        return True

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of image codes."""
        rows, columns = (self.positions[self.segments == IMAGE].amax(0) + 1).tolist()
        return rows, columns

    def rows(self, ids: range) -> Tensor:
        """Bool [B, L]: tokens whose logits over ``ids`` are recorded. Their order is that of ``features[rows]``."""
        return (self.labels >= ids.start) & (self.labels < ids.stop)


@dataclass(frozen=True)
class Logits:
    """What a model gave for a probe batch, in float32."""

    text: Tensor
    """[M, text_size]: at ``rows(vocabulary.text_range)``."""
    image: Tensor
    """[M, image_codes]: at ``rows(vocabulary.image_range)``."""
    match: Tensor
    """[B, 2]."""


@dataclass(frozen=True)
class Probe:
    """A batch and what a model gave for it."""

    batch: ProbeBatch
    """The sequences."""
    logits: Logits
    """The model's answer."""
    dtype: str
    """What the model computed in: ``float32`` or ``bfloat16``."""

    def content(self) -> bytes:
        """The file: safetensors named as the fields of the batch, ``logits.text``, ``logits.image`` and ``logits.match``."""
        tensors = {**vars(self.batch), **{f"logits.{name}": logits for name, logits in vars(self.logits).items()}}
        data = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        return save(data, {"format": PROBE_FORMAT, "dtype": self.dtype})

    def save(self, path: Path) -> None:
        """Write :meth:`content`, whole or not at all."""
        write_atomically(path, self.content())

    @classmethod
    def load(cls, path: Path, vocabulary: Vocabulary) -> "Probe":
        """Read what :meth:`save` wrote; :class:`UserError` where it is missing, damaged or of another vocabulary."""
        if not path.is_file():
            raise UserError(f"{path} does not exist: without it nothing says what the model should compute")
        try:
            with safe_open(path, framework="pt") as file:
                said = file.metadata() or {}
                if said.get("format") != PROBE_FORMAT:
                    raise UserError(f"{path} has the format {said.get('format')!r}, not {PROBE_FORMAT!r}")
                found = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
            batch = ProbeBatch(*(found[name] for name in ProbeBatch.__dataclass_fields__))
            probe = cls(batch, Logits(*(found[f"logits.{name}"] for name in Logits.__dataclass_fields__)), said["dtype"])
        except (SafetensorError, OSError, KeyError) as error:
            raise UserError(f"{path} is no probe ({one_line(error)})") from None
        wanted = [(int(batch.rows(ids).sum()), len(ids)) for ids in (vocabulary.text_range, vocabulary.image_range)]
        shapes = [tuple(logits.shape) for logits in vars(probe.logits).values()]
        if shapes != [*wanted, (len(batch.lengths), 2)]:
            raise UserError(f"{path} has logits of shapes {shapes}, its batch makes {wanted}: it is another model's")
        return probe


def probe_batch(
    vocabulary: Vocabulary, grid: tuple[int, int], text_length: int, multiple_of: int = 1, seed: int = 0
) -> ProbeBatch:
    """The fixed batch: random ids, captions from one token to the longest, images from unmasked to all masked.

    Args:
        vocabulary: the joint ids.
        grid: rows and columns of image codes.
        text_length: longest caption in tokens.
        multiple_of: what the padded length is a multiple of (sequence parallelism asks for that).
        seed: of ids and of what is masked.
    """
    rng = np.random.default_rng(seed)
    captions = [max(1, round(text_length * share)) for share in np.linspace(0, 1, SEQUENCES)]
    codes = grid[0] * grid[1]
    length = -(-(text_length + codes + SPECIALS_PER_SEQUENCE) // multiple_of) * multiple_of
    shape = (SEQUENCES, length)
    tokens, labels = np.full(shape, vocabulary.pad_id), np.full(shape, IGNORE)
    segments, positions = np.full(shape, PADDING), np.zeros((*shape, 2), dtype=np.int64)
    for row, caption in enumerate(captions):
        image = caption + 2
        end = image + codes
        tokens[row, [0, caption + 1, end]] = vocabulary.cls_id, vocabulary.sep_id, vocabulary.sep_id
        segments[row, : end + 1] = TEXT
        segments[row, image:end] = IMAGE
        positions[row, : end + 1, 0] = [*range(image), *(code // grid[1] for code in range(codes)), image]
        positions[row, image:end, 1] = np.arange(codes) % grid[1]
        for start, count, ids in ((1, caption, vocabulary.text_range), (image, codes, vocabulary.image_range)):
            where = start + np.arange(count)
            tokens[row, where] = rng.integers(ids.start, ids.stop, size=count)
            asked = start + np.sort(rng.choice(count, size=min(ROWS, count), replace=False))
            labels[row, asked] = tokens[row, asked]
            hidden = rng.random(count) < row / (SEQUENCES - 1)
            tokens[row, where[hidden]] = vocabulary.mask_id
    lengths = np.array([caption + codes + SPECIALS_PER_SEQUENCE for caption in captions])
    return ProbeBatch(*(torch.as_tensor(array.astype(np.int64)) for array in (tokens, labels, segments, positions, lengths)))


@torch.no_grad()
def run(model: GPTFace, batch: ProbeBatch) -> Logits:
    """What the plain model gives, without dropout, in the dtype of its weights. Model and batch lie on one device."""
    training = model.training
    model.eval()
    try:
        features = model(batch.tokens, batch.segments, batch.positions, batch.lengths)
        text, image = (
            model.token_logits(features[batch.rows(ids)], ids)
            for ids in (model.vocabulary.text_range, model.vocabulary.image_range)
        )
        return Logits(*(logits.float() for logits in (text, image, model.match_logits(features))))
    finally:
        model.train(training)


def difference(found: Logits, wanted: Logits) -> dict[str, float]:
    """Relative error of text, image and match logits: norm of the difference over norm of ``wanted``; NaN where not finite."""
    errors = {}
    for name, reference in vars(wanted).items():
        reference = reference.double()
        errors[name] = float((vars(found)[name].double() - reference).norm() / reference.norm().clamp(min=1e-30))
    return errors
