"""Token shards: what the tokenizers say of the pictures, in the same bytes however they were made."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from gptface_dist.data import tokens
from gptface_dist.data.folder import ShardFolder
from gptface_dist.data.pictures import decode_pixels
from gptface_dist.data.shards import ShardWriter, write_index
from gptface_dist.data.stream import BlockReader, Source, StreamOptions
from gptface_dist.data.tokenize import BAD_NAME, Tokenization, Tokenized, TokenizeOptions
from gptface_dist.data.verify import Verification
from gptface_dist.errors import UserError
from gptface_dist.tokenizers.image import ImageTokenizer
from gptface_dist.tokenizers.text import TextOptions, TextTokenizer, train_text_tokenizer
from gptface_dist.tokenizers.vocabulary import Vocabulary, join
from tests.picture_shards import png, sample, serve, write_pictures

SIZE = 8
GRID = (4, 4)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizers(tmp_path_factory.mktemp("tokenizers"), seed=0)


def make_tokenizers(folder: Path, seed: int) -> Path:
    from diffusers import VQModel

    torch.manual_seed(seed)
    model = VQModel(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        num_vq_embeddings=16,
        norm_num_groups=4,
        vq_embed_dim=4,
    )
    model.save_pretrained(folder / "image")
    train_text_tokenizer([f"face {number} one more" for number in range(50)], folder / "text.model", TextOptions(size=278))
    join(folder)
    return folder


def tokenize(pictures: Path | str, out: Path, tokenizers: Path, **options: int | float | str) -> list[Tokenized]:
    return list(Tokenization(str(pictures), out, tokenizers, TokenizeOptions(**{"size": SIZE, **options})).run())  # type: ignore[arg-type]


def files(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}


def contents(folder: Path) -> dict[str, bytes]:
    return {name: data for name, (data, _) in files(folder).items()}


def test_tokens_are_what_the_tokenizers_say(tmp_path: Path, tokenizers: Path) -> None:
    held = write_pictures(tmp_path / "in", [3, 2])
    assert [
        (done.entry.name, done.entry.samples, done.bad, done.kept)
        for done in tokenize(tmp_path / "in", tmp_path / "out", tokenizers)
    ] == [
        ("00000.tar", 3, [], False),
        ("00001.tar", 2, [], False),
    ]
    image, text = ImageTokenizer.load(tokenizers / "image"), TextTokenizer.load(tokenizers / "text.model")
    vocabulary = Vocabulary.load(tokenizers / "vocabulary.json")
    folder = ShardFolder.open(tmp_path / "out")
    assert tokens.check_sources([Source(folder)], vocabulary) == GRID
    keys = []
    for number in range(2):
        shard = folder.open_shard(number)
        for key, extents in folder.sidecar(number).samples:
            found = tokens.TokenDecoder(vocabulary).decode(
                shard.read(extents[tokens.CODES]), shard.read(extents[tokens.CAPTIONS])
            )
            pixels = decode_pixels(held[key]["png"], SIZE).astype(np.float32) / 127.5 - 1
            expected = image.encode(torch.from_numpy(pixels).permute(2, 0, 1)[None])[0]
            assert found.codes.tolist() == expected.tolist()
            captions = [text.encode(held[key]["txt"].decode()), text.encode("one more")]
            assert [found.caption(row).tolist() for row in range(len(found.captions))] == captions
            keys.append(key)
        shard.close()
    assert keys == list(held)
    assert [problem for report in Verification(str(tmp_path / "out"), vocabulary).run(1) for problem in report.problems] == []
    meta = folder.index.meta
    assert (meta["size"], meta["grid"], meta["device"], meta["source"]["name"]) == (SIZE, list(GRID), "cpu", "in")
    assert str(tmp_path) not in json.dumps(meta)


def test_bytes_do_not_depend_on_workers_batch_threads_or_a_restart(tmp_path: Path, tokenizers: Path) -> None:
    write_pictures(tmp_path / "in", [5, 4, 3])
    tokenize(tmp_path / "in", tmp_path / "a", tokenizers)
    tokenize(tmp_path / "in", tmp_path / "b", tokenizers, workers=2, batch=2)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        running = Tokenization(str(tmp_path / "in"), tmp_path / "c", tokenizers, TokenizeOptions(SIZE, batch=1)).run()
        next(running)
        running.close()
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    # An interruption between a shard and its receipt, and inside a shard.
    next((tmp_path / "c").glob("*.source.json")).unlink()
    with serve(tmp_path) as server:
        assert [done.kept for done in tokenize(f"{server.url}/in", tmp_path / "c", tokenizers)] == [False] * 3
    assert contents(tmp_path / "a") == contents(tmp_path / "b") == contents(tmp_path / "c")


def test_a_second_run_rewrites_nothing(tmp_path: Path, tokenizers: Path) -> None:
    write_pictures(tmp_path / "in", [3, 2])
    tokenize(tmp_path / "in", tmp_path / "out", tokenizers)
    before = files(tmp_path / "out")
    assert [done.kept for done in tokenize(tmp_path / "in", tmp_path / "out", tokenizers, batch=1)] == [True, True]
    assert files(tmp_path / "out") == before


def test_only_what_changed_is_made_again(tmp_path: Path, tokenizers: Path) -> None:
    write_pictures(tmp_path / "in", [3, 2, 2])
    tokenize(tmp_path / "in", tmp_path / "out", tokenizers)
    before = contents(tmp_path / "out")
    with ShardWriter(tmp_path / "in" / "00001.tar") as writer:
        writer.write(*sample(77))
    write_index(tmp_path / "in", "pictures", {}, sorted((tmp_path / "in").glob("*.tar")))
    (tmp_path / "out" / "00002.tar").write_bytes(before["00002.tar"][:1000])
    done = tokenize(tmp_path / "in", tmp_path / "out", tokenizers)
    assert [one.kept for one in done] == [True, False, False]
    after = contents(tmp_path / "out")
    assert after["00002.tar"] == before["00002.tar"]
    assert ShardFolder.open(tmp_path / "out").sidecar(1).samples[0][0] == "000000077"


def test_other_tokenizers_and_sizes_are_refused_with_both_names(tmp_path: Path, tokenizers: Path) -> None:
    write_pictures(tmp_path / "in", [2])
    tokenize(tmp_path / "in", tmp_path / "out", tokenizers)
    before = files(tmp_path / "out")
    with pytest.raises(UserError, match=r"was tokenized with size 8 \(now 16\)"):
        tokenize(tmp_path / "in", tmp_path / "out", tokenizers, size=16)
    other = make_tokenizers(tmp_path / "other", seed=1)
    ours, theirs = (Vocabulary.load(folder / "vocabulary.json").image_sha256 for folder in (other, tokenizers))
    with pytest.raises(UserError, match=rf"image_sha256 {theirs} \(now {ours}\)"):
        tokenize(tmp_path / "in", tmp_path / "out", other)
    # Without its index, too: an interrupted run has none yet.
    (tmp_path / "out" / "index.json").unlink()
    with pytest.raises(UserError, match="image_sha256"):
        tokenize(tmp_path / "in", tmp_path / "out", other)
    del before["index.json"]
    assert files(tmp_path / "out") == before


def test_training_refuses_tokens_of_other_tokenizers(tmp_path: Path, tokenizers: Path) -> None:
    write_pictures(tmp_path / "in", [2])
    tokenize(tmp_path / "in", tmp_path / "out", tokenizers)
    ours = Vocabulary.load(tokenizers / "vocabulary.json")
    sources = [Source(ShardFolder.open(tmp_path / "out"))]
    other = dataclasses.replace(ours, text_sha256="0" * 64)
    with pytest.raises(UserError, match=f"text tokenizer {ours.text_sha256[:12]}, the vocabulary has 000000000000"):
        tokens.check_sources(sources, other)
    reader = BlockReader(sources, tokens.TokenDecoder(ours, GRID), StreamOptions(block=2, streams=1))
    assert {one.origin.key for one in reader.read(0).samples} == {"000000000", "000000001"}
    reader.close()


def write_bad(folder: Path) -> None:
    folder.mkdir()
    good = sample(0)[1]
    with ShardWriter(folder / "00000.tar") as writer:
        writer.write("good", good)
        writer.write("cut", {**good, "png": png(1)[:100]})
        writer.write("mute", {"png": png(2)})
        writer.write("blank", {**good, "txt": b" "})
        writer.write("mark", {"png": png(2), "txt": "▁".encode()})  # text for Unicode, none for the tokenizer
    with ShardWriter(folder / "00001.tar") as writer:
        writer.write("bare", {"txt": b"a face"})
        writer.write("fine", good)
    write_index(folder, "pictures", {}, sorted(folder.glob("*.tar")))


BAD = {
    "cut": "unreadable picture",
    "mute": "no .txt member",
    "blank": "the caption is empty",
    "mark": "no caption with text",
    "bare": "no picture",
}


@pytest.mark.parametrize("batch", [1, 64])
def test_bad_samples_are_left_out_and_listed(tmp_path: Path, tokenizers: Path, batch: int) -> None:
    write_bad(tmp_path / "in")
    for _ in range(2):  # the second time from the receipts
        done = tokenize(tmp_path / "in", tmp_path / "out", tokenizers, max_bad_fraction=0.7, batch=batch)
        assert [[key for key, _ in one.bad] for one in done] == [["cut", "mute", "blank", "mark"], ["bare"]]
        lines = [json.loads(line) for line in (tmp_path / "out" / BAD_NAME).read_text().splitlines()]
        assert [(line["shard"], line["key"]) for line in lines] == [("00000.tar", key) for key in list(BAD)[:4]] + [
            ("00001.tar", "bare")
        ]
        assert all(line["reason"].startswith(BAD[line["key"]]) for line in lines)
    folder = ShardFolder.open(tmp_path / "out")
    assert [[key for key, _ in folder.sidecar(number).samples] for number in range(2)] == [["good"], ["fine"]]


def test_too_many_bad_samples_stop_the_run(tmp_path: Path, tokenizers: Path) -> None:
    write_bad(tmp_path / "in")
    with pytest.raises(UserError, match=r"4 bad samples by 00000.tar, 1 of 7 are allowed: see .*bad_samples.jsonl, mend"):
        tokenize(tmp_path / "in", tmp_path / "out", tokenizers)
    assert len((tmp_path / "out" / BAD_NAME).read_text().splitlines()) == 4
    assert not (tmp_path / "out" / "index.json").exists()
    done = tokenize(tmp_path / "in", tmp_path / "out", tokenizers, max_bad_fraction=1.0)
    assert [one.kept for one in done] == [True, False]


def test_one_bad_sample_of_a_small_set_is_allowed_unless_none_is(tmp_path: Path, tokenizers: Path) -> None:
    (tmp_path / "in").mkdir()
    with ShardWriter(tmp_path / "in" / "0.tar") as writer:
        writer.write(*sample(0))
        writer.write("mute", {"png": png(2)})
    write_index(tmp_path / "in", "pictures", {}, [tmp_path / "in" / "0.tar"])
    assert tokenize(tmp_path / "in", tmp_path / "out", tokenizers)[0].entry.samples == 1
    with pytest.raises(UserError, match="0 of 2 are allowed"):
        tokenize(tmp_path / "in", tmp_path / "out", tokenizers, max_bad_fraction=0.0)


def test_pictures_that_are_not_those_of_the_index_are_refused(tmp_path: Path, tokenizers: Path) -> None:
    write_pictures(tmp_path / "in", [3])
    path = tmp_path / "in" / "00000.tar"
    data = path.read_bytes()
    path.write_bytes(data.replace(b"face 1", b"fake 1"))
    with pytest.raises(UserError, match=r"00000.tar: key 000000001: bytes .* changed since .*gptface data verify"):
        tokenize(tmp_path / "in", tmp_path / "out", tokenizers)
    assert not (tmp_path / "out").exists()
    path.unlink()
    with pytest.raises(UserError, match="cannot be opened"):
        tokenize(tmp_path / "in", tmp_path / "out", tokenizers)


def test_nothing_of_others_is_overwritten(tmp_path: Path, tokenizers: Path) -> None:
    write_pictures(tmp_path / "in", [2])
    with pytest.raises(UserError, match="holds the pictures: give another folder"):
        tokenize(tmp_path / "in", tmp_path / "in" / ".." / "in", tokenizers)
    shutil.copytree(tmp_path / "in", tmp_path / "copy")
    (tmp_path / "copy" / "index.json").unlink()
    before = files(tmp_path / "copy")
    with pytest.raises(UserError, match="no token shard and would be overwritten"):
        tokenize(tmp_path / "in", tmp_path / "copy", tokenizers)
    assert files(tmp_path / "copy") == before
    tokenize(tmp_path / "in", tmp_path / "out", tokenizers)
    (tmp_path / "out" / "00000.tar").rename(tmp_path / "out" / "stranger.tar")
    with pytest.raises(UserError, match=r"stranger.tar does not come from"):
        tokenize(tmp_path / "in", tmp_path / "out", tokenizers)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        tokenize(tmp_path / "in", tmp_path / "file", tokenizers)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 7}, "size 7 is no multiple of 2"),
        ({"size": 0}, "size 0"),
        ({"batch": 0}, "at least 1 picture"),
        ({"workers": 0}, "at least 1 worker"),
        ({"device": "tpu"}, "no device 'tpu'"),
        ({"max_bad_fraction": 1.5}, "within 0 and 1"),
    ],
)
def test_impossible_options_are_refused(tmp_path: Path, tokenizers: Path, options: dict[str, int], message: str) -> None:
    write_pictures(tmp_path / "in", [1])
    with pytest.raises(UserError, match=message):
        tokenize(tmp_path / "in", tmp_path / "out", tokenizers, **options)
    assert not (tmp_path / "out").exists()


def test_what_is_no_set_of_tokenizers_is_refused(tmp_path: Path, tokenizers: Path) -> None:
    write_pictures(tmp_path / "in", [1])
    with pytest.raises(UserError, match="does not exist: make it with"):
        tokenize(tmp_path / "in", tmp_path / "out", tmp_path)
    shutil.copytree(tokenizers, tmp_path / "changed")
    (tmp_path / "changed" / "text.model").write_bytes(b"other")
    with pytest.raises(UserError, match="put back the tokenizer"):
        tokenize(tmp_path / "in", tmp_path / "out", tmp_path / "changed")
    assert not (tmp_path / "out").exists()
