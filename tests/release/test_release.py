"""Releases: what is written is what is read, to the bit; damage and foreign folders are named in one line."""

import dataclasses
import hashlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gptface_dist import release
from gptface_dist.errors import UserError
from gptface_dist.objectives.milm_itm import MilmItm
from gptface_dist.objectives.reference_outputs import ReferenceOutputs, difference, reference_outputs
from gptface_dist.release import inspection
from gptface_dist.release import tensors as files
from gptface_dist.release.card import Card
from gptface_dist.tokenizers.vocabulary import Vocabulary
from tests.release.factories import GRID, OPTIONS, VARIANTS, make_model, make_tokenizers

CARD = Card(name="Test face", license="mit", data_license="CC BY 4.0", data=["made up"], step=7, losses={"loss": 1.5})


@pytest.fixture(scope="module")
def vocabulary(tokenizers: Path) -> Vocabulary:
    return Vocabulary.load(tokenizers / "vocabulary.json")


@pytest.fixture(scope="module")
def saved(tokenizers: Path, vocabulary: Vocabulary, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "release"
    release.save(make_model(vocabulary), tokenizers, path, GRID, CARD, shard_bytes=12_000)
    return path


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shard_bytes", [1, 5_000, 10**9], ids=["a tensor a file", "files", "one file"])
def test_a_model_comes_back_to_the_bit(
    tokenizers: Path, vocabulary: Vocabulary, tmp_path: Path, variant: str, shard_bytes: int
) -> None:
    model = make_model(vocabulary, VARIANTS[variant])
    release.save(model, tokenizers, tmp_path / "release", GRID, CARD, shard_bytes=shard_bytes)
    found = release.load(tmp_path / "release")
    wanted = dict(model.named_parameters())
    assert found.model.state_dict().keys() == wanted.keys()
    assert all(torch.equal(found.model.get_parameter(name), parameter) for name, parameter in wanted.items())
    assert not found.model.training
    assert (found.config.options, found.vocabulary, found.config.grid) == (VARIANTS[variant], vocabulary, GRID)
    assert found.config.card == CARD
    assert found.text.size == vocabulary.text_size
    assert found.image.codes == vocabulary.image_codes
    for path in (tmp_path / "release").glob("*.safetensors"):
        assert path.stat().st_size < max(shard_bytes, 4 * 300 * 16) + 10_000 or path.name == "reference.safetensors"


def test_the_files_are_hugging_faces(saved: Path, vocabulary: Vocabulary) -> None:
    """Read by the library alone, through the index."""
    index = json.loads((saved / "model.safetensors.index.json").read_text())
    names = sorted(set(index["weight_map"].values()))
    assert names == [f"model-{i:05d}-of-{len(names):05d}.safetensors" for i in range(1, len(names) + 1)]
    assert len(names) > 2
    held = {}
    for name in names:
        tensors = load_file(saved / name)
        assert {index["weight_map"][tensor] for tensor in tensors} == {name}
        held |= tensors
    model = make_model(vocabulary)
    assert held.keys() == dict(model.named_parameters()).keys()
    assert all(torch.equal(held[name], parameter) for name, parameter in model.named_parameters())
    assert index["metadata"]["total_size"] == 4 * sum(p.numel() for p in model.parameters())
    config = json.loads((saved / "config.json").read_text())
    assert (config["model_type"], config["architectures"], config["dtype"]) == ("gptface", ["GPTFaceModel"], "float32")


def test_bfloat16_is_rounded_once(tokenizers: Path, vocabulary: Vocabulary, tmp_path: Path) -> None:
    model = make_model(vocabulary)
    release.save(model, tokenizers, tmp_path / "release", GRID, dtype=torch.bfloat16)
    stored = release.load(tmp_path / "release").model
    widened = release.load(tmp_path / "release", dtype=torch.float32).model
    for name, parameter in model.named_parameters():
        rounded = parameter.bfloat16()
        assert stored.get_parameter(name).dtype == torch.bfloat16
        assert torch.equal(stored.get_parameter(name), rounded)
        assert torch.equal(widened.get_parameter(name), rounded.float())


def test_a_loaded_model_trains_and_is_not_the_file(saved: Path) -> None:
    first = release.load(saved).model
    assert all(parameter.requires_grad for parameter in first.parameters())
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.zero_()
    assert release.load(saved).model.embeddings.word.weight.abs().sum() > 0


def test_the_reference_outputs_tell_what_the_model_computes(saved: Path, vocabulary: Vocabulary) -> None:
    recorded = ReferenceOutputs.load(saved / "reference.safetensors")
    assert recorded.batch.grid == GRID
    outputs = reference_outputs(MilmItm(), release.load(saved).model, recorded.batch)
    assert max(difference(outputs, recorded.outputs).values()) < 1e-6
    other = reference_outputs(MilmItm(), make_model(vocabulary, seed=3), recorded.batch)
    assert min(difference(other, recorded.outputs).values()) > 0.1


def test_the_manifest_has_every_file(saved: Path) -> None:
    listed = json.loads((saved / "manifest.json").read_text())["files"]
    there = {path.relative_to(saved).as_posix() for path in saved.rglob("*") if path.is_file()} - {"manifest.json"}
    assert listed.keys() == there
    assert {
        "README.md",
        "config.json",
        "reference.safetensors",
        "tokenizers/image/config.json",
        "tokenizers/text.model",
    } < there
    for name, entry in listed.items():
        data = (saved / name).read_bytes()
        assert (entry["bytes"], entry["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())


def test_the_card_tells_what_is_known_and_what_is_not(saved: Path, tokenizers: Path, tmp_path: Path) -> None:
    text = (saved / "README.md").read_text()
    assert text.startswith('---\nlicense: "mit"\n')
    assert "# Test face" in text
    assert "- made up" in text
    assert "| Steps | 7 |" in text
    assert "| Samples | unknown |" in text
    assert "| Licence of the data | CC BY 4.0 |" in text
    model = make_model(Vocabulary.load(tokenizers / "vocabulary.json"))
    release.save(model, tokenizers, tmp_path / "r", GRID, Card(license='as "agreed" in writing'))
    assert '---\nlicense: other\nlicense_name: "as \\"agreed\\" in writing"\n' in (tmp_path / "r" / "README.md").read_text()


def test_weights_are_read_one_by_one(saved: Path, vocabulary: Vocabulary) -> None:
    model, held = make_model(vocabulary), release.weights(saved)
    assert held.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        assert torch.equal(held[name], parameter)
        assert torch.equal(held.rows(name, 1, 3), parameter[1:3])
    before = hashlib.sha256(b"".join((saved / name).read_bytes() for name in held.files)).digest()
    held["final_norm.weight"].zero_()
    assert hashlib.sha256(b"".join((saved / name).read_bytes() for name in held.files)).digest() == before


BLOCKED = ("deepspeed", "megatron", "triton", "webdataset", "mlflow", "submitit", "omegaconf")


def test_loading_needs_nothing_distributed(saved: Path) -> None:
    """And no pickle: the interpreter says when one asks for a class."""
    program = f"""
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {BLOCKED!r}:
            raise ImportError(name + " is blocked")
sys.meta_path.insert(0, Blocker())
import torch
from gptface_dist import release
from gptface_dist.model.plain import GPTFace
def hook(event, arguments):
    if event == "pickle.find_class":
        raise AssertionError("unpickled", arguments)
sys.addaudithook(hook)
found = release.load(sys.argv[1])
model = release.load(sys.argv[1], dtype=torch.bfloat16).model
ids = found.text.encode("hat")
picture = found.image.decode(torch.zeros(1, 2, 2, dtype=torch.long))
tokens = torch.tensor([[found.vocabulary.cls_id, *ids, found.vocabulary.sep_id]])
places = torch.stack([torch.arange(tokens.shape[1]), torch.zeros(tokens.shape[1], dtype=torch.long)], -1)[None]
features = found.model(tokens, torch.ones_like(tokens), places, torch.tensor([tokens.shape[1]]))
print(tuple(features.shape)[2], tuple(picture.shape))
"""
    done = subprocess.run([sys.executable, "-c", program, str(saved)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "16 (1, 3, 4, 4)\n"


READ = ["config.json", "tokenizers/text.model", "tokenizers/image/config.json", "tokenizers/vocabulary.json", "manifest.json"]
READ += ["tokenizers/image/diffusion_pytorch_model.safetensors", "model-00001-of-*.safetensors"]
READ += ["model.safetensors.index.json"]


@pytest.mark.parametrize("name", READ)
@pytest.mark.parametrize("place", [0.0, 0.31, 0.67, 0.999])
def test_a_flipped_bit_is_found(copy: Path, name: str, place: float) -> None:
    path = next(copy.glob(name))
    data = bytearray(path.read_bytes())
    data[int(place * len(data))] ^= 4
    path.write_bytes(data)
    # Loading does not look at the manifest's entries of reference outputs and card.
    problem = refusal(copy) or next(inspection.verify(copy))
    assert "\n" not in problem
    assert str(copy) in problem


def refusal(path: Path) -> str:
    try:
        release.load(path)
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("name", READ)
def test_a_missing_or_cut_file_is_named(copy: Path, name: str) -> None:
    path = next(copy.glob(name))
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=re.escape(str(copy))) as cut:
        release.load(copy)
    path.unlink()
    with pytest.raises(UserError, match=re.escape(str(copy))) as missing:
        release.load(copy)
    assert "\n" not in str(cut.value) + str(missing.value)
    assert path.name in str(missing.value)


def edit(path: Path, change: Callable[[dict], None]) -> None:
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: raw.update(model_type="bert"), "describes a model of type 'bert', not 'gptface'"),
        (lambda raw: raw.update(format="gptface-release-9"), "has the format 'gptface-release-9', not 'gptface-release-2'"),
        (lambda raw: raw["options"].update(heads=5), "contradicts itself"),
        (lambda raw: raw["options"].update(rotary=True), "contradicts itself"),
        (lambda raw: raw["options"].update(layers=3), "lacks layers.2"),
        (lambda raw: raw["options"].update(layers=1), "unknown tensors: layers.1"),
        (lambda raw: raw["options"].update(ffn=25), "layers.0.mlp_in.weight has the shape"),
        (lambda raw: raw.update(grid=[3, 40]), "a grid of 3 x 40 codes"),
        (lambda raw: raw.update(dtype="float8"), "dtype 'float8' is none of float32, bfloat16"),
        (lambda raw: raw["vocabulary"].update(text_sha256="0" * 64), "are not the tokenizers config.json names"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(copy: Path, change: Callable[[dict], None], message: str) -> None:
    """Without the hashes, which would find all of these first."""
    edit(copy / "config.json", change)
    with pytest.raises(UserError, match=message) as error:
        release.load(copy, verify=False)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError):
        release.load(copy)


def test_foreign_folders_are_named(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere is no folder"):
        release.load(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"holds no config.json: give the folder of a release"):
        release.load(tmp_path)
    with pytest.raises(UserError, match=r"a model of type 'VQModel', not 'gptface'"):
        release.load(saved / "tokenizers" / "image")


def test_saving_refuses_and_leaves_nothing(tokenizers: Path, vocabulary: Vocabulary, saved: Path, tmp_path: Path) -> None:
    model = make_model(vocabulary)
    before = {path: path.read_bytes() for path in saved.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="exists: remove it or give another name"):
        release.save(model, tokenizers, saved, GRID)
    assert {path: path.read_bytes() for path in saved.rglob("*") if path.is_file()} == before
    (tmp_path / "others").mkdir()
    make_tokenizers(tmp_path / "others", seed=1)
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="not the tokenizers that the model was trained with"):
        release.save(model, tmp_path / "others", tmp_path / "out" / "release", GRID)
    with pytest.raises(UserError, match="a release is float32 or bfloat16, not float16"):
        release.save(model, tokenizers, tmp_path / "out" / "release", GRID, dtype=torch.float16)
    del model.layers[1].qkv
    with pytest.raises(UserError, match=r"lacks layers.1.qkv.bias, layers.1.qkv.weight"):
        release.save(model, tokenizers, tmp_path / "out" / "release", GRID)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_full_disk_leaves_nothing(
    tokenizers: Path, vocabulary: Vocabulary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "_write_tensor", full)
    with pytest.raises(UserError, match=r"release cannot be written: No space left on device"):
        release.save(make_model(vocabulary), tokenizers, tmp_path / "release", GRID)
    assert list(tmp_path.iterdir()) == []


def test_a_grid_that_the_model_has_no_places_for_is_refused(tokenizers: Path, vocabulary: Vocabulary, tmp_path: Path) -> None:
    small = make_model(vocabulary, dataclasses.replace(OPTIONS, rows=2))
    with pytest.raises(UserError, match="3 x 4 codes"):
        release.save(small, tokenizers, tmp_path / "release", GRID)
    assert list(tmp_path.iterdir()) == []
