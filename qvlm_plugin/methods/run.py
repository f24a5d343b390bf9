"""Run a method's steps one after the other, each adding to the draft."""

import gc
from dataclasses import replace

import torch
from rich.console import Console

from qvlm_plugin.errors import QVLMError
from qvlm_plugin.methods.base import Method, Step
from qvlm_plugin.methods.context import SearchContext
from qvlm_plugin.methods.draft import Draft, build_plan
from qvlm_plugin.plan import RoundingPlan
from qvlm_plugin.reading import one_line
from qvlm_plugin.scheme import Scheme

IDENTITY = Scheme.parse("w16a16")


def fit(method: Method, context: SearchContext) -> RoundingPlan:
    """Search the plan of a method.

    The workspace keeps the draft after each step, from which an interrupted search resumes. A step that runs out of
    device memory restarts with a smaller `Footprint`, which does not change its result.

    Raises:
        QVLMError: a step's check or the step itself fails, or memory does not suffice for the smallest footprint.
    """
    if not method.steps:
        return build_plan(replace(context, scheme=IDENTITY, calibration=None), Draft())
    steps = method.chosen(context.scheme, context.options)
    for step in steps:
        if step.check is not None:
            step.check(context)
    draft, done = Draft(), 0
    if (kept := context.recalled("draft")) is not None:
        data, tensors = kept
        draft, done = Draft.restored(data["draft"], tensors), data["done"]
    for index, step in enumerate(steps[done:], done + 1):
        draft = _run(step, context, draft)
        data, tensors = draft.stored()
        context.workspace.keep("draft", {"draft": data, "done": index}, tensors)
    return build_plan(context, draft)


def _run(step: Step, context: SearchContext, draft: Draft) -> Draft:
    """The draft after a step, run with the largest footprint that fits into memory."""
    while True:
        try:
            with context.shard.together():
                return step.run(context, draft)
        except torch.OutOfMemoryError as error:
            reason = one_line(error)
        # The exception refers to the step's tensors, so their memory can be freed only outside the handler.
        gc.collect()
        torch.cuda.empty_cache()
        smaller = context.footprint.smaller(context.options.calibration_batch_size if step.splits else 1)
        if smaller is None:
            raise QVLMError(
                f"method={context.method} ran out of memory in step {step.name} with {context.footprint}; search on a "
                "larger device, with dtype=float16, with qvlm search --device_map offload, or with a smaller "
                f"calibration_batch_size, which finds another plan: {reason}"
            )
        Console(stderr=True).print(
            f"out of memory in step {step.name}: trying again with {smaller}", markup=False, soft_wrap=True
        )
        context = replace(context, footprint=smaller)
