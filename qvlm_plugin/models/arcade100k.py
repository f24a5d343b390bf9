"""Arcade100k, the tokenizer of StableLM-2: byte-pair ranks in a tiktoken file, and special tokens that code adds.

It is built here as an ordinary fast tokenizer, so that no code of a checkpoint has to run. Every digit is a token.
"""

import base64
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from qvlm_plugin.errors import QVLMError

ARCADE100K_FILE = "arcade100k.tiktoken"
END = "<|endoftext|>"
SPECIAL_TOKENS = (
    END, "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>",
    "<gh_stars>", "<filename>", "<issue_start>", "<issue_comment>", "<issue_closed>", "<jupyter_start>",
    "<jupyter_text>", "<jupyter_code>", "<jupyter_output>", "<empty_output>", "<commit_before>", "<commit_msg>",
    "<commit_after>", "<reponame>", "<|endofprompt|>", "<|im_start|>", "<|im_end|>", "<|pause|>",
    *(f"<|reg{index}|>" for index in range(8)), "<|extra0|>",
)  # fmt: skip
"""Special tokens in the order of their ids; these begin at the number of ranks plus 1, so one id is unused."""

_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def arcade100k_tokenizer(file: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a file of ranks, padding on the left with its end token.

    Raises:
        QVLMError: the file is not a file of ranks.
    """
    try:
        lines = [line.split() for line in file.read_bytes().splitlines() if line]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
    except ValueError as error:
        raise QVLMError(f"{file} is not a tiktoken file of base64 tokens and ranks: {error}") from error
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise QVLMError(f"{file}: its ranks do not count from 0 to {len(ranks) - 1}")
    letters = bytes_to_unicode()
    written = {token: "".join(letters[byte] for byte in token) for token in ranks}
    vocabulary = {written[token]: rank for token, rank in ranks.items()}
    vocabulary["nothing has this id"] = len(ranks)  # no token written this way has a blank
    backend = Tokenizer(models.BPE(vocabulary, _merges(ranks, written), ignore_merges=True))
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=END,
        pad_token=END,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def _merges(ranks: dict[bytes, int], written: dict[bytes, str]) -> list[tuple[str, str]]:
    """Every pair of tokens that forms a token, lowest ranks first: the order in which byte-pair encoding merges."""
    merges = []
    for token in sorted(ranks, key=ranks.__getitem__):
        halves = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        pairs = [(left, right) for left, right in halves if left in ranks and right in ranks]
        merges += sorted(pairs, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
    return [(written[left], written[right]) for left, right in merges]
