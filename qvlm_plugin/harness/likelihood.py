"""Scoring by likelihood: the model's result, and fixes of lmms-eval that it needs.

In lmms-eval 0.7.3 no model can be scored by likelihood, because the evaluator converts every answer to a text. The
multiple-choice scorer also picks the choice with the lowest number: lmms-eval's own models return losses, although the
interface specifies log-probabilities. Both are fixed here for results of this package's models, recognized by type.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from lmms_eval import evaluator
from lmms_eval.api.instance import TokenCounts
from lmms_eval.api.task import ConfigurableTask

from qvlm_plugin.harness.host import takes_losses, wrap_once


class Likelihood(NamedTuple):
    """A continuation's natural log-probability, and whether greedy decoding would produce it."""

    log_probability: float
    is_greedy: bool


def install() -> None:
    """Make lmms-eval score likelihoods. Idempotent."""
    wrap_once(evaluator, "unwrap_generation_output", _keeping_likelihoods)
    wrap_once(ConfigurableTask, "process_results", _scoring_likelihoods)


def _keeping_likelihoods(unwrap: Callable) -> Callable:
    def unwrap_generation_output(output: Any) -> tuple[Any, TokenCounts | None]:
        return (output, None) if isinstance(output, Likelihood) else unwrap(output)

    return unwrap_generation_output


def _scoring_likelihoods(process: Callable) -> Callable:
    by_loss = takes_losses(process)

    def process_results(self: ConfigurableTask, doc: Mapping[str, Any], results: Sequence, **kwargs: Any) -> dict:
        ours = all(isinstance(result, Likelihood) for result in results)
        if ours and not callable(self.config.process_results):
            if self.OUTPUT_TYPE == "loglikelihood":
                (results,) = results
            elif self.OUTPUT_TYPE == "multiple_choice" and by_loss:
                results = [(-result.log_probability, result.is_greedy) for result in results]
        return process(self, doc, results, **kwargs)

    return process_results
