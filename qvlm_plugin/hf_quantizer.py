"""The transformers quantizer of quantized checkpoints: with it, ``from_pretrained`` of an exported folder loads packed.

The module registers itself in transformers' tables. `registration` imports it while transformers is still being
imported, so functions that run later import whatever needs more of transformers.
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.quantizers.base import HfQuantizer
from transformers.utils.logging import get_logger
from transformers.utils.quantization_config import QuantizationConfigMixin

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel

    from qvlm_plugin.checkpoint import CheckpointRecord
    from qvlm_plugin.kernels.selection import Execution

QUANT_METHOD = "qvlm"
"""The ``quant_method`` of the ``quantization_config`` in config.json."""

logger = get_logger(__name__)


class QVLMQuantizationConfig(QuantizationConfigMixin):
    """The ``quantization_config`` of an exported folder, unparsed; `checkpoint.CheckpointRecord` validates it."""

    def __init__(self, **content: Any) -> None:
        """Keep the whole content of the JSON object, including keys of other versions."""
        self.__dict__.update(content)
        self.quant_method = QUANT_METHOD


class QVLMHfQuantizer(HfQuantizer):
    """Replaces the Linears that a checkpoint has quantized by packed ones.

    Attributes:
        record: the validated ``quantization_config``.
        wanted: dtypes of the parameters that are not packed, as requested by ``dtype=``.
        execution: which kernel runs which module; set after the weights are loaded.
    """

    record: "CheckpointRecord"
    wanted: "dict[str, torch.dtype]"
    execution: "Execution"

    def __init__(self, quantization_config: QVLMQuantizationConfig, **options: Any) -> None:
        """Read the configuration.

        Raises:
            QVLMError: a newer version wrote it, or it is altered.
        """
        from qvlm_plugin.checkpoint import CheckpointRecord

        super().__init__(quantization_config, **options)
        self.record = CheckpointRecord.read(quantization_config.to_dict())

    def update_attn_implementation(self, config: "PretrainedConfig") -> "PretrainedConfig":
        """Remove the entry that makes loading fail without this package, before transformers looks for the weights."""
        from qvlm_plugin.checkpoint import NOTICE, NOTICE_KEY

        if getattr(config, NOTICE_KEY, None) == NOTICE:
            delattr(config, NOTICE_KEY)
        return config

    def _process_model_before_weight_loading(
        self, model: "PreTrainedModel", checkpoint_files: list[str] | None = None, **more: Any
    ) -> None:
        from qvlm_plugin.checkpoint import lay_out, types_of_others, verify_files

        if checkpoint_files:
            verify_files(self.record, Path(checkpoint_files[0]).parent)
        lay_out(self.record, model)
        self.wanted = types_of_others(self.record, model)

    def _process_model_after_weight_loading(self, model: "PreTrainedModel", **more: Any) -> "PreTrainedModel":
        from qvlm_plugin.checkpoint import pack

        for name, dtype in self.wanted.items():  # transformers 5.18 leaves some in the dtype of the file
            parameter = model.get_parameter(name)
            parameter.data = parameter.data.to(dtype)
        compute_type = next(dtype for dtype in self.wanted.values() if dtype.is_floating_point)
        self.execution = pack(self.record, model, compute_type)
        logger.log(30 if self.execution.fallbacks else 20, "qvlm: %s", self.execution)
        return model

    @property
    def is_compileable(self) -> bool:
        """Packed products are operators that torch.compile supports."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Weights are integer codes."""
        return False

    def is_serializable(self) -> bool:
        """Run-time tensors have the layout of one device; copy the exported folder instead."""
        return False


def quantizer_of(model: "PreTrainedModel") -> QVLMHfQuantizer | None:
    """The quantizer that loaded the model from an exported folder; None for other models."""
    quantizer = getattr(model, "hf_quantizer", None)
    return quantizer if isinstance(quantizer, QVLMHfQuantizer) else None


def _register() -> None:
    tables = import_module("transformers.quantizers.auto")
    tables.AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(QUANT_METHOD, QVLMQuantizationConfig)
    tables.AUTO_QUANTIZER_MAPPING.setdefault(QUANT_METHOD, QVLMHfQuantizer)


_register()
