"""The demo model as others' libraries quantize it: folders that they write, evaluated through the harness.

All round the decoder's weights in groups of 64, except W8A8, which has a scale for each output channel and each token.
llm-compressor and GPTQModel calibrate on the samples of `peers.py`, pictures included; auto-round and bitsandbytes
round to nearest. The libraries write in an environment of their own. The harness reads in this package's, with what
the formats take; gptqmodel asks for a protobuf that lmms-eval's wandb does not allow, so it has to be overridden:

python benchmarks/peers.py samples others                    # in a folder with the stand-in data (`qvlm demo data .`)
uv venv others-env
uv pip install --python others-env/bin/python llmcompressor==0.14.0.1 auto-round bitsandbytes gptqmodel
others-env/bin/python benchmarks/others.py write others "$(qvlm demo build | tail -1)"      # skips what is there
echo 'protobuf>=7.36' > override.txt
uv pip install --override override.txt --editable 'CHECKOUT[test,gptq,auto-round]'        # this repository's folder
python benchmarks/others.py table others                     # resumes
"""

import argparse
import json
import os
import shutil
import sys
import traceback
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

GROUP = 64
LEFT = ("lm_head", "vision_tower", "multi_modal_projector")
"""Parts of names of what stays in full precision."""


def write(folder: Path, checkpoint: str, names: list[str]) -> None:
    """Write the folders that are not there; a library that fails prints why, and the next one goes on."""
    # transformers would import the benchmark `kernels` instead of the package `kernels`
    sys.path[:] = [one for one in sys.path if Path(one).resolve() != Path(__file__).resolve().parent]
    from transformers import AutoProcessor

    for name in names:
        target, unfinished = folder / name, folder / f"{name}.unfinished"
        if target.exists():
            continue
        shutil.rmtree(unfinished, ignore_errors=True)
        try:
            WRITERS[name](checkpoint, unfinished, folder / "samples.safetensors")
        except Exception:
            traceback.print_exc()
            print(f"{name}: not written", file=sys.stderr)
            continue
        (config,) = unfinished.rglob("config.json")  # auto-round adds a folder of its own
        AutoProcessor.from_pretrained(checkpoint).save_pretrained(config.parent)
        config.parent.rename(target)
        shutil.rmtree(unfinished, ignore_errors=True)


def _model(checkpoint: str, **how: Any) -> Any:
    import torch
    from transformers import LlavaForConditionalGeneration

    return LlavaForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32, **how)


def _samples(file: Path) -> list[dict[str, Any]]:
    from safetensors.torch import load_file

    found: dict[str, dict[str, Any]] = {}
    for name, tensor in load_file(file).items():
        index, _, own = name.partition(".")
        found.setdefault(index, {})[own] = tensor
    return list(found.values())


def _llm_compressor(scheme: str, checkpoint: str, folder: Path, samples: Path) -> None:
    import torch
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import GPTQModifier
    from torch.utils.data import DataLoader
    from transformers import AutoProcessor

    if not torch.cuda.is_available():
        torch.Tensor.pin_memory = lambda self, *_: self  # llm-compressor pins memory even without a GPU
    inputs = None
    if scheme == "w8a8":
        weights = QuantizationArgs(num_bits=8, strategy="channel", symmetric=True)
        inputs = QuantizationArgs(num_bits=8, strategy="token", symmetric=True, dynamic=True)
    else:
        weights = QuantizationArgs(num_bits=4, strategy="group", group_size=GROUP, symmetric=scheme == "w4a16")
    groups = {"all": QuantizationScheme(targets=["Linear"], weights=weights, input_activations=inputs)}
    model = _model(checkpoint)
    oneshot(
        model=model,
        processor=AutoProcessor.from_pretrained(checkpoint),
        dataset=DataLoader(_samples(samples), batch_size=1, collate_fn=lambda batch: batch[0]),
        recipe=[GPTQModifier(config_groups=groups, ignore=[f"re:.*{part}.*" for part in LEFT])],
    )
    model.save_pretrained(folder, save_compressed=True)


def _auto_round(format: str, checkpoint: str, folder: Path, samples: Path) -> None:
    from auto_round import AutoRound
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(checkpoint)
    nearest = {"iters": 0, "disable_opt_rtn": True}  # its calibration set is on a hub
    given = {"tokenizer": processor.tokenizer, "processor": processor, "device_map": "cpu"}
    rounding = AutoRound(_model(checkpoint), scheme="W4A16", group_size=GROUP, **given, **nearest)
    rounding.quantize_and_save(str(folder), format=format)


def _bitsandbytes(checkpoint: str, folder: Path, samples: Path) -> None:
    import torch
    from transformers import BitsAndBytesConfig

    how = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=["lm_head", "model.vision_tower", "model.multi_modal_projector"],
    )
    _model(checkpoint, quantization_config=how).save_pretrained(folder)


def _gptqmodel(dtype: str, how: Mapping[str, Any], checkpoint: str, folder: Path, samples: Path) -> None:
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # its loader wants two, and has one on two cores
    import torch
    from gptqmodel import QuantizeConfig
    from gptqmodel.models.base import BaseQModel
    from transformers import AutoModelForImageTextToText

    class Llava(BaseQModel):
        """GPTQModel has no class for LLaVA."""

        loader = AutoModelForImageTextToText
        pre_lm_head_norm_module = "model.language_model.norm"
        rotary_embedding = "model.language_model.rotary_emb"
        module_tree: ClassVar[list[Any]] = [
            "model",
            "language_model",
            "layers",
            "#",
            {
                "input_layernorm": ("input_layernorm:!",),
                "self_attn": ("q_proj:0", "k_proj:0", "v_proj:0", "o_proj:1"),
                "post_attention_layernorm": ("post_attention_layernorm:!",),
                "mlp": ("gate_proj:0", "up_proj:0", "down_proj:1"),
            },
        ]

        def prepare_dataset(self, calibration_dataset: list[dict[str, Any]], **_: Any) -> list[dict[str, Any]]:
            return calibration_dataset  # with pictures; the base class takes tokens only

    how = QuantizeConfig(bits=4, group_size=GROUP, device="cpu", offload_to_disk=False, **how)
    model = Llava.from_pretrained(checkpoint, quantize_config=how, dtype=getattr(torch, dtype))
    model.quantize(_samples(samples))
    model.save(str(folder))


WRITERS: Mapping[str, Callable[[str, Path, Path], None]] = {
    "llm-compressor-w8a8": partial(_llm_compressor, "w8a8"),
    "llm-compressor-w4a16": partial(_llm_compressor, "w4a16"),
    "llm-compressor-w4a16-asym": partial(_llm_compressor, "w4a16-asym"),
    "auto-round": partial(_auto_round, "auto_round"),
    "auto-round-gptq": partial(_auto_round, "auto_gptq"),
    "auto-round-awq": partial(_auto_round, "auto_awq"),
    "gptqmodel": partial(_gptqmodel, "float32", {}),
    # its packer of AWQ takes no float32
    "gptqmodel-awq": partial(_gptqmodel, "float16", {"method": "awq", "format": "gemm", "sym": False}),
    "bitsandbytes-nf4": _bitsandbytes,
}
"""By the names of folders."""


def table(folder: Path, limit: int, names: list[str]) -> None:
    """Evaluate full precision and the folders that are there, in the current folder with the stand-in data."""
    from qvlm_plugin.demo import TASKS
    from qvlm_plugin.report.results import Grid
    from qvlm_plugin.report.runs import Cell, Setting, last_error, run_cell

    rows = []
    for name in ("demo", *(one for one in names if (folder / one).exists())):
        path = "demo" if name == "demo" else str((folder / name).resolve())
        cell = Cell(name, {"pretrained": path, "dtype": "float32"}, TASKS, limit)
        outcome = run_cell(cell, Setting((folder / "results").resolve(), Path.cwd(), batch_size=16))
        told = "" if name == "demo" else _format(folder / name)
        if outcome.results is None:
            rows.append((name, told, last_error(outcome.log), *[""] * (2 + len(TASKS))))
            continue
        content = json.loads(outcome.results.read_text())
        bits = content["qvlm"]["bits"].get("decoder", {"weight": 16, "activation": 16})
        right = (f"{100 * content['results'][task]['exact_match,none']:.0f}" for task in TASKS)
        widths = f"{bits['weight']:.2f} / {bits['activation']:.0f}"
        rows.append((name, told, "yes", widths, ", ".join(content["qvlm"]["kernels"]), *right))
    print(Grid(("folder", "format", "loaded", "bits", "kernel", *TASKS), tuple(rows)).markdown())


def _format(folder: Path) -> str:
    """As config.json says."""
    found = json.loads((folder / "config.json").read_text())["quantization_config"]
    packed = (
        found.get("packing_format") or found.get("format") or found.get("checkpoint_format") or found.get("version")
    )
    return " ".join(filter(None, (found["quant_method"], packed)))


def main() -> None:
    """Parse the command line and run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("write", "table"):
        commands.add_parser(name).add_argument("folder", type=Path, help="folder of all quantized models")
    commands.choices["write"].add_argument("checkpoint", help="folder of the demo model")
    for one in commands.choices.values():
        one.add_argument(
            "--names",
            nargs="+",
            choices=list(WRITERS),
            default=list(WRITERS),
            help="which models to write or evaluate; default: all",
        )
    commands.choices["table"].add_argument("--limit", type=int, default=50, help="documents of each task")
    asked = parser.parse_args()
    if asked.command == "write":
        write(asked.folder, asked.checkpoint, asked.names)
    else:
        table(asked.folder, asked.limit, asked.names)


if __name__ == "__main__":
    main()
