"""Generation arguments of tasks: translated, or refused in one line."""

import pytest

from qvlm_plugin.errors import QVLMError
from qvlm_plugin.harness.generation import read_generation


def read(**given):
    return read_generation(given, 32, "toy", ["###"])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"creativity": 11}, "unknown generation argument creativity; allowed are until, .*max_new_tokens"),
        ({"return_dict_in_generate": True}, "unknown generation argument return_dict_in_generate"),
        ({"pad_token_id": 0}, "unknown generation argument pad_token_id"),
        ({"output_scores": True}, "unknown generation argument output_scores"),
        ({"num_return_sequences": 2}, "num_return_sequences must be 1"),
        ({"until": 5}, "until=5 is neither a text nor a list of texts"),
        ({"stop_strings": ["a", 7]}, "stop_strings=.* is neither a text nor a list of texts"),
        ({"max_new_tokens": "many"}, "max_new_tokens='many' is not allowed: .*integer"),
        ({"max_gen_toks": 0}, "max_new_tokens=0 is not allowed: .*greater"),
        ({"temperature": "hot"}, "temperature='hot' is not allowed"),
        ({"seed": "a"}, "seed='a' is not allowed"),
        ({"max_length": 4}, "max_length includes the prompt and its padding.*; use max_new_tokens"),
        ({"min_length": "4"}, "min_length includes the prompt.*; use min_new_tokens"),
        ({"suppress_tokens": 3}, "suppress_tokens=3 is not allowed: .*list"),
    ],
)
def test_impossible_requests_give_one_line(given, message):
    with pytest.raises(QVLMError, match=f"task toy: .*{message}") as caught:
        read(**given)
    assert "\n" not in str(caught.value)


def test_stop_strings_have_three_names():
    for name in ("until", "stop_sequences", "stop_strings"):
        assert read(**{name: "END"}).stops == read(**{name: ["END", ""]}).stops == ("###", "END")


def test_defaults_aliases_and_ignored_arguments():
    plain = {"max_new_tokens": 32, "do_sample": False}
    assert read().arguments == plain
    assert read(top_p=None, temperature=0, image_aspect_ratio="pad", num_beams="None").arguments == plain
    assert read(max_tokens="16").arguments["max_new_tokens"] == 16
    assert read(num_beams=3, suppress_tokens=(4, 5)).arguments == {**plain, "num_beams": 3, "suppress_tokens": [4, 5]}
    assert read(temperature=0.5, top_p=0.9).arguments == {
        "max_new_tokens": 32, "do_sample": True, "temperature": 0.5, "top_p": 0.9,
    }  # fmt: skip
    assert read(do_sample=False, temperature=0.5).arguments == plain
