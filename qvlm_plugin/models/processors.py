"""Processors of checkpoints in the Hugging Face layout."""

from pathlib import Path

import transformers
from transformers import AutoImageProcessor, AutoProcessor, ProcessorMixin

from qvlm_plugin.models import paligemma


def read_processor(folder: Path, trust_remote_code: bool) -> ProcessorMixin:
    """The processor of a checkpoint. Its pixels do not depend on torchvision, installed or not, in any version."""
    # backend="pil" here would also apply to the video processor, which has no such backend.
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=trust_remote_code)
    images = AutoImageProcessor.from_pretrained(folder, backend="pil", trust_remote_code=trust_remote_code)
    if isinstance(processor, transformers.PaliGemmaProcessor):
        template = processor.chat_template or paligemma.TEMPLATE
        return paligemma.PaliGemmaProcessor(images, processor.tokenizer, chat_template=template)
    processor.image_processor = images
    return processor
