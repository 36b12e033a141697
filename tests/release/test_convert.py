"""Conversion: every parameter of the release is the run's master weight, and what is wrong is refused, leaving nothing."""

import dataclasses
import hashlib
import itertools
import json
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gptface_dist import release
from gptface_dist.errors import UserError
from gptface_dist.model.reference_batch import reference_batch
from gptface_dist.objectives.milm_itm import MilmItm
from gptface_dist.objectives.reference_outputs import ReferenceOutputs, difference, reference_outputs
from gptface_dist.release import convert as module
from gptface_dist.release.checkpoint import TrainingCheckpoint
from gptface_dist.release.convert import ConvertOptions, convert
from gptface_dist.release.tensors import Weights
from gptface_dist.tokenizers.vocabulary import Vocabulary
from tests.release.factories import GRID, OPTIONS, VARIANTS, make_checkpoint, make_model, make_tokenizers

FLOAT32 = ConvertOptions(dtype="float32")


@pytest.fixture(scope="module")
def vocabulary(tokenizers: Path) -> Vocabulary:
    return Vocabulary.load(tokenizers / "vocabulary.json")


@pytest.fixture
def run(tokenizers: Path, vocabulary: Vocabulary, tmp_path: Path) -> Path:
    make_checkpoint(tmp_path / "run", make_model(vocabulary), tokenizers, average=make_model(vocabulary, seed=9))
    return tmp_path / "run"


@pytest.mark.parametrize(("variant", "cut"), [("gelu", 23), ("swiglu", 499), ("qk_norm", 10**6)])
def test_every_parameter_is_the_master_weight(
    tokenizers: Path, vocabulary: Vocabulary, tmp_path: Path, variant: str, cut: int
) -> None:
    model = make_model(vocabulary, VARIANTS[variant])
    make_checkpoint(tmp_path / "run", model, tokenizers, cut=cut)
    card = convert(tmp_path / "run", tmp_path / "release", FLOAT32)
    found = release.load(tmp_path / "release")
    assert all(torch.equal(found.model.get_parameter(name), parameter) for name, parameter in model.named_parameters())
    assert found.config.card == card
    assert (found.config.options, found.vocabulary, found.config.grid) == (model.options, vocabulary, GRID)
    assert card.data == ["tokens/a (weight 1)", "tokens/b (weight 3)"]
    assert (card.step, card.samples, card.tokens, card.layout) == (200, 12800, 199800, "DP2 x TP2 x PP1 x ZeRO-3")
    assert card.losses == {"loss": 5.25, "loss/text": 3.5, "accuracy/text": 0.25}
    assert max(card.parity.values()) < 1e-6
    assert max(card.rounding.values()) < 1e-6
    assert sorted(path.name for path in tmp_path.iterdir()) == ["release", "run"]


def test_bfloat16_and_the_average(run: Path, vocabulary: Vocabulary, tmp_path: Path) -> None:
    card = convert(run, tmp_path / "half", ConvertOptions(dtype="bfloat16"))
    assert 1e-4 < max(card.rounding.values()) < 5e-2
    assert max(card.parity.values()) < 1e-6
    held = release.weights(tmp_path / "half")
    assert all(torch.equal(held[name], p.bfloat16()) for name, p in make_model(vocabulary).named_parameters())
    convert(run, tmp_path / "ema", ConvertOptions(dtype="float32", ema=True, license="mit", name="Mean"))
    found = release.load(tmp_path / "ema")
    averaged = make_model(vocabulary, seed=9)
    assert all(torch.equal(found.model.get_parameter(name), p) for name, p in averaged.named_parameters())
    assert (found.config.card.ema, found.config.card.license, found.config.card.name) == (True, "mit", "Mean")
    # What a release records is its own answer, not that of the weights the run went on with.
    recorded = ReferenceOutputs.load(tmp_path / "ema" / "reference.safetensors")
    outputs = reference_outputs(MilmItm(), averaged, recorded.batch)
    assert max(difference(outputs, recorded.outputs).values()) < 1e-6


def test_the_latest_checkpoint_of_a_run_is_taken(run: Path, vocabulary: Vocabulary, tokenizers: Path, tmp_path: Path) -> None:
    first = run / "checkpoints" / "step-00000200"
    make_checkpoint(run, make_model(vocabulary, seed=4), tokenizers, step=300)
    assert convert(run, tmp_path / "last", FLOAT32).step == 300
    assert convert(first, tmp_path / "first", FLOAT32).step == 200
    word = make_model(vocabulary, seed=4).embeddings.word.weight
    assert torch.equal(release.weights(tmp_path / "last")["embeddings.word.weight"], word)


def pairs(vocabulary: Vocabulary) -> list[tuple[str, str]]:
    """Names of equal shape: a table that confuses them fits everywhere."""
    by_shape: dict[tuple[int, ...], list[str]] = {}
    for entry in MilmItm().parameters(OPTIONS, vocabulary):
        by_shape.setdefault(entry.shape, []).append(entry.name)
    return [pair for names in by_shape.values() for pair in itertools.pairwise(names)]


def test_a_wrong_entry_in_the_table_of_names_is_refused(tokenizers: Path, vocabulary: Vocabulary, tmp_path: Path) -> None:
    """Any two tensors of one shape that change places; the files, hashes and shapes are all in order."""
    model, found = make_model(vocabulary), 0
    for number, (one, other) in enumerate(pairs(vocabulary)):
        swapped = {one: other, other: one}
        make_checkpoint(
            tmp_path / str(number),
            model,
            tokenizers,
            stored_as=lambda name, table=swapped: table.get(name, name),
            moments=False,
        )
        with pytest.raises(UserError, match="the plain model's outputs are not those of the training run") as error:
            convert(tmp_path / str(number), tmp_path / "release", FLOAT32)
        assert "\n" not in str(error.value)
        assert not (tmp_path / "release").exists()
        shutil.rmtree(tmp_path / str(number))
        found += 1
    assert found > 15
    assert list(tmp_path.iterdir()) == []


def test_a_writer_that_confuses_names_is_refused(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = {"layers.0.mlp_out.bias": "layers.1.mlp_out.bias", "layers.1.mlp_out.bias": "layers.0.mlp_out.bias"}
    written = module.write_model

    class Confused(dict):
        def __init__(self, held: object):
            super().__init__({name: held[table.get(name, name)] for name in held})  # type: ignore[index, attr-defined]

    def confused(folder: Path, config: object, tokenizers: Path, held: object, *rest: object) -> object:
        return written(folder, config, tokenizers, Confused(held), *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "write_model", confused)
    with pytest.raises(UserError, match=r"layers.0.mlp_out.bias was not written as it is in the checkpoint"):
        convert(run, tmp_path / "release", ConvertOptions(dtype="bfloat16"))
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_other_logits_are_refused_beyond_the_tolerance(
    tokenizers: Path, vocabulary: Vocabulary, tmp_path: Path, dtype: str
) -> None:
    model = make_model(vocabulary)
    own = reference_outputs(MilmItm(), model, reference_batch(vocabulary, GRID, 16))
    tolerance = module.TOLERANCES[dtype]
    for number, (factor, accepted) in enumerate([(0.9, True), (1.1, False), (float("nan"), False)]):
        wrong = own | {"itm": own["itm"] * (1 + factor * tolerance)}
        make_checkpoint(tmp_path / str(number), model, tokenizers, outputs=wrong, dtype=dtype, moments=False)
        if accepted:
            card = convert(tmp_path / str(number), tmp_path / "accepted", FLOAT32)
            assert card.parity["itm"] == pytest.approx(0.9 * tolerance, rel=0.1)
        else:
            with pytest.raises(UserError, match=f"at most {tolerance:g}"):
                convert(tmp_path / str(number), tmp_path / "refused", FLOAT32)
            assert not (tmp_path / "refused").exists()


def test_rounding_that_changes_the_model_is_refused(tokenizers: Path, vocabulary: Vocabulary, tmp_path: Path) -> None:
    model = make_model(vocabulary)
    with torch.no_grad():
        # Two large numbers whose difference carries the answer, and is lost in 8 bits.
        model.itm_head.output.bias.copy_(torch.tensor([300.9, 301.1]))
        model.itm_head.output.weight.mul_(100)
        for layer in model.layers:
            layer.out_proj.weight.mul_(40)
            layer.qkv.weight.mul_(6)
    make_checkpoint(tmp_path / "run", model, tokenizers)
    with pytest.raises(UserError, match="bfloat16 changes the outputs too much"):
        convert(tmp_path / "run", tmp_path / "release", ConvertOptions(dtype="bfloat16"))
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    convert(tmp_path / "run", tmp_path / "release", FLOAT32)


def flip(path: Path, place: float) -> None:
    data = bytearray(path.read_bytes())
    data[int(place * len(data))] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("place", [0.02, 0.2, 0.5, 0.8, 0.98])
def test_damaged_tensors_are_found(tokenizers: Path, vocabulary: Vocabulary, tmp_path: Path, place: float) -> None:
    """Wherever it hits: a weight's numbers, or another tensor's, which conversion does not read."""
    folder = make_checkpoint(tmp_path / "run", make_model(vocabulary), tokenizers, cut=10**6)
    flip(next((folder / "state").glob("*.distcp")), place)
    held = TrainingCheckpoint.open(folder)
    wrong = []
    for name, parameter in make_model(vocabulary).named_parameters():
        try:
            assert torch.equal(held.weights[name], parameter)
        except UserError as error:
            wrong.append(str(error))
    assert len(wrong) <= 1
    if wrong:
        assert "\n" not in wrong[0]
        assert "use another checkpoint" in wrong[0]
        with pytest.raises(UserError, match="cannot be read"):
            convert(folder, tmp_path / "release", FLOAT32)
        assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("name", ["run.json", "reference.safetensors", "manifest.json", "state/.metadata"])
@pytest.mark.parametrize("place", [0.1, 0.5, 0.9])
def test_damaged_small_files_are_found(run: Path, tmp_path: Path, name: str, place: float) -> None:
    folder = run / "checkpoints" / "step-00000200"
    flip(folder / name, place)
    with pytest.raises(UserError) as error:
        convert(folder, tmp_path / "release", FLOAT32)
    assert "\n" not in str(error.value)
    assert str(folder) in str(error.value)
    assert not (tmp_path / "release").exists()
    (folder / name).unlink()
    with pytest.raises(UserError, match=Path(name).name):
        convert(folder, tmp_path / "release", FLOAT32)


def test_mistakes(run: Path, vocabulary: Vocabulary, tokenizers: Path, tmp_path: Path) -> None:
    def refused(message: str, source: Path = run, options: ConvertOptions = FLOAT32, target: str = "release") -> None:
        with pytest.raises(UserError, match=message) as error:
            convert(source, tmp_path / target, options)
        assert "\n" not in str(error.value)

    refused("holds no checkpoint", tmp_path / "nowhere")
    refused("holds no checkpoint", tokenizers)
    (tmp_path / "there").mkdir()
    refused("there exists: remove it or give another name", target="there")
    make_checkpoint(tmp_path / "plain", make_model(vocabulary), tokenizers)
    refused("holds no running average: convert without --ema", tmp_path / "plain", ConvertOptions(ema=True))
    (tmp_path / "others").mkdir()
    make_tokenizers(tmp_path / "others", seed=2)
    refused("are not the tokenizers of", options=ConvertOptions(tokenizers=tmp_path / "others"))
    refused("is no folder: say where they are with --tokenizers", options=ConvertOptions(tokenizers=tmp_path / "gone"))
    with pytest.raises(UserError, match="a release is one of float32, bfloat16, not 'fp8'"):
        ConvertOptions(dtype="fp8")
    assert not (tmp_path / "release").exists()
    convert(run, tmp_path / "release", FLOAT32)
    refused("is no checkpoint but a release", tmp_path / "release", target="again")
    moved = tmp_path / "moved"
    shutil.copytree(tokenizers, moved)
    convert(run, tmp_path / "elsewhere", ConvertOptions(dtype="float32", tokenizers=moved))


def test_interrupted_conversion_leaves_nothing(run: Path, tmp_path: Path) -> None:
    for stage in ("comparing with the training run", "writing", "reading back", "running the release"):

        def interrupt(what: str, done: int, total: int, stage: str = stage) -> None:
            if what == stage:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            convert(run, tmp_path / "release", FLOAT32, interrupt)
        assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_progress_adds_up(run: Path, tmp_path: Path) -> None:
    told: dict[str, tuple[int, int]] = {}

    def report(what: str, done: int, total: int) -> None:
        told[what] = told.get(what, (0, 0))[0] + done, total

    convert(run, tmp_path / "release", ConvertOptions(ema=True), report)
    assert list(told) == [
        "comparing with the training run",
        "running the average",
        "writing",
        "reading back",
        "running the release",
    ]
    assert all(done == total for done, total in told.values())


def test_memory_is_that_of_two_tensors(tokenizers: Path, vocabulary: Vocabulary, tmp_path: Path) -> None:
    """The largest tensor is 67 MB, the weights 270 MB, the imports alone about 280 MB."""
    options = dataclasses.replace(OPTIONS, layers=1, hidden=2048, heads=8, ffn=8192, init_std=0.02)
    make_checkpoint(tmp_path / "run", make_model(vocabulary, options), tokenizers, cut=2**20, moments=False)
    program = """
import re, sys
from pathlib import Path
from gptface_dist.release.convert import ConvertOptions, convert
convert(Path(sys.argv[1]), Path(sys.argv[2]), ConvertOptions(sys.argv[3]))
# Not ru_maxrss, which begins at what the process was before it became this program.
print(int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024)
"""
    largest = 4 * 2048 * 8192
    for dtype in ("float32", "bfloat16"):
        command = [sys.executable, "-c", program, str(tmp_path / "run"), str(tmp_path / dtype), dtype]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peak = int(done.stdout)
        assert 250_000_000 + largest < peak < 2 * largest + 500_000_000
    assert len(Weights(tmp_path / "float32").files) == 1


def test_metadata_runs_no_code(run: Path, tmp_path: Path) -> None:
    """DCP's metadata is a pickle: one that asks for anything else than DCP's classes is refused."""
    folder, mark = run / "checkpoints" / "step-00000200", tmp_path / "ran"

    class Trap:
        def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
            return Path.touch, (mark,)  # type: ignore[return-value]

    data = pickle.dumps(Trap())
    (folder / "state" / ".metadata").write_bytes(data)
    raw = json.loads((folder / "manifest.json").read_text())
    raw["files"]["state/.metadata"] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    del raw["sha256"]
    raw["sha256"] = hashlib.sha256((json.dumps(raw, indent=1) + "\n").encode()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(raw, indent=1) + "\n")
    with pytest.raises(UserError, match="cannot be read"):
        convert(folder, tmp_path / "release", FLOAT32)
    assert not mark.exists()
