"""The plain model with weights that come when needed: what a model of any size computes, in the memory of one tensor."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gptface_dist import host
from gptface_dist.model.options import ModelOptions
from gptface_dist.model.parameters import count
from gptface_dist.model.plain import GPTFace
from gptface_dist.tokenizers.vocabulary import Vocabulary


class StreamedGPTFace(GPTFace):
    """GPTFace in float32 on the CPU, for inference; each module's weights are asked for before it runs and let go after.

    Args:
        options: size and form.
        vocabulary: the joint ids.
        held: weights by name, of any floating dtype.
        done: is told of the values read.
    """

    def __init__(
        self,
        options: ModelOptions,
        vocabulary: Vocabulary,
        held: Mapping[str, Tensor],
        done: Callable[[int], None] = lambda values: None,
    ):
        with torch.device("meta"):
            super().__init__(options, vocabulary)
        self._held, self._done = held, done
        for name, module in self.named_modules():
            own = {key: f"{name}.{key}" for key, _ in module.named_parameters(recurse=False)}
            if own:
                module.register_forward_pre_hook(self._bring(own))
                module.register_forward_hook(_drop)
        self.requires_grad_(False).eval()

    @staticmethod
    def reads(options: ModelOptions, vocabulary: Vocabulary) -> int:
        """Values that a pass over a probe reads: all; the words again for text and for images, the token head for images."""
        words = vocabulary.size * options.hidden
        head = options.hidden * (options.hidden + 3) + vocabulary.size
        return count(options, vocabulary) + 2 * words + head

    def token_logits(self, x_MH: Tensor, ids: range) -> Tensor:
        """As the plain model's; the embeddings that it ties are read again."""
        return self.token_head(x_MH, self._read("embeddings.word.weight"), ids)

    def _bring(self, own: dict[str, str]) -> Callable[[nn.Module, Any], None]:
        def bring(module: nn.Module, _: Any) -> None:
            for key, name in own.items():
                module.register_parameter(key, nn.Parameter(self._read(name), requires_grad=False))

        return bring

    def _read(self, name: str) -> Tensor:
        tensor = self._held[name]
        self._done(tensor.numel())
        return tensor.float()


def _drop(module: nn.Module, *_: Any) -> None:
    for key, parameter in module.named_parameters(recurse=False):
        module.register_parameter(key, nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False))
    if isinstance(module, nn.Linear):
        # The largest ones: otherwise the process would keep the room of the whole model in the end.
        host.give_back()
