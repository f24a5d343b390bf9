"""Checkpoints that other programs quantized, through the harness's model."""

import pytest
from harness.test_wrapper import ask, texts
from models.test_pre_quantized import compressed, ignored_names
from tiny_llava import random_image, write_tiny_llava

from qvlm_plugin.errors import QVLMError
from qvlm_plugin.harness.wrapper import QVLMChat


def test_other_programs_checkpoints_run_with_their_known_facts(tmp_path):
    names = ignored_names(write_tiny_llava(tmp_path / "source", hidden=64), "model.")
    folder, rounded = compressed(write_tiny_llava(tmp_path / "x", hidden=64), names)
    model = QVLMChat(pretrained=str(folder), dtype="float32", device="cpu", batch_size=2)
    docs = [{"text": f"what is {index}?", "images": [random_image(index)]} for index in range(3)]
    assert any(texts(model.generate_until(ask(model, docs, max_new_tokens=6))))
    found = model.record.report({})
    assert (found["method"], found["backend"]) == ("compressed-tensors checkpoint", "compressed-tensors")
    assert found["kernels"] == {"compressed-tensors, dequantized": len(rounded)} and found["fallbacks"] == 0
    assert found["calibration"]["source"] == "unknown" and found["calibration"]["documents_compared"] is None
    assert found["plan_hash"] == found["model_fingerprint"] and found["bits"]["decoder"]["weight"] == 5
    with pytest.raises(QVLMError, match=r"is a quantized checkpoint .* cannot be combined with method, scheme"):
        QVLMChat(pretrained=str(folder), device="cpu", method="rtn", scheme="w4a4")
