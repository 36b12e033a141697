"""The table of parameters: complete, reproducible, and cut so that shards compute what the whole computes."""

import dataclasses
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from gptface_dist.model.options import ModelOptions
from gptface_dist.model.parameters import TensorParallelSharding, initialise
from gptface_dist.model.plain import GPTFace
from gptface_dist.objectives.milm_itm import MilmItm
from gptface_dist.tokenizers.vocabulary import Vocabulary

VOCABULARY = Vocabulary(text_size=43, image_codes=24, text_sha256="a" * 64, image_sha256="b" * 64)
SMALL = ModelOptions(layers=2, hidden=16, heads=4, ffn=24, text_positions=16, rows=3, columns=4)
CONFIGS = Path(__file__).parents[2] / "configs" / "models"


def test_the_table_is_the_model() -> None:
    model = GPTFace(SMALL, VOCABULARY)
    assert [(p.name, p.shape) for p in MilmItm().parameters(SMALL, VOCABULARY)] == [
        (n, tuple(p.shape)) for n, p in model.named_parameters()
    ]


def test_every_parameter_lives_on_some_stage() -> None:
    for parameter in MilmItm().parameters(SMALL, VOCABULARY):
        places = [parameter.layer is not None, parameter.on_first_stage, parameter.on_last_stage]
        assert sum(places) == (2 if parameter.name == "embeddings.word.weight" else 1), parameter.name


def test_initial_values_depend_on_seed_and_name_only() -> None:
    deeper = {p.name: p for p in MilmItm().parameters(dataclasses.replace(SMALL, layers=3), VOCABULARY)}
    for parameter in MilmItm().parameters(SMALL, VOCABULARY):
        again = deeper[parameter.name]
        if parameter.std == again.std:
            assert torch.equal(parameter.initial(1), again.initial(1))
        if parameter.std is not None:
            assert not torch.equal(parameter.initial(1), parameter.initial(2))
    values = [p.initial(0)[:1, :3].tolist() for p in deeper.values() if p.std == SMALL.init_std]
    assert len({str(value) for value in values}) == len(values), "no two parameters start alike"


def test_initial_values_have_their_deviation() -> None:
    big = ModelOptions(layers=8, hidden=256, heads=4, ffn=1024)
    found = {
        p.name: p.initial(0).std().item() for p in MilmItm().parameters(big, VOCABULARY) if p.layer == 3 and p.std is not None
    }
    assert found["layers.3.qkv.weight"] == pytest.approx(0.02, rel=0.02)
    assert found["layers.3.mlp_out.weight"] == pytest.approx(0.02 / 4, rel=0.02)
    model = GPTFace(SMALL, VOCABULARY)
    initialise(model, 0)
    assert model.final_norm.weight.eq(1).all()
    assert model.layers[0].qkv.bias.eq(0).all()


@given(size=st.sampled_from([1, 2, 4, 8]), activation=st.sampled_from(["gelu", "swiglu"]))
def test_joined_shards_are_the_whole(size: int, activation: str) -> None:
    for parameter in MilmItm().parameters(dataclasses.replace(SMALL, activation=activation), VOCABULARY):
        if parameter.sharding is not None:
            whole = torch.randn(parameter.shape)
            shards = [parameter.sharding.shard(whole, rank, size) for rank in range(size)]
            assert {shard.shape[parameter.sharding.axis] for shard in shards} == {
                -(-whole.shape[parameter.sharding.axis] // size)
            }
            assert torch.equal(parameter.sharding.join(shards, parameter.shape), whole)


def test_a_shard_of_heads_is_a_range_of_rows() -> None:
    whole = torch.arange(48).unsqueeze(1)
    assert TensorParallelSharding(0).shard(whole, 1, 2).flatten().tolist() == list(range(24, 48))


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize("size", [2, 4])
def test_sharded_layers_add_up_to_the_whole(activation: str, size: int) -> None:
    """What a tensor-parallel rank computes with its shards, summed over ranks, is the plain layer."""
    options = dataclasses.replace(SMALL, activation=activation)
    model = GPTFace(options, VOCABULARY).double()
    initialise(model, 0)
    layer, table = model.layers[1], {p.name: p for p in MilmItm().parameters(options, VOCABULARY)}
    x = torch.randn(2, 5, 16, dtype=torch.float64)

    def shard(name: str, rank: int) -> torch.Tensor:
        entry, whole = table[f"layers.1.{name}"], model.get_parameter(f"layers.1.{name}")
        return whole if entry.sharding is None else entry.sharding.shard(whole, rank, size)

    mlp = attention = torch.zeros_like(x)
    for rank in range(size):
        inner = F.linear(x, shard("mlp_in.weight", rank), shard("mlp_in.bias", rank))
        if activation == "swiglu":
            gate, up = inner.chunk(2, -1)
            inner = F.silu(gate) * up
        else:
            inner = F.gelu(inner)
        mlp = mlp + F.linear(inner, shard("mlp_out.weight", rank))
        qkv = F.linear(x, shard("qkv.weight", rank), shard("qkv.bias", rank)).view(2, 5, 4 // size, 3, 4)
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(3))
        heads = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(2, 5, -1)
        attention = attention + F.linear(heads, shard("out_proj.weight", rank))
    seen = torch.ones(2, 1, 1, 5, dtype=torch.bool)
    assert torch.allclose(mlp + layer.mlp_out.bias, layer.mlp_out(layer._activate(layer.mlp_in(x))))
    assert torch.allclose(attention + layer.out_proj.bias, layer.out_proj(layer._attend(x, seen)))


@pytest.mark.parametrize(
    ("name", "millions"),
    [("tiny", 5.1), ("base", 111.8), ("400m", 388.9), ("1b", 1083.6), ("3b", 3066.4), ("8b", 8224.9), ("20b", 20214.5)],
)
def test_the_ladder_has_the_sizes_it_is_named_after(name: str, millions: float) -> None:
    """With 32,000 pieces of text and 1,024 codes."""
    options = ModelOptions(**OmegaConf.load(CONFIGS / f"{name}.yaml"))
    vocabulary = dataclasses.replace(VOCABULARY, text_size=32000, image_codes=1024)
    assert MilmItm().parameter_count(options, vocabulary) / 1e6 == pytest.approx(millions, abs=0.05)
    hidden, ffn = options.hidden, options.ffn
    by_hand = options.layers * (4 * hidden * hidden + 2 * hidden * ffn + 3 * hidden + hidden + ffn + hidden + 4 * hidden)
    by_hand += hidden * (33028 + 3 + 128 + 32 + 32) + 2 * hidden
    by_hand += hidden * hidden + hidden + 2 * hidden + 33028 + hidden * hidden + hidden + 2 * hidden + 2
    assert MilmItm().parameter_count(options, vocabulary) == by_hand
    assert options.head_size in (32, 64, 128)
    assert {path.stem for path in CONFIGS.glob("*.yaml")} >= {name}
