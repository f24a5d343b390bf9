"""``qvlm convert``: convert LLaVA's own layout to that of Hugging Face."""

from pathlib import Path
from typing import Annotated

import typer

from qvlm_plugin.commands.shared import Conv, Dtype, ImageAspectRatio, Revision


def convert(
    source: Annotated[str, typer.Argument(help="Checkpoint folder or hub id, in LLaVA's own layout.")],
    output: Annotated[Path, typer.Argument(help="New or empty folder to write to.")],
    revision: Revision = None,
    conv: Conv = None,
    image_aspect_ratio: ImageAspectRatio = None,
    dtype: Dtype = "auto",
) -> None:
    """Convert LLaVA's own layout to that of Hugging Face, with processor and prompt format; prints the folder.

    Only other programs need this: this package reads LLaVA's own layout directly. A plan fits only the folder that it
    was searched for.

    Example: qvlm convert liuhaotian/llava-v1.5-7b llava-v1.5-7b-hf
    """
    from qvlm_plugin.models.converting import convert as convert_checkpoint

    opening = {"revision": revision, "conv": conv, "image_aspect_ratio": image_aspect_ratio}
    typer.echo(convert_checkpoint(source, output, dtype, **opening))
