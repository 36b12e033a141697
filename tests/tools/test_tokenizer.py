"""`gptface tokenizer` as a user runs it: from shards to a vocabulary, going on, and mistakes in one line."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from gptface_dist.tokenizers.image_training import begun_precision
from gptface_dist.tokenizers.vocabulary import verify
from tests.picture_shards import write_pictures
from tests.program import gptface

IMAGE = ["--size", "16", "--steps", "2", "--batch", "2", "--held-out", "3", "--codes", "32"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_pictures(folder, [20, 20])
    return folder


def test_from_shards_to_a_vocabulary(tmp_path: Path, data: Path) -> None:
    status, out, _ = gptface("tokenizer", "text", data, tmp_path / "t" / "text.model", "--size", "280")
    assert status == 0
    assert "text.model: 280 pieces, sha256 " in out
    status, out, _ = gptface("tokenizer", "image", data, tmp_path / "t" / "image", *IMAGE)
    assert status == 0
    assert re.search(r"^step 2/2: loss [\d.]+, PSNR [\d.]+ dB, codes \d+%, 0.0 min left$", out, re.MULTILINE)
    assert "4x4 codes a picture" in out
    assert "held out: 3 pictures, PSNR " in out
    status, out, _ = gptface("tokenizer", "join", tmp_path / "t")
    assert (status, out.splitlines()[1:]) == (0, ["  text     0 to 279", "  image    280 to 311", "  specials 312 to 315"])
    assert verify(tmp_path / "t").size == 316

    sheet, figures = tmp_path / "sheet.png", tmp_path / "figures.json"
    status, out, _ = gptface(
        "tokenizer", "evaluate", tmp_path / "t" / "image", data, "--pictures", "3", "--sheet", sheet, "--out", figures
    )
    assert status == 0
    summary = json.loads((tmp_path / "t" / "image" / "summary.json").read_text())
    found = json.loads(figures.read_text())
    assert {name: found[name] for name in summary["held_out"]} == summary["held_out"], "the same pictures, the same figures"
    assert found["sha256"] == summary["sha256"]
    assert out.startswith("3 pictures, PSNR ")
    with Image.open(sheet) as ours, Image.open(tmp_path / "t" / "image" / "sheet.png") as theirs:
        assert ours.tobytes() == theirs.tobytes()
    status, out, _ = gptface("tokenizer", "evaluate", tmp_path / "t" / "image", data)
    assert out.startswith("40 pictures, "), "fewer than were asked for"

    status, out, _ = gptface("tokenizer", "image", data, tmp_path / "t" / "image", *IMAGE)
    assert status == 0
    assert "step" not in out, "it is done"
    for arguments, message in [
        (["image", data, tmp_path / "t" / "image", *IMAGE, "--learning-rate", "0.5"], "learning_rate=0.002, not 0.5:"),
        (["image", data, tmp_path / "t" / "image", *IMAGE, "--seed", "1"], "with seed=0, not 1:"),
        (["image", data, tmp_path / "t" / "text.model", *IMAGE], "cannot be made"),
        (["text", data, tmp_path / "t" / "text.model"], "exists: remove it"),
        (["text", data, tmp_path / "other.model", "--size", "5000"], "pieces: at most "),
        (["evaluate", tmp_path / "t" / "image", data, "--size", "18"], "do not divide into 4x4 patches"),
        (["evaluate", tmp_path / "t", data], "holds no config.json"),
        (["evaluate", tmp_path / "t" / "image", data, "--sheet", tmp_path / "no" / "a.png"], "make it first"),
    ]:
        status, out, error = gptface("tokenizer", *arguments)
        assert (status, out) == (2, "")
        assert message in error
        assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["text", "nowhere", "out"], "no folder nowhere"),
        (["text", "{empty}", "out"], "has no index.json: make it with `gptface data index"),
        (["text", "{data}", "out", "--size", "3"], "too small"),
        (["image", "nowhere", "out"], "no folder nowhere"),
        (["image", "{data}", "out", "--preset", "huge"], "no preset 'huge': choose one of tiny, small, base, large"),
        (["image", "{data}", "out", "--size", "18"], "size 18 is not a multiple of the down-sampling factor 4"),
        (["image", "{data}", "out"], "holds 40 pictures, 256 cannot be held out"),
        (["image", "{data}", "out", "--precision", "int8"], "precision must be fp32 or bf16"),
        (["image", "{data}", "out", "--vgg", "1"], "needs vgg_weights"),
        (["join", "{empty}"], "text.model does not exist"),
        (["evaluate", "nowhere", "{data}"], "nowhere holds no config.json"),
    ],
)
def test_mistakes_are_one_line_and_status_2(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    filled = [argument.format(data=data, empty=tmp_path / "empty") for argument in arguments]
    status, out, error = gptface("tokenizer", *filled)
    assert (status, out) == (2, "")
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_shards_without_captions(tmp_path: Path) -> None:
    from gptface_dist.data.shards import ShardWriter, write_index

    with ShardWriter(tmp_path / "0.tar") as writer:
        writer.write("0", {"png": b"x"})
    write_index(tmp_path, "pictures", {}, [tmp_path / "0.tar"])
    status, out, error = gptface("tokenizer", "text", tmp_path, tmp_path / "text.model")
    assert (status, out) == (2, "")
    assert "there is no caption with text in the data" in error
    assert not (tmp_path / "text.model").exists()


@pytest.mark.parametrize(("native", "chosen"), [(True, "bf16"), (False, "fp32")])
def test_precision_auto_is_what_the_hardware_multiplies(
    native: bool, chosen: str, tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gptface_dist.host.native_bfloat16", lambda device: native)
    status, _, error = gptface("tokenizer", "image", data, tmp_path / "image", *IMAGE, "--precision", "auto", "--steps", "1")
    assert status == 0, error
    assert f"--precision auto: {chosen} (this machine" in error
    assert f'"precision": "{chosen}"' in "".join(path.read_text() for path in (tmp_path / "image").glob("*.json"))


def test_precision_auto_resumes_on_another_machine(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for native in (False, True):
        monkeypatch.setattr("gptface_dist.host.native_bfloat16", lambda device, native=native: native)
        arguments = ["image", data, tmp_path / "image", *IMAGE, "--precision", "auto", "--steps", "2"]
        status, _, error = gptface("tokenizer", *arguments)
        assert status == 0, error
    assert f"--precision auto: fp32 (as {tmp_path / 'image'} was begun)" in error
    # One that was cut in the middle has a checkpoint, and no summary.
    torch.save({"run": {"training": {"precision": "bf16"}}}, tmp_path / "checkpoint.pt")
    assert begun_precision(tmp_path) == "bf16"
    (tmp_path / "checkpoint.pt").write_bytes(b"damaged")
    assert begun_precision(tmp_path) is None


def test_under_torchrun(tmp_path: Path, data: Path) -> None:
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "gptface_dist.tools.main"]
    arguments = ["tokenizer", "image", str(data), str(tmp_path / "image"), *IMAGE]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command, *arguments], capture_output=True, text=True, check=False, env=environment, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("held out: 3 pictures") == 1, "one process speaks"
    assert (tmp_path / "image" / "summary.json").exists()
