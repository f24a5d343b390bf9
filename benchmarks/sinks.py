"""The first tokens of every prompt in full precision, as PrefixQuant (Chen et al., 2024) does for static ranges.

Massive activations of the first token, to which much of the attention goes, widen the static ranges of channels. Here
the ranges of a search are those of the tokens after the first ones, whose keys and values the full-precision model
computes once. Prompts keep their text. The rows `qlora-sinks1` and `qlora-sinks24` of `benchmarks/seeds.py` have it.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from unittest.mock import patch

import torch
from teacher_forced import Question
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from qvlm_plugin.methods import observe
from qvlm_plugin.topology import Site


@dataclass(frozen=True, eq=False)
class FirstTokens:
    """The first tokens of every prompt.

    Attributes:
        ids: the tokens, int64[N].
        cache: their keys and values.
    """

    ids: Tensor
    cache: DynamicCache

    def removed_from(self, question: Question) -> Question:
        """The question without its first tokens.

        Raises:
            ValueError: it begins with other tokens.
        """
        part = "prefix" if question.image is not None else "tail"
        tokens, count = getattr(question, part), len(self.ids)
        if not torch.equal(tokens[:count], self.ids):
            raise ValueError(f"{question.task} {question.id}: the prompt does not begin as others do")
        return replace(question, **{part: tokens[count:]})


@torch.inference_mode()
def first_tokens(model: PreTrainedModel, questions: Sequence[Question], count: int) -> FirstTokens:
    """The first ``count`` tokens of the prompts, computed by ``model``."""
    first = questions[0]
    ids = (first.prefix if first.image is not None else first.tail)[:count]
    cache = DynamicCache(config=model.config.get_text_config())
    model.model(input_ids=ids[None], past_key_values=cache, use_cache=True)
    return FirstTokens(ids, cache)


@contextmanager
def unobserved(count: int) -> Iterator[None]:
    """While active, searches do not observe the first ``count`` tokens of prompts at the inputs of decoder sites.

    This concerns the steps that use `visit_site_inputs`, such as all of `qlora`; others, such as the joint search,
    would still see these tokens.
    """
    watching = observe.watching

    def without_first(
        module: nn.Module, sites: Sequence[Site], attended: Tensor, look: Callable[[Site, Tensor, Tensor], None]
    ) -> AbstractContextManager[None]:
        return watching(module, sites, attended & (attended.cumsum(dim=-1) > count), look)

    with patch.object(observe, "watching", without_first):
        yield
