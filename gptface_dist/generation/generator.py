"""What a release can do: draw faces for a text, edit a region of a picture, describe a picture, score a pair."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from gptface_dist.errors import UserError
from gptface_dist.generation import presets, region
from gptface_dist.generation.decode import DecodeRequest, DecodeResult, decode
from gptface_dist.generation.model import device_of, match_probabilities
from gptface_dist.generation.options import Guidance, Sampling
from gptface_dist.generation.pictures import Picture, read_pixels
from gptface_dist.generation.presets import CAPTION_LENGTHS, CAPTION_SAMPLING
from gptface_dist.generation.sequence import compose
from gptface_dist.model.plain import GPTFace
from gptface_dist.release import Release, load
from gptface_dist.sequence import SPECIALS_PER_SEQUENCE
from gptface_dist.tokenizers.image import ImageTokenizer
from gptface_dist.tokenizers.text import TextTokenizer

Source = Picture | Path | str | Image.Image | np.ndarray
"""A picture: a result of the generator, a file, a Pillow image, or pixels (uint8 [height, width, 3])."""
FEATHER = 2
"""Pixels inside a region over which the drawn picture fades in."""


@dataclass(frozen=True)
class Caption:
    """A description of a picture."""

    text: str
    match: float
    """p(match) of picture and text."""


class Generator:
    """Draws, edits, describes and scores with one release.

    Results are a function of the arguments: neither earlier calls nor other samples change them. Between devices, numbers of
    threads and versions of torch, near ties between two tokens can still turn.
    """

    def __init__(
        self,
        model: GPTFace,
        text: TextTokenizer,
        image: ImageTokenizer,
        grid: tuple[int, int],
        longest_text: int | None = None,
        dropped_captions: bool = True,
    ):
        """Check that the tokenizers are the model's own and switch it to evaluation without gradients.

        Args:
            model: the weights, on the device that computes.
            text: the tokenizer that the model was trained with.
            image: likewise.
            grid: rows and columns of image codes in training.
            longest_text: tokens of the longest text in training; None: as many as the model has positions for.
            dropped_captions: whether training had images without text; :meth:`check_guidance` refuses to guide classifier-free
                otherwise.
        """
        if grid[0] != grid[1]:
            raise UserError(f"pictures are square, but the model's have {grid[0]}x{grid[1]} codes")
        vocabulary = model.vocabulary
        hashes = {"text": (text.sha256, vocabulary.text_sha256), "image": (image.sha256, vocabulary.image_sha256)}
        for name, (given, trained) in hashes.items():
            if given != trained:
                raise UserError(f"the model was trained with {name} tokenizer {trained[:12]}, this one is {given[:12]}")
        self.model, self._text, self._image, self._grid = model.eval().requires_grad_(False), text, image, grid
        self.vocabulary = vocabulary
        positions = model.options.text_positions - SPECIALS_PER_SEQUENCE
        self.longest_text = min(positions, longest_text or positions)
        """Tokens of the longest text that is accepted."""
        self._dropped_captions = dropped_captions
        self.size = grid[0] * image.factor
        """Pixels of a side of each picture."""

    @classmethod
    def from_pretrained(cls, path: Path | str, device: torch.device | str = "cpu") -> "Generator":
        """Load a release in float32; :class:`UserError` where ``path`` is none or its tokenizers are not its model's."""
        return cls.from_release(load(path, dtype=torch.float32, device=device))

    @classmethod
    def from_release(cls, release: Release) -> "Generator":
        """Take text length and dropped captions from the training configuration in the release's card."""
        data = release.config.card.config.get("data", {})
        longest, dropped = data.get("batch", {}).get("text_length"), data.get("masking", {}).get("text_dropout")
        if not isinstance(release.model, GPTFace):
            name = release.config.objective.name
            raise UserError(f"{release.path} was trained for {name}, which does not predict tokens: nothing can be generated")
        return cls(release.model, release.text, release.image, release.config.grid, longest, dropped != 0)

    @property
    def device(self) -> torch.device:
        """Device of the model's weights."""
        return device_of(self.model)

    def generate(
        self,
        text: str | Sequence[str],
        n: int = 1,
        sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
        guidance: Guidance = Guidance(),  # noqa: B008 (frozen)
        on_step: Callable[[], None] = lambda: None,
    ) -> list[Picture]:
        """Draw ``n`` faces for each text, those of the first text first; no two share their noise.

        :class:`UserError` for an empty text or one longer than :attr:`longest_text`.
        """
        if n < 1:
            raise UserError(f"at least 1 picture must be drawn, not {n}")
        texts = [text] if isinstance(text, str) else list(text)
        nothing, everything = torch.zeros(self._grid, dtype=torch.int64), torch.ones(self._grid, dtype=torch.bool)
        requests: list[DecodeRequest] = []
        for words in texts:
            ids = self._encode_text(words)
            requests += [self._image_request(ids, nothing, everything, len(requests) + i) for i in range(n)]
        pictures = []
        for number, result in enumerate(self._draw(requests, sampling, guidance, on_step)):
            codes = self._codes(result.sequence.image)
            pictures.append(Picture(self._pixels(codes), codes.numpy(), texts[number // n], result.match))
        return pictures

    def read_picture(self, source: Source, resize: bool = True) -> Picture:
        """Cut the middle square, scale it to the model's size and encode it; a :class:`Picture` is returned unchanged.

        :class:`UserError` where the source is no picture, or has another size and ``resize`` is off.
        """
        if isinstance(source, Picture):
            return source
        pixels = read_pixels(source, self.size, resize)
        scaled = torch.from_numpy(pixels.copy()).permute(2, 0, 1).to(torch.float32) / 127.5 - 1
        return Picture(pixels, self._image.encode(scaled.unsqueeze(0).to(self._image.device))[0].cpu().numpy())

    def reconstruct(self, pictures: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Encode and decode pictures of uint8 [S, S, 3]: what a model that makes no mistake could draw.

        A picture's result does not depend on the others.
        """
        pixels = torch.from_numpy(np.stack(pictures)).to(self.device).permute(0, 3, 1, 2).to(torch.float32) / 127.5 - 1
        return [self._pixels(codes) for codes in self._image.encode(pixels)]

    def edit(
        self,
        source: Source,
        text: str,
        where: np.ndarray | str | None = None,
        task: str = "attribute",
        n: int = 1,
        sampling: Sampling | None = None,
        guidance: Guidance | None = None,
        feather: int = FEATHER,
        resize: bool = False,
        on_step: Callable[[], None] = lambda: None,
    ) -> list[Picture]:
        """Redraw a region of a picture for a text, ``n`` times.

        Tokens of patches without a pixel of the region, and pixels outside of it, stay exactly as they are. A result can be
        the source of the next edit.

        Args:
            source: the picture to edit.
            text: what the whole picture is to show, not only the region; some tasks accept an empty one.
            where: bool [S, S], or a description for :func:`~gptface_dist.generation.region.region`; None: the task's region.
            task: a preset of :data:`~gptface_dist.generation.presets.TASKS`.
            n: number of results; no two share their noise.
            sampling: replaces the task's.
            guidance: replaces the task's.
            feather: pixels inside the region over which the drawn picture fades in.
            resize: accept a picture of another size, and keep the pixels of its resized middle square.
            on_step: called after each candidate, for progress.
        """
        preset = presets.task(task)
        if n < 1:
            raise UserError(f"at least 1 picture must be drawn, not {n}")
        if feather < 0:
            raise UserError(f"feather must not be negative, not {feather}")
        where = preset.region if where is None else where
        if where is None:
            raise UserError(f"the task {task} needs a region: a box, a mask, or one of {', '.join(region.PLACES)}")
        before = self.read_picture(source, resize)
        chosen = region.region(where, self.size) if isinstance(where, str) else np.asarray(where)
        if chosen.shape != (self.size, self.size) or chosen.dtype != bool or not chosen.any():
            raise UserError(
                f"the region must be bool [{self.size}, {self.size}] and not empty, not {chosen.dtype} {chosen.shape}"
            )
        chosen = region.grown(chosen, preset.margin)
        ids = self._encode_text(text, may_be_empty=not preset.text_needed)
        codes = torch.from_numpy(before.codes)
        wanted = torch.from_numpy(region.tokens_of(chosen, self._image.factor))
        requests = [self._image_request(ids, codes, wanted, number) for number in range(n)]
        options = (preset.sampling if sampling is None else sampling, preset.guidance if guidance is None else guidance)
        edited = []
        for result in self._draw(requests, *options, on_step):
            after = self._codes(result.sequence.image)
            pixels = region.feathered(before.pixels, self._pixels(after), chosen, feather)
            edited.append(Picture(pixels, after.numpy(), text, result.match))
        return edited

    def caption(
        self,
        source: Source,
        n: int = 1,
        sampling: Sampling = CAPTION_SAMPLING,
        guidance: Guidance = Guidance(),  # noqa: B008 (frozen)
        lengths: Sequence[int] | None = None,
        on_step: Callable[[], None] = lambda: None,
    ) -> list[Caption]:
        """Describe a picture: up to ``n`` different captions, the best match first.

        Draws ``n`` captions of each of ``lengths`` (in tokens; None: those of CAPTION_LENGTHS that fit) and keeps those of the
        highest p(match). Refuses classifier-free guidance: training has no text without an image.
        """
        if guidance.classifier_free > 0:
            raise UserError("classifier-free guidance draws pictures: captions are guided by the gradient and by rerank")
        if n < 1:
            raise UserError(f"at least 1 caption must be drawn, not {n}")
        if lengths is None:
            lengths = [length for length in CAPTION_LENGTHS if length <= self.longest_text] or [self.longest_text]
        if not lengths or min(lengths) < 1 or max(lengths) > self.longest_text:
            raise UserError(f"captions have 1 to {self.longest_text} tokens, not {', '.join(map(str, lengths)) or 'none'}")
        codes = torch.from_numpy(self.read_picture(source).codes)
        kept = torch.zeros(self._grid, dtype=torch.bool)
        requests: list[DecodeRequest] = []
        for length in lengths:
            blank = torch.zeros(length, dtype=torch.int64)
            for _ in range(n):
                requests.append(DecodeRequest(compose(self.vocabulary, blank, codes, True, kept), None, len(requests)))
        best: dict[str, float] = {}
        for result in decode(self.model, requests, self.vocabulary.text_range, sampling, guidance, on_step):
            text = self._text.decode(result.sequence.text.tolist())
            best[text] = max(result.match, best.get(text, 0.0))
        ordered = sorted(best.items(), key=lambda item: -item[1])
        return [Caption(text, match) for text, match in ordered[:n]]

    def score(self, source: Source, text: str) -> float:
        """p(match): the matching head's probability that picture and text belong together."""
        codes = torch.from_numpy(self.read_picture(source).codes)
        kept = torch.zeros(self._grid, dtype=torch.bool)
        return match_probabilities(self.model, [compose(self.vocabulary, self._encode_text(text), codes, False, kept)])[0]

    def check_guidance(self, guidance: Guidance) -> None:
        """:class:`UserError` where this model's training does not allow such guidance of pictures."""
        if guidance.classifier_free > 0 and not self._dropped_captions:
            raise UserError(
                "the model was trained with a text for every image (data.masking.text_dropout=0): "
                "it cannot be guided classifier-free"
            )

    def _encode_text(self, text: str, may_be_empty: bool = False) -> Tensor:
        ids = self._text.encode(text)
        if not ids and not may_be_empty:
            raise UserError("the text is empty: say what the picture is to show")
        if len(ids) > self.longest_text:
            raise UserError(f"the text has {len(ids)} tokens, the model takes {self.longest_text}: shorten it")
        return torch.tensor(ids, dtype=torch.int64)

    def _image_request(self, ids: Tensor, codes: Tensor, wanted: Tensor, number: int) -> DecodeRequest:
        sequence = compose(self.vocabulary, ids, codes, False, wanted)
        return DecodeRequest(sequence, compose(self.vocabulary, ids[:0], codes, False, wanted), number)

    def _draw(
        self, requests: Sequence[DecodeRequest], sampling: Sampling, guidance: Guidance, on_step: Callable[[], None]
    ) -> list[DecodeResult]:
        self.check_guidance(guidance)
        return decode(self.model, requests, self.vocabulary.image_range, sampling, guidance, on_step)

    def _codes(self, image: Tensor) -> Tensor:
        return (image - self.vocabulary.image_offset).view(self._grid)

    def _pixels(self, codes: Tensor) -> np.ndarray:
        """Decode codes [h, w] to uint8 [S, S, 3]; one picture at a time, so that others do not change its last bits."""
        drawn = self._image.decode(codes.unsqueeze(0).to(self._image.device))[0]
        return ((drawn.permute(1, 2, 0) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).cpu().numpy()
