"""The tokenizer against tiktoken itself, with the published pattern, special tokens and first special id."""

import base64
import random

import pytest
import tiktoken
from moe_llava import write_arcade100k

from qvlm_plugin.errors import QVLMError
from qvlm_plugin.models.arcade100k import SPECIAL_TOKENS, arcade100k_tokenizer

PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    file = tmp_path_factory.mktemp("arcade") / "arcade100k.tiktoken"
    write_arcade100k(file)
    lines = [line.split() for line in file.read_text().splitlines()]
    ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    specials = {token: len(ranks) + 1 + index for index, token in enumerate(SPECIAL_TOKENS)}
    reference = tiktoken.Encoding("arcade", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=specials)
    return arcade100k_tokenizer(file), reference


def test_ids_are_tiktokens(both):
    ours, reference = both
    generator = random.Random(0)
    words = [
        "What",
        " is",
        " this",
        "the",
        "ASSISTANT",
        ":",
        "it's",
        "1234",
        "\n",
        "  ",
        "é",
        "😀",
        "<|endoftext|>",
        "\t?!",
    ]
    texts = ["", "USER: \nWhat is this? ASSISTANT: red<|endoftext|>"]
    texts += ["".join(generator.choices(words, k=12)) for _ in range(200)]
    for text in texts:
        assert ours(text).input_ids == reference.encode(text, allowed_special="all"), text
        assert ours.decode(ours(text).input_ids) == text


def test_the_special_tokens_leave_out_one_id_and_the_end_token_is_the_first(both):
    ours, reference = both
    ranks = reference.eot_token - 1
    assert ours.eos_token == "<|endoftext|>" and ours.eos_token_id == ranks + 1
    assert len(SPECIAL_TOKENS) == 32 and len(ours) == ranks + 33  # 100,256 ranks make 100,289 tokens
    assert ours.convert_tokens_to_ids("<|endofprompt|>") == ranks + 1 + 19


@pytest.mark.parametrize("content", ["not base64 !\n", "aGk= 7\n", "aGk=\n"])
def test_other_files_are_refused(tmp_path, content):
    (tmp_path / "arcade100k.tiktoken").write_text(content)
    with pytest.raises(QVLMError, match=r"arcade100k\.tiktoken"):
        arcade100k_tokenizer(tmp_path / "arcade100k.tiktoken")
