import pytest

from qvlm_plugin.errors import QVLMError
from qvlm_plugin.scheme import BitWidths, Scheme


def test_one_width_goes_to_every_part():
    scheme = Scheme.parse("w4a4")
    assert scheme.decoder == scheme.vision == scheme.projector == BitWidths(4, 4)


@pytest.mark.parametrize("text", ["w4a4+vision:w8a8+projector:w16a16", "W4A4,vision=w8a8,projector=w16a16"])
def test_overrides_replace_single_parts(text):
    scheme = Scheme.parse(text)
    assert (scheme.decoder, scheme.vision) == (BitWidths(4, 4), BitWidths(8, 8))
    assert scheme.projector.is_identity


@pytest.mark.parametrize("text", ["w4a4", "w2a16", "w4a4+vision:w8a8", "w6a6+projector:w16a16"])
def test_text_survives_a_round_trip(text):
    assert str(Scheme.parse(text)) == text


def test_the_documented_separators_survive_the_harness():
    from lmms_eval.utils import simple_parse_args_string

    parsed = simple_parse_args_string("pretrained=x,scheme=w4a4+vision:w8a8+projector:w16a16,method=rtn")
    assert parsed["scheme"] == "w4a4+vision:w8a8+projector:w16a16"


@pytest.mark.parametrize(
    "text", ["", "4", "w4", "a4w4", "w4a4+", "w4a4+eyes:w8a8", "w4a4+vision", "w4a4+vision:w8a8+vision:w4a4", "w4.5a4"]
)
def test_what_does_not_parse_is_an_error_with_an_example(text):
    with pytest.raises(QVLMError, match="for example w4a4"):
        Scheme.parse(text)


@pytest.mark.parametrize("text", ["w1a4", "w4a9", "w0a0", "w4a4+vision:w17a8", "w32a32"])
def test_widths_out_of_range_are_named(text):
    with pytest.raises(QVLMError, match="allowed are 2 to 8, and 16"):
        Scheme.parse(text)
