"""Releases through transformers' auto classes: the same numbers as the plain model's."""

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModel

from gptface_dist import release
from gptface_dist.errors import UserError
from gptface_dist.model.reference_batch import reference_batch
from gptface_dist.release.huggingface import GPTFaceConfig, GPTFaceModel
from gptface_dist.tokenizers.vocabulary import Vocabulary
from tests.release.factories import GRID, make_model


@pytest.fixture(scope="module")
def saved(tokenizers: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "release"
    model = make_model(Vocabulary.load(tokenizers / "vocabulary.json"))
    release.save(model, tokenizers, path, GRID, dtype=torch.bfloat16, shard_bytes=5_000)
    return path


def test_auto_classes_give_the_plain_model(saved: Path) -> None:
    config = AutoConfig.from_pretrained(saved)
    assert isinstance(config, GPTFaceConfig)
    assert config.release == release.load(saved).config
    for dtype in (torch.bfloat16, torch.float32):
        model, info = AutoModel.from_pretrained(saved, dtype=dtype, output_loading_info=True)
        assert isinstance(model, GPTFaceModel)
        # transformers would make up what it does not find.
        assert not any(info.values())
        assert not model.training
        plain = release.load(saved, dtype).model
        for name, parameter in plain.named_parameters():
            assert torch.equal(model.plain.get_parameter(name), parameter)
            assert model.plain.get_parameter(name).dtype == dtype
    batch = reference_batch(plain.vocabulary, GRID, 16)
    inputs = batch.tokens, batch.segments, batch.positions, batch.lengths
    itm_label = torch.tensor([1, 0, 1, 1])
    found = model(*inputs, labels=batch.labels, itm_label=itm_label)
    features = plain(*inputs)
    assert torch.equal(found.last_hidden_state, features)
    assert torch.equal(found.itm_logits, plain.itm_logits(features))
    chosen, ids = batch.recorded(plain.vocabulary.image_range), plain.vocabulary.image_range
    assert found.losses["image"].loss == plain.token_loss(features[chosen], batch.labels[chosen], ids)[0]
    assert found.losses["image"].items == int(chosen.sum())
    itm = torch.nn.functional.cross_entropy(plain.itm_logits(features).float(), itm_label, reduction="sum")
    assert found.losses["itm"].loss == itm
    assert model(*inputs).losses is None


def test_what_transformers_saves_comes_back(saved: Path, tmp_path: Path) -> None:
    model = AutoModel.from_pretrained(saved)
    with torch.no_grad():
        model.plain.final_norm.bias.add_(1)
    model.save_pretrained(tmp_path / "tuned")
    again = AutoModel.from_pretrained(tmp_path / "tuned")
    for name, parameter in model.named_parameters():
        assert torch.equal(again.get_parameter(name), parameter)
    # A folder without tokenizers and manifest is no release, and says so.
    with pytest.raises(UserError, match=r"holds no manifest.json"):
        release.load(tmp_path / "tuned")


def test_a_configuration_of_another_format_is_refused() -> None:
    with pytest.raises(UserError, match="has the format 'gptface-release-9'"):
        _ = GPTFaceConfig(format="gptface-release-9").release
