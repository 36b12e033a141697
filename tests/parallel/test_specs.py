"""Packages that are asked for and missing are refused in one line, before anything else happens."""

import sys
from pathlib import Path

import pytest

from gptface_dist.errors import UserError
from gptface_dist.model.options import ModelOptions
from gptface_dist.parallel import specs
from gptface_dist.parallel.layout import Layout
from gptface_dist.parallel.options import EngineOptions

MODEL = ModelOptions(layers=2, hidden=64, heads=4, ffn=96)


def refusal(engine: EngineOptions, model: ModelOptions = MODEL, layout: Layout = Layout()) -> str:  # noqa: B008 (frozen)
    with pytest.raises(UserError) as caught:
        specs.check(engine, model, layout)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose packages are installed; CUDA seems to be there."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(specs.torch.cuda, "is_available", lambda: True)
    for name in ("apex", "amp_C", "transformer_engine"):
        assert name not in sys.modules
    return tmp_path


def make(folder: Path, *parts: str) -> None:
    for part in parts:
        (folder / part).mkdir(parents=True)
        (folder / part / "__init__.py").touch()


def test_what_is_always_there_is_accepted() -> None:
    specs.check(EngineOptions(), MODEL, Layout())


def test_missing_packages_are_named_with_what_to_do(packages: Path) -> None:
    assert "Transformer Engine is not installed: pip install" in refusal(EngineOptions(spec="transformer_engine"))
    assert refusal(EngineOptions(norm="apex")).startswith("engine.norm=apex, but NVIDIA's apex is not installed")
    assert refusal(EngineOptions(optimizer="apex")).endswith("or engine.optimizer=torch")


def test_the_unrelated_apex_is_told_from_nvidias(packages: Path) -> None:
    make(packages, "apex")
    assert "an unrelated package of that name: pip uninstall apex" in refusal(EngineOptions(norm="apex"))
    make(packages, "apex/normalization")
    assert "without its C++ and CUDA extensions" in refusal(EngineOptions(norm="apex"))
    make(packages, "amp_C")
    specs.check(EngineOptions(norm="apex", optimizer="apex"), MODEL, Layout())


def test_without_cuda_there_are_only_torch_and_megatron(packages: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(packages, "transformer_engine")
    specs.check(EngineOptions(spec="transformer_engine"), MODEL, Layout())
    monkeypatch.setattr(specs.torch.cuda, "is_available", lambda: False)
    assert refusal(EngineOptions(spec="transformer_engine")).endswith("need CUDA, which this host has not")


def test_what_fp8_needs(packages: Path) -> None:
    make(packages, "transformer_engine")
    fp8 = EngineOptions(spec="transformer_engine", fp8="hybrid", dtype="bfloat16")
    specs.check(fp8, MODEL, Layout())
    assert specs.megatron_options(fp8)["fp8_recipe"] == "delayed"
    assert "model.ffn / tp to be a multiple of 16, got 24" in refusal(fp8, layout=Layout(tp=4))
    assert "needs engine.spec=transformer_engine" in refusal(EngineOptions(fp8="e4m3", dtype="bfloat16"))
    assert "needs engine.dtype=bfloat16" in refusal(EngineOptions(spec="transformer_engine", fp8="e4m3"))
    layer = EngineOptions(spec="transformer_engine", fp8="e4m3", dtype="bfloat16", recompute="layer")
    assert "use recompute=attention or none" in refusal(layer)


@pytest.mark.parametrize("name", ["dtype", "recompute", "spec", "fp8", "fp8_recipe", "norm", "optimizer"])
def test_unknown_words_are_refused(name: str) -> None:
    with pytest.raises(UserError, match=f"engine.{name} must be one of .*, got 'odd'"):
        EngineOptions(**{name: "odd"})
