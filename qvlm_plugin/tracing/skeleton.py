"""A model that runs without its weights: its values are random, but each module is called as in the real model.

It takes little memory and time, whatever the size of the model: the rows of every matrix share one row's memory, and a
Linear multiplies by a random matrix of low rank instead. Values are on the CPU, because models branch on some of them
(image sizes, masks, chosen experts), which the meta device does not allow.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from transformers import PretrainedConfig, PreTrainedModel

_RANK = 8
_LARGE = 2**22
"""Parameters of more elements share one row's memory, too, whatever their number of dimensions."""


Build = Callable[[PretrainedConfig], PreTrainedModel]
"""A function that creates a model from a configuration."""


def skeleton(config: PretrainedConfig, build: Build, tokens: int = 0) -> PreTrainedModel:
    """A float32 model on the CPU, in evaluation mode; `RandomProducts` must be active when it runs.

    Norms, biases and convolutions have random values, positive where they scale channels.

    Args:
        config: the model's configuration.
        build: creates the model, in any compute type.
        tokens: number of tokens of its tokenizer; the vocabulary of a configuration in LLaVA's own layout lacks the
            image token until weights are read.
    """
    config = copy.deepcopy(config)
    text = config.get_text_config()
    text.vocab_size = max(text.vocab_size, tokens)
    with init_empty_weights(include_buffers=False):
        model = build(config)
    generator, made = torch.Generator().manual_seed(0), {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter not in made:  # tied ones stay tied
                values = _values(parameter.shape, generator)
                made[parameter] = nn.Parameter(values, requires_grad=False)
            module._parameters[name] = made[parameter]
    return model.eval()


def _values(shape: torch.Size, generator: torch.Generator) -> Tensor:
    if len(shape) < 2:
        return torch.rand(shape, generator=generator) + 0.5
    if len(shape) == 2 or shape.numel() > _LARGE:
        return (torch.randn(shape[-1], generator=generator) * 0.1).expand(shape)
    return torch.randn(shape, generator=generator) * 0.1


class RandomProducts(TorchFunctionMode):
    """While active, the n-th Linear that runs multiplies by the n-th random matrix, and has no bias.

    A run of the same modules on the same inputs gives the same values, and every product is linear in its input.
    """

    def __init__(self) -> None:
        super().__init__()
        self._calls = 0

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Run an operator of torch; a Linear's product is replaced."""
        if func is not functional.linear:
            return func(*args, **(kwargs or {}))
        return self._product(*args, **(kwargs or {}))

    def _product(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        generator = torch.Generator().manual_seed(self._calls)
        self._calls += 1
        outputs, inputs = weight.shape
        into = torch.randn(inputs, _RANK, generator=generator).to(input.dtype) / inputs**0.5
        out_of = torch.randn(_RANK, outputs, generator=generator).to(input.dtype) / _RANK**0.5
        return input @ into @ out_of
