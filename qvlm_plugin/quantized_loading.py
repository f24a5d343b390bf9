"""Quantize a model while its weights are read: at most one Linear is in full precision at a time.

transformers passes every weight that it reads to a quantizer, one after another; this quantizer applies a rounding
plan. The result equals that of `plan.apply_plan` on the loaded model.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from qvlm_plugin.kernels.base import Kernel
from qvlm_plugin.kernels.selection import Execution
from qvlm_plugin.linear import QuantLinear
from qvlm_plugin.memory import trim_heap
from qvlm_plugin.plan import (
    RoundingPlan,
    check_plan,
    put_layer,
    quantized_linear,
    replace_and_fold,
    share_within_sites,
)

_METHOD = "qvlm-plan"


class QuantizeOnLoad(QuantizationConfigMixin):
    """How `models.loading.load` quantizes the weights that it reads.

    Attributes:
        plan: a plan for the model.
        kernels, strict: see `check_plan`.
        execution: which kernel runs which module; known once the model is loaded.
    """

    execution: Execution

    def __init__(self, plan: RoundingPlan, kernels: tuple[Kernel, ...], strict: bool = False) -> None:
        """Store how to quantize."""
        self.plan, self.kernels, self.strict = plan, kernels, strict
        self.fingerprint, self.device = "", torch.device("cpu")
        self.quant_method = _METHOD

    def __deepcopy__(self, memo: dict[int, Any]) -> "QuantizeOnLoad":
        return self  # transformers copies the configuration that carries it

    def to_dict(self) -> dict[str, Any]:
        """The configuration for transformers' messages; it is never saved."""
        return {"quant_method": self.quant_method}


class _Quantizer(HfQuantizer):
    def __init__(self, quantization_config: QuantizeOnLoad, **options: Any) -> None:
        super().__init__(quantization_config, **options)
        self.layers: dict[str, QuantLinear] = {}
        self.waiting = {module.name: module for module in quantization_config.plan.quantized}

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **more: Any) -> None:
        config = self.quantization_config
        with _usual_defaults():
            config.execution = check_plan(
                config.plan, model, config.fingerprint, config.kernels, config.strict, config.device
            )

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **more: Any) -> bool:
        owner, _, parameter = param_name.rpartition(".")
        return parameter == "weight" and owner in self.waiting

    def get_quantize_ops(self) -> ConversionOps:
        return _Quantize(self)

    def quantize(self, model: PreTrainedModel, name: str, weight: Tensor) -> None:
        """Create the replacement of a Linear whose weight has been read; its bias was read before."""
        config, linear = self.quantization_config, model.get_submodule(name)
        linear.weight = nn.Parameter(weight, requires_grad=False)
        replace_and_fold(config.plan, {name: linear})
        module, kernel = self.waiting[name], config.execution.choices[name].kernel
        self.layers[name] = quantized_linear(
            module, linear, config.plan.tensors, kernel, config.plan.rotation_of(module)
        )
        # The Linear stays until loading is over, because transformers checks its weight once more.
        linear.weight = nn.Parameter(weight.new_empty(0), requires_grad=False)
        linear.weight._is_hf_initialized = True
        trim_heap()

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **more: Any) -> PreTrainedModel:
        for name, layer in self.layers.items():
            put_layer(model, name, layer)
        share_within_sites(self.quantization_config.plan.quantized, model)
        replace_and_fold(
            self.quantization_config.plan, {n: m for n, m in model.named_modules() if n not in self.layers}
        )
        self.remove_quantization_config(model)
        return model

    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return False


@contextmanager
def _usual_defaults() -> Iterator[None]:
    """A context in which tensors are created on the CPU in float32, as outside of transformers' `from_pretrained`."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(dtype)


class _Quantize(ConversionOps):
    def __init__(self, quantizer: _Quantizer) -> None:
        self.quantizer = quantizer

    def convert(
        self,
        input_dict: dict[str, Any],
        model: PreTrainedModel,
        full_layer_name: str,
        missing_keys: set[str],
        **more: Any,
    ) -> dict[str, Tensor]:
        (weight,) = input_dict.values()
        self.quantizer.quantize(
            model, full_layer_name.removesuffix(".weight"), weight[0] if isinstance(weight, list) else weight
        )
        missing_keys.discard(full_layer_name)
        return {}


AUTO_QUANTIZER_MAPPING.setdefault(_METHOD, _Quantizer)
