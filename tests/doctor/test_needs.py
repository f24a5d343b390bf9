from original_llava import write_original_llava

from qvlm_plugin.doctor.needs import Needs, open_skeleton, weight_needs
from qvlm_plugin.models.loading import load
from qvlm_plugin.scheme import Scheme


def test_a_model_needs_the_bytes_of_its_weights(tiny_llava):
    full = 2 * sum(parameter.numel() for parameter in load(str(tiny_llava)).model.parameters())
    skeleton = open_skeleton({"pretrained": str(tiny_llava)})
    assert weight_needs(skeleton, Scheme.parse("w16a16")) == Needs(full, full)
    four, six, eight = (weight_needs(skeleton, Scheme.parse(f"w{bits}a16")) for bits in (4, 6, 8))
    assert four.full == full and four.packed < eight.packed < full
    assert six == eight  # six bits are stored as eight


def test_weights_in_the_original_layout_are_not_read(tmp_path):
    folder = write_original_llava(tmp_path / "m")
    (folder / "pytorch_model.bin").unlink()
    assert weight_needs(open_skeleton({"pretrained": str(folder)}), Scheme.parse("w4a4")).packed > 0
