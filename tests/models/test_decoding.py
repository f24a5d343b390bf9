"""Whether decoding can be compiled is known before weights are loaded."""

import pytest
import torch
from family_list import FAMILIES
from transformers import AutoConfig

from qvlm_plugin.errors import QVLMError
from qvlm_plugin.models.decoding import check_compilation

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(scope="module")
def config_of(tmp_path_factory):
    def config_of(family):
        return AutoConfig.from_pretrained(FAMILIES[family](tmp_path_factory.mktemp(family) / "tiny"))

    return config_of


def test_a_cpu_needs_a_compiler(config_of, monkeypatch):
    config = config_of("qwen2.5-vl")
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}" if name == "clang++" else None)
    check_compilation(config, CPU)
    monkeypatch.setenv("CXX", "g++-99")
    with pytest.raises(QVLMError, match=r"compile=true needs a C\+\+ compiler on a CPU: install g\+\+-99, or set CXX"):
        check_compilation(config, CPU)
    check_compilation(config, CUDA)


def test_a_family_that_transformers_does_not_compile(config_of):
    with pytest.raises(QVLMError, match="transformers does not compile PaliGemmaForConditionalGeneration"):
        check_compilation(config_of("paligemma2"), CUDA)
