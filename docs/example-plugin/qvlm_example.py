"""A method, a kernel and a model family of another package."""

import torch
import torch.nn.functional as F
from pydantic import Field

from qvlm_plugin.hooks import hookimpl
from qvlm_plugin.kernels.base import Kernel, as_stored, with_parameters
from qvlm_plugin.kernels.reference import quantized_values, round_activation
from qvlm_plugin.methods.base import Method, Step, quantizes_activations
from qvlm_plugin.methods.minmax import observe
from qvlm_plugin.methods.options import MethodOptions
from qvlm_plugin.methods.steps import AWQ, MEANS
from qvlm_plugin.topology import Group, Stack, Topology


class ShrunkOptions(MethodOptions):
    """Options of ``shrunk``: those of every method, and one more."""

    ratio: float = Field(0.9, gt=0, le=1, description="share of the calibrated range that activations keep")


def shrink(context, draft):
    """Ranges of `rtn`, all of them smaller by one ratio."""
    formats, ratio = context.activation_sites, context.options.ratio
    static = [site for site, fmt in formats.items() if fmt.kind == "static_channel"]
    tensors = {f"{site.name}/clip_ratio": torch.tensor([ratio]) for site in formats if site not in static}
    for name, seen in observe(context, static, draft).items():
        tensors[f"{name}/lower"], tensors[f"{name}/upper"] = seen.range(ratio)
    return draft.adding(tensors)


SHRINK = Step("shrink", shrink, lambda scheme, options: quantizes_activations(scheme))
SHRUNK = Method("shrunk", "rtn with ranges made smaller by a ratio", ShrunkOptions, (AWQ, SHRINK, MEANS))


def prepare(weight, bias, weight_format, activation_format, parameters):
    """Rounded weights in half the bytes of float32."""
    rounded = quantized_values(weight, weight_format, parameters).bfloat16()
    return with_parameters({"weight": rounded}, bias, activation_format, parameters)


def forward(x, tensors, activation_format):
    """The product in bfloat16, whatever the model's type."""
    inputs = round_activation(x, activation_format, tensors).bfloat16()
    product = F.linear(inputs, tensors["weight"]).to(x.dtype)
    return product + tensors["bias"].to(x.dtype) if "bias" in tensors else product


BRIEF = Kernel("brief", lambda *problem: None, prepare, as_stored, forward)

ATTENTION_AND_MLP = (
    Group(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), producer="input_layernorm"),
    Group(("self_attn.o_proj",), producer="self_attn.v_proj"),
    Group(("mlp.gate_proj", "mlp.up_proj"), producer="post_attention_layernorm"),
    Group(("mlp.down_proj",), producer="mlp.up_proj"),
)
VISION_BLOCK = ("attn.qkv",), ("attn.proj",), ("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",)
QWEN2_5_VL = Topology(
    vision_path="model.visual", vision=Stack("blocks", tuple(map(Group, VISION_BLOCK))),
    projector_path="model.visual.merger", projector=Stack("", (Group(("mlp.0",)), Group(("mlp.2",)))),
    decoder_path="model.language_model", decoder=Stack("layers", ATTENTION_AND_MLP),
)  # fmt: skip


@hookimpl
def qvlm_methods():
    return [SHRUNK]


@hookimpl
def qvlm_kernels():
    return [BRIEF]


@hookimpl
def qvlm_topology(config):
    return QWEN2_5_VL if config.model_type == "qwen2_5_vl" else None
