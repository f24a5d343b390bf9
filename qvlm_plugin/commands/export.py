"""``qvlm export``: write a quantized checkpoint."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qvlm_plugin.commands.shared import (
    Conv,
    Device,
    Dtype,
    ImageAspectRatio,
    Images,
    MethodOptions,
    OneScheme,
    Pretrained,
    Revision,
    RouterNoiseSeed,
    Seed,
    Source,
    Topology,
    obtain_plans,
    opened,
    pairs,
    parse_size,
)
from qvlm_plugin.errors import QVLMError

if TYPE_CHECKING:
    from qvlm_plugin.plan import RoundingPlan
    from qvlm_plugin.report.results import Score


class Format(StrEnum):
    """Format of the exported folder."""

    QVLM = "qvlm"
    COMPRESSED_TENSORS = "compressed-tensors"


def export(
    output: Annotated[Path, typer.Argument(help="New folder to write.")],
    pretrained: Pretrained,
    plan: Annotated[
        Path | None, typer.Option(help="Folder of a saved plan to export, instead of --method and --scheme.")
    ] = None,
    method: Annotated[
        str | None, typer.Option(help="Quantization method to search a plan with; see `qvlm methods`.")
    ] = None,
    scheme: OneScheme = "w4a4",
    calibration: Source = "scienceqa:train:64",
    images: Images = None,
    option: MethodOptions = None,
    seed: Seed = 0,
    format_: Annotated[
        Format, typer.Option("--format", help="qvlm: for this package and transformers; compressed-tensors: for vLLM.")
    ] = Format.QVLM,
    backend: Annotated[
        str,
        typer.Option(
            help="Kernels of the exported model: packed, auto (without kernels that fail their self-test), reference "
            "(simulated), or one kernel's name."
        ),
    ] = "auto",
    strict: Annotated[
        bool,
        typer.Option("--strict", help="Stop with an error if a Linear has no packed kernel, instead of simulating it."),
    ] = False,
    results: Annotated[
        list[Path] | None,
        typer.Option(help="Results files of this plan, or their folders; the model card shows their scores."),
    ] = None,
    push_to_hub: Annotated[
        str | None, typer.Option(help="Hub repository to upload the folder to, as NAME/MODEL.")
    ] = None,
    shard_size: Annotated[str, typer.Option(help="Maximum size of a weight file, such as 5GB.")] = "5GB",
    revision: Revision = None,
    conv: Conv = None,
    router_noise_seed: RouterNoiseSeed = None,
    image_aspect_ratio: ImageAspectRatio = None,
    topology: Topology = "described",
    dtype: Dtype = "auto",
    device: Device = None,
) -> None:
    """Write a quantized model as a folder in the Hugging Face layout; prints the folder last.

    After import qvlm_plugin, from_pretrained loads the folder with packed weights; lmms-eval runs it as pretrained=DIR.
    Without this package, loading it is an error. README.md in the folder is its model card.
    --format compressed-tensors allows the schemes w4a16, w8a16, w4a8 and w8a8, and rounds the activations of the last
    two per token.

    Example: qvlm export llava-w4a16 --pretrained llava-hf/llava-1.5-7b-hf --method rtn --scheme w4a16
    """
    from qvlm_plugin import backends, planning
    from qvlm_plugin.atomic import require_vacant
    from qvlm_plugin.export import export as write
    from qvlm_plugin.models.hub import create_repository, upload
    from qvlm_plugin.models.loading import load_weights
    from qvlm_plugin.plan import RoundingPlan
    from qvlm_plugin.plan_request import check_request
    from qvlm_plugin.report.card_scores import add_evaluation
    from qvlm_plugin.report.results import read_results

    if (plan is None) == (method is None):
        raise QVLMError("give either --plan DIR (a saved plan) or --method NAME (to search one now)")
    require_vacant(output)
    largest = round(parse_size(shard_size, "--shard-size"))
    scores = read_results(results) if results else []
    backends.kernels(backend)
    if format_ is Format.COMPRESSED_TENSORS:
        try:
            from qvlm_plugin.compressed_tensors import check_compressible, export_compressed_tensors
        except ImportError as error:
            raise QVLMError(
                f"{error}; --format compressed-tensors needs: pip install 'qvlm_plugin[compressed-tensors]'"
            ) from error
    exported = None if plan is None else RoundingPlan.load(plan)
    request = check_request(method, scheme, pairs(option)) if exported is None else None
    if request is not None and format_ is Format.COMPRESSED_TENSORS:
        check_compressible(request)
    checkpoint = opened(
        pretrained, dtype, device, topology if exported is None else None, revision=revision, conv=conv,
        router_noise_seed=router_noise_seed, image_aspect_ratio=image_aspect_ratio,
    )  # fmt: skip
    if push_to_hub is not None:
        create_repository(push_to_hub)
    if exported is not None:
        own_scores = _of_plan(scores, exported)
        loaded = load_weights(checkpoint, dtype=dtype, device=device)
    else:
        loaded, plans = obtain_plans(
            {method: request}, calibration, images, seed, checkpoint, dtype=dtype, device=device
        )
        exported = plans[method]
        own_scores = _of_plan(scores, exported)
    if warning := planning.prompt_warning(exported.calibration and exported.calibration.conv, loaded):
        typer.echo(warning, err=True)
    if format_ is Format.QVLM:
        typer.echo(write(exported, loaded, output, backend=backend, strict=strict, shard_size=largest))
    else:
        counts = export_compressed_tensors(exported, loaded, output, shard_size=largest)
        typer.echo(f"quantized Linear layers by format: {', '.join(f'{group} {n}' for group, n in counts.items())}")
        if any(group.rounds_tokens for group in counts):
            typer.echo("activations are rounded per token to symmetric codes of 8 bits, not with the plan's ranges")
    if own_scores:
        add_evaluation(output, own_scores)
    if push_to_hub is not None:
        typer.echo(upload(output, push_to_hub))
    typer.echo(output)


def _of_plan(scores: "list[Score]", plan: "RoundingPlan") -> "list[Score]":
    """The scores of the plan's runs."""
    found = [score for score in scores if (score.run or {}).get("plan_hash") == plan.hash]
    if scores and not found:
        raise QVLMError(f"--results: none of the runs used the exported plan ({plan.hash[:16]}…)")
    return found
