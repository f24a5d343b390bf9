"""``qvlm search``: search a plan without an evaluation."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from qvlm_plugin.commands.processes import device_of_process, run_together
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
)


def search(
    output: Annotated[Path, typer.Argument(help="Folder to write the plan to.")],
    pretrained: Pretrained,
    method: Annotated[str, typer.Option(help="Quantization method; see `qvlm methods`.")] = "qlora",
    scheme: OneScheme = "w4a4",
    calibration: Source = "scienceqa:train:64",
    images: Images = None,
    option: MethodOptions = None,
    seed: Seed = 0,
    revision: Revision = None,
    conv: Conv = None,
    router_noise_seed: RouterNoiseSeed = None,
    image_aspect_ratio: ImageAspectRatio = None,
    topology: Topology = "described",
    dtype: Dtype = "auto",
    device: Device = None,
    device_map: Annotated[
        str | None,
        typer.Option(
            help="offload: keep weights on the CPU and bring one block at a time to the device, for models that do not "
            "fit. Or a value of accelerate, such as auto; default: one device."
        ),
    ] = None,
    processes: Annotated[
        int, typer.Option(min=1, help="Processes that share the search; each needs a GPU that holds the model.")
    ] = 1,
) -> None:
    """Search a rounding plan and write it, without running an evaluation.

    The same command resumes an interrupted search, and takes a plan from the cache if it was searched before. Several
    processes share the samples and find the same plan as one process; on several machines, start them with torchrun.

    Example: qvlm search plans/qlora-w4a4 --pretrained llava-hf/llava-1.5-7b-hf --method qlora --scheme w4a4
    --calibration llava_mix.json:64 --images images/ --device cuda
    """
    from qvlm_plugin.methods.shard import join_processes
    from qvlm_plugin.plan import require_plan_folder
    from qvlm_plugin.plan_request import check_request

    request = check_request(method, scheme, pairs(option))
    require_plan_folder(output)
    checkpoint = opened(
        pretrained, dtype, device, topology, revision=revision, conv=conv, router_noise_seed=router_noise_seed,
        image_aspect_ratio=image_aspect_ratio,
    )  # fmt: skip
    shard = join_processes()
    if processes > 1 and shard.count == 1:
        raise typer.Exit(run_together(processes, sys.argv[1:]))
    placement = {"dtype": dtype, "device": device_of_process(device, shard.count), "device_map": device_map}
    _, plans = obtain_plans({method: request}, calibration, images, seed, checkpoint, shard=shard, **placement)
    if shard.rank == 0:
        typer.echo(plans[method].save(output))
