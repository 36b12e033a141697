"""Make one token shard of each picture shard, with the same file name and the same keys in the same order.

A token shard's bytes are a function of its picture shard, the tokenizers, the size and the kind of device; they do not
depend on the number of processes, the batch, or where a run was interrupted. On the CPU each process therefore computes
with one thread: a sum's last bit can differ with the number of threads, and a near tie between two codes with it.
A receipt beside each token shard records its source, recipe and bad samples; a later run keeps shards whose receipt fits.
"""

import functools
import hashlib
import json
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gptface_dist.data import remote, tokens
from gptface_dist.data.folder import ShardFile, ShardFolder, Unreadable
from gptface_dist.data.pictures import PictureSample, decode_members
from gptface_dist.data.pool import ordered
from gptface_dist.data.shards import INDEX_NAME, Extent, Index, ShardEntry, ShardWriter, Sidecar, read_entry, sidecar_path
from gptface_dist.errors import UserError
from gptface_dist.files import write_atomically
from gptface_dist.folder_lock import FolderLock
from gptface_dist.tokenizers import vocabulary as vocabularies
from gptface_dist.tokenizers.image_files import read_config
from gptface_dist.tokenizers.vocabulary import Vocabulary

if TYPE_CHECKING:
    from gptface_dist.tokenizers.image import ImageTokenizer
    from gptface_dist.tokenizers.text import TextTokenizer

FORMAT = "gptface-tokens-1"
"""Changes whenever the same input would give other bytes: crop and resize, choice of captions, arrays."""
RECEIPT_SUFFIX = ".source.json"
BAD_NAME = "bad_samples.jsonl"


@dataclass(frozen=True)
class TokenizeOptions:
    """Picture size, batching, device and tolerance of a tokenization."""

    size: int
    """Side of the square pictures, in pixels: the middle square of each, reduced or enlarged."""
    batch: int = 64
    """Pictures that are decoded and encoded together."""
    workers: int = 1
    """Worker processes; each tokenizes whole shards."""
    device: str = "cpu"
    """``cpu``, or ``cuda``: shards take turns on the GPUs."""
    max_bad_fraction: float = 0.01
    """Share of all samples, rounded up to a whole number of them, that may be bad; one more stops the run."""

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise UserError(f"a batch must hold at least 1 picture, not {self.batch}")
        if self.workers < 1:
            raise UserError(f"at least 1 worker process is needed, not {self.workers}")
        if not 0 <= self.max_bad_fraction <= 1:
            raise UserError(f"the share of bad samples must be within 0 and 1, not {self.max_bad_fraction}")
        if self.device not in ("cpu", "cuda"):
            raise UserError(f"no device {self.device!r}: use cpu or cuda")


@dataclass(frozen=True)
class Recipe:
    """The properties that all token shards of one folder must share."""

    format: str
    """:data:`FORMAT`."""
    text_sha256: str
    """Identity of the text tokenizer."""
    image_sha256: str
    """Identity of the image tokenizer."""
    size: int
    """Pixels of a side."""
    device: str
    """Kind of device that encoded the pictures."""


@dataclass(frozen=True)
class Receipt:
    """Source, recipe and bad samples of a token shard."""

    recipe: Recipe
    """Tokenizers, size and device that made the shard."""
    source_sha256: str
    """Hash of the picture shard."""
    sha256: str
    """Hash of the token shard."""
    bad: list[tuple[str, str]]
    """Key and reason of each sample that was left out."""

    def save(self, shard: Path) -> None:
        """Write the receipt beside the token shard."""
        write_atomically(_receipt_path(shard), json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, shard: Path) -> "Receipt | None":
        """Load the receipt of a token shard; None if it is missing or unreadable."""
        try:
            raw = json.loads(_receipt_path(shard).read_bytes())
            bad = [(key, reason) for key, reason in raw["bad"]]
            return cls(Recipe(**raw["recipe"]), raw["source_sha256"], raw["sha256"], bad)
        except (OSError, ValueError, KeyError, TypeError):
            return None


@dataclass(frozen=True)
class Tokenized:
    """Result of tokenizing one shard."""

    entry: ShardEntry
    """The token shard's line in the index."""
    bad: list[tuple[str, str]]
    """Key and reason of each sample that was left out."""
    kept: bool
    """Whether the shard of an earlier run was kept."""


@dataclass(frozen=True)
class _Job:
    pictures: ShardFolder
    number: int
    out: Path
    tokenizers: Path
    recipe: Recipe
    grid: tuple[int, int]
    batch: int


class Tokenization:
    """Makes or completes a folder of token shards. The constructor checks all inputs before any work starts.

    Args:
        pictures: indexed picture shards, a folder or URL.
        out: folder of the token shards; it may hold some of them already.
        tokenizers: folder with ``text.model``, ``image/`` and ``vocabulary.json``.
        options: picture size, batching, device and tolerance.
    """

    def __init__(self, pictures: str, out: Path, tokenizers: Path, options: TokenizeOptions):
        self._folder = ShardFolder.open(pictures)
        self._out, self._options = out, options
        if self._folder.index.kind != "pictures":
            raise UserError(f"{pictures} holds {self._folder.index.kind}, not pictures")
        self._vocabulary = vocabularies.verify(tokenizers)
        self._grid = _grid(tokenizers, self._vocabulary, options.size)
        recipe = Recipe(FORMAT, self._vocabulary.text_sha256, self._vocabulary.image_sha256, options.size, options.device)
        self.shards = [remote.file_name(entry.name) for entry in self._folder.index.shards]
        """File names, in order."""
        self._refuse_foreign(recipe)
        self._jobs = [
            _Job(self._folder, number, out, tokenizers, recipe, self._grid, options.batch) for number in range(len(self.shards))
        ]

    def run(self) -> Iterator[Tokenized]:
        """Make the missing shards in order, then the index and the list of bad samples.

        :class:`UserError` where more samples are bad than the options allow; the list is written in that case, too.
        """
        with FolderLock(self._out, "folder"):
            yield from self._run()

    def _run(self) -> Iterator[Tokenized]:
        index = self._folder.index
        allowed = ceil(self._options.max_bad_fraction * index.samples)
        entries: list[ShardEntry] = []
        lines: list[str] = []
        for done in ordered(_tokenize_shard, self._jobs, self._options.workers):
            entries.append(done.entry)
            lines += [json.dumps({"shard": done.entry.name, "key": key, "reason": reason}) + "\n" for key, reason in done.bad]
            yield done
            if len(lines) > allowed:
                _write_if_changed(self._out / BAD_NAME, "".join(lines))
                raise UserError(
                    f"{len(lines)} bad samples by {done.entry.name}, {allowed} of {index.samples} are allowed: see "
                    f"{self._out / BAD_NAME}, mend the pictures or raise --max-bad-fraction"
                )
        _write_if_changed(self._out / BAD_NAME, "".join(lines))
        digest = hashlib.sha256("".join(f"{e.sha256} {remote.file_name(e.name)}\n" for e in index.shards).encode()).hexdigest()
        source = {"name": self._folder.location.rsplit("/", 1)[-1], "sha256": digest}
        size, device = self._options.size, self._options.device
        meta = tokens.index_meta(self._vocabulary, self._grid, format=FORMAT, size=size, device=device, source=source)
        made = Index(sorted(entries, key=lambda entry: entry.name), tokens.KIND, meta)
        if _previous_index(self._out) != made:
            made.save(self._out)

    def _refuse_foreign(self, recipe: Recipe) -> None:
        """:class:`UserError` where the folder holds shards that this run would destroy or mix with others."""
        if not remote.is_url(self._folder.location) and Path(self._folder.location).resolve() == self._out.resolve():
            raise UserError(f"{self._out} holds the pictures: give another folder for the tokens")
        if self._out.exists() and not self._out.is_dir():
            raise UserError(f"{self._out} is a file: give a folder")
        for path in sorted(self._out.glob("*.tar")):
            receipt = Receipt.load(path)
            if path.name not in self.shards:
                raise UserError(f"{path} does not come from {self._folder.location}: give another folder, or remove it")
            if receipt is None and not _holds_tokens(path):
                raise UserError(f"{path} is no token shard and would be overwritten: give another folder")
            if receipt is not None and receipt.recipe != recipe:
                theirs, ours = asdict(receipt.recipe), asdict(recipe)
                differences = ", ".join(
                    f"{name} {theirs[name]} (now {ours[name]})" for name in ours if theirs[name] != ours[name]
                )
                raise UserError(f"{self._out} was tokenized with {differences}: give another folder, or remove it")


def _tokenize_shard(job: _Job) -> Tokenized:
    source = job.pictures.index.shards[job.number]
    path = job.out / remote.file_name(source.name)
    receipt = Receipt.load(path)
    if receipt is not None and (receipt.recipe, receipt.source_sha256) == (job.recipe, source.sha256):
        entry = _finished(path)
        if entry is not None and entry.sha256 == receipt.sha256:
            return Tokenized(entry, receipt.bad, True)
    bad: list[tuple[str, str]] = []
    try:
        sidecar = job.pictures.sidecar(job.number)
        with closing(job.pictures.open_shard(job.number)) as shard, ShardWriter(path) as writer:
            _write_tokens(job, shard, sidecar, writer, bad)
    except Unreadable as error:
        raise UserError(f"{job.pictures.location}, {source.name}: {error}") from None
    assert writer.entry is not None
    Receipt(job.recipe, source.sha256, writer.entry.sha256, bad).save(path)
    return Tokenized(writer.entry, bad, False)


def _write_tokens(job: _Job, shard: ShardFile, sidecar: Sidecar, writer: ShardWriter, bad: list[tuple[str, str]]) -> None:
    import torch

    device = job.recipe.device
    if device == "cuda":
        if not torch.cuda.is_available():
            raise UserError("there is no GPU here: use --device cpu")
        device = f"cuda:{job.number % torch.cuda.device_count()}"
    text, image = _load(job.tokenizers, device)
    if (text.sha256, image.sha256) != (job.recipe.text_sha256, job.recipe.image_sha256):
        raise UserError(f"the tokenizers in {job.tokenizers} changed while they were in use: run again")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for start in range(0, len(sidecar.samples), job.batch):
            keys, pictures, captions = [], [], []
            for key, extents in sidecar.samples[start : start + job.batch]:
                members = _read(shard, key, extents)
                try:
                    sample = decode_members(members, job.recipe.size)
                    captions.append(_encode_captions(sample, text))
                except Unreadable as error:
                    bad.append((key, str(error)))
                    continue
                keys.append(key)
                pictures.append(sample.pixels)
            if not keys:
                continue
            pixels = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).to(torch.float32) / 127.5 - 1
            codes = image.encode(pixels).cpu().numpy()
            if codes.shape[1:] != job.grid:
                raise UserError(f"{job.tokenizers} makes codes of {codes.shape[1:]}, its configuration says {job.grid}")
            for key, grid, ids in zip(keys, codes, captions, strict=True):
                writer.write(key, tokens.encode(grid, ids))
    finally:
        torch.set_num_threads(threads)


def _read(shard: ShardFile, key: str, extents: dict[str, Extent]) -> dict[str, bytes]:
    """Read a sample's members. Bytes that differ from the index end the run: the receipt would claim a false source."""
    try:
        return {extension: shard.read(extent) for extension, extent in extents.items()}
    except Unreadable as error:
        raise Unreadable(f"key {key}: {error}: look with `gptface data verify`, then index it again") from None


def _encode_captions(sample: PictureSample, text: "TextTokenizer") -> list[list[int]]:
    """Ids of every caption that is not empty, without repeats; :class:`Unreadable` if none is left."""
    encoded = dict.fromkeys(tuple(text.encode(caption)) for caption in sample.captions)
    encoded.pop((), None)
    if not encoded:
        raise Unreadable("no caption with text in it")
    return [list(ids) for ids in encoded]


@functools.lru_cache(maxsize=8)
def _load(tokenizers: Path, device: str) -> "tuple[TextTokenizer, ImageTokenizer]":
    """Load both tokenizers, once in each process."""
    # torch, diffusers and sentencepiece load here, in the processes that compute.
    from gptface_dist.tokenizers.image import ImageTokenizer
    from gptface_dist.tokenizers.text import TextTokenizer

    text = TextTokenizer.load(tokenizers / vocabularies.TEXT_NAME)
    return text, ImageTokenizer.load(tokenizers / vocabularies.IMAGE_NAME, device)


def _grid(tokenizers: Path, vocabulary: Vocabulary, size: int) -> tuple[int, int]:
    """Rows and columns of codes of a picture; :class:`UserError` where the size or the codebook does not fit."""
    blocks = read_config(tokenizers / vocabularies.IMAGE_NAME).get("block_out_channels", [64])
    factor = 2 ** (len(blocks) - 1)
    if size < 1 or size % factor:
        raise UserError(
            f"size {size} is no multiple of {factor}, the pixels of a side that one code of {tokenizers} stands for"
        )
    largest = np.iinfo(np.uint16).max + 1
    if vocabulary.image_codes > largest:
        raise UserError(f"{tokenizers} has {vocabulary.image_codes} image codes: token shards hold {largest} at most")
    return size // factor, size // factor


def _finished(shard: Path) -> ShardEntry | None:
    """The index line of a token shard; None if its size shows that it is not complete."""
    try:
        entry = read_entry(shard)
        return entry if shard.stat().st_size == entry.size else None
    except (OSError, UserError):
        return None


def _holds_tokens(shard: Path) -> bool:
    """Whether a shard without a receipt is a token shard, left by an interrupted run."""
    try:
        samples = Sidecar.from_json(sidecar_path(shard).read_bytes(), str(shard)).samples
    except (OSError, UserError):
        return False
    return all(tokens.CODES in extents for _, extents in samples)


def _previous_index(folder: Path) -> Index | None:
    path = folder / INDEX_NAME
    try:
        return Index.from_json(path.read_bytes(), str(path))
    except (OSError, UserError):
        return None


def _write_if_changed(path: Path, content: str) -> None:
    if not path.is_file() or path.read_bytes() != content.encode():
        write_atomically(path, content)


def _receipt_path(shard: Path) -> Path:
    return shard.with_name(shard.name + RECEIPT_SUFFIX)
