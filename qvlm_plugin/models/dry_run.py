"""A dry run while a model is loaded: whether it can answer a prompt with an image.

The parts of a checkpoint may not fit together: a processor without a patch size, a tower of another image size, a
template that leaves images out. `check_prompts` finds this in the small files alone, `answer` with the weights.
"""

from inspect import signature

import torch
from PIL import Image
from transformers import BatchFeature, PretrainedConfig, PreTrainedModel, ProcessorMixin

from qvlm_plugin.conversation import Conversation, encode, to_device
from qvlm_plugin.errors import QVLMError
from qvlm_plugin.models.decoding import plain_config
from qvlm_plugin.models.finite import finite
from qvlm_plugin.models.placement import empty_model, execution_device
from qvlm_plugin.reading import parsed_elsewhere


def check_prompts(
    processor: ProcessorMixin, config: PretrainedConfig, source: str, trust_remote_code: bool = False
) -> None:
    """Encode a batch of prompts with and without an image, and compare its image tokens with the tower's features.

    No weight is needed: the features are counted by a model on the meta device. Families that read tensors' values
    cannot run there, so only `answer` checks them.

    Args:
        processor, config: processor and configuration of the checkpoint.
        source: the argument that names the checkpoint, for messages.
        trust_remote_code: run code that comes with the checkpoint.

    Raises:
        QVLMError: prompts cannot be encoded, or do not fit the model.
    """
    _check_files(processor, config, source)
    inputs = _encode(processor, source)
    token = getattr(config, "image_token_id", None)
    count = int((inputs["input_ids"] == token).sum())
    if not count:
        raise QVLMError(
            f"{source}: a prompt with an image has no image token: the chat template writes none, or config.json's "
            f"image_token_index={token} is not that of the tokenizer"
        )
    features = _count_features(inputs, config, source, trust_remote_code)
    if features not in (None, count):
        raise QVLMError(
            f"{source}: the processor writes {count} image tokens, but the vision tower gives {features} features; "
            "its patch_size, image size or vision_feature_select_strategy belongs to another model"
        )


@torch.inference_mode()
def answer(model: PreTrainedModel, processor: ProcessorMixin, source: str) -> None:
    """Generate one token for a prompt with an image and for one without.

    Raises:
        QVLMError: generation fails, or the model's logits are not finite.
    """
    inputs = to_device(_encode(processor, source), execution_device(model), model.dtype)
    settings = {"max_new_tokens": 1, "pad_token_id": processor.tokenizer.pad_token_id}
    own = model.generation_config
    model.generation_config = plain_config(own)
    try:
        with parsed_elsewhere(f"{source}: a prompt with an image cannot be answered"):
            finite(model, lambda: model.generate(**inputs, **settings))
    finally:
        model.generation_config = own


def _check_files(processor: ProcessorMixin, config: PretrainedConfig, source: str) -> None:
    """Check settings that would otherwise cause errors that do not name them."""
    if processor.tokenizer.pad_token is None:
        raise QVLMError(f"{source}: tokenizer_config.json names neither pad_token nor eos_token; batches need one")
    if getattr(processor, "patch_size", 0) is None:
        raise QVLMError(f"{source}: processor_config.json has no patch_size; set it to that of the vision tower")
    layers = getattr(getattr(config, "vision_config", None), "num_hidden_layers", None)
    chosen = getattr(config, "vision_feature_layer", None)
    for index in [] if layers is None or chosen is None else [chosen] if isinstance(chosen, int) else chosen:
        if not -layers - 1 <= index <= layers:  # index 0 means the embeddings
            raise QVLMError(
                f"{source}: config.json's vision_feature_layer={chosen} is outside of the tower's {layers} layers"
            )


def _encode(processor: ProcessorMixin, source: str) -> BatchFeature:
    image = Image.linear_gradient("L").convert("RGB").resize((96, 64))
    prompts = [Conversation.from_prompt("What is shown?", [image]), Conversation.from_prompt("What?")]
    with parsed_elsewhere(f"{source}: a prompt with an image cannot be encoded"):
        return encode(processor, prompts)[0]


def _count_features(inputs: BatchFeature, config: PretrainedConfig, source: str, trust_remote_code: bool) -> int | None:
    """How many features the tower gives for the images of a batch; None if they cannot be counted without weights."""
    with parsed_elsewhere(f"{source}: config.json describes no model that can be built"):
        model = empty_model(config, trust_remote_code)
    if not hasattr(model, "get_image_features"):
        return None
    taken = signature(model.get_image_features).parameters
    values = {
        name: tensor.to("meta", model.dtype) if tensor.is_floating_point() else tensor
        for name, tensor in inputs.items()
        if name in taken
    }
    with parsed_elsewhere(f"{source}: the vision tower does not take the processor's images"):
        try:
            output = model.get_image_features(**values)
        except (RuntimeError, NotImplementedError):
            return None
    features = output.pooler_output
    each = features if isinstance(features, list | tuple) else [features]
    return sum(tensor.numel() // tensor.shape[-1] for tensor in each)
