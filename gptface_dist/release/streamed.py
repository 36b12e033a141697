"""The plain model with weights loaded module by module: run a model of any size in the memory of its largest tensor."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gptface_dist import host
from gptface_dist.model.options import ModelOptions
from gptface_dist.model.plain import Transformer
from gptface_dist.objectives.objective import Objective
from gptface_dist.tokenizers.vocabulary import Vocabulary

WORDS = "embeddings.word.weight"


def streamed_model(
    objective: Objective,
    options: ModelOptions,
    vocabulary: Vocabulary,
    weights: Mapping[str, Tensor],
    done: Callable[[int], None] = lambda values: None,
) -> Transformer:
    """The objective's model in float32 on the CPU, for inference; loads each module's weights before it runs, then frees them.

    Args:
        objective: builds the model.
        options: size and form.
        vocabulary: the joint ids.
        weights: tensors by name, of any floating dtype.
        done: called with the number of values read.
    """
    with torch.device("meta"):
        model = objective.model(options, vocabulary)

    def read(name: str) -> Tensor:
        tensor = weights[name]
        done(tensor.numel())
        return tensor.float()

    for name, module in model.named_modules():
        own = {key: f"{name}.{key}" for key, _ in module.named_parameters(recurse=False)}
        if own:
            module.register_forward_pre_hook(_load(own, read))
            module.register_forward_hook(_free)
    if objective.predicts_tokens:
        # The tied embeddings were freed after their own forward pass: load them again.
        model.token_head.register_forward_pre_hook(lambda _, inputs: (inputs[0], read(WORDS), inputs[2]))
    return model.requires_grad_(False).eval()


def values_read(objective: Objective, options: ModelOptions, vocabulary: Vocabulary) -> int:
    """Number of values that a pass over a reference batch loads: all once; with token logits, embeddings and head again."""
    words = vocabulary.size * options.hidden
    head = options.hidden * (options.hidden + 3) + vocabulary.size
    return objective.parameter_count(options, vocabulary) + (2 * words + head if objective.predicts_tokens else 0)


def _load(own: dict[str, str], read: Callable[[str], Tensor]) -> Callable[[nn.Module, Any], None]:
    def load(module: nn.Module, _: Any) -> None:
        for key, name in own.items():
            module.register_parameter(key, nn.Parameter(read(name), requires_grad=False))

    return load


def _free(module: nn.Module, *_: Any) -> None:
    for key, parameter in module.named_parameters(recurse=False):
        module.register_parameter(key, nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False))
    if isinstance(module, nn.Linear):
        # After the largest tensors: otherwise the process would end up with the memory of the whole model.
        host.trim_host_memory()
