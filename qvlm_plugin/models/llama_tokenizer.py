"""Llama's sentencepiece tokenizer as LLaVA uses it, as a fast tokenizer.

LLaVA tokenizes the text on each side of an image separately. With ``legacy`` (in ``tokenizer_config.json``, true by
default), sentencepiece puts a blank before each piece between special tokens; without it, transformers' tokenizer puts
one only before each text that it is given. A fast tokenizer does the former if its normalizer prepends the blank. It
cannot do the latter, because it treats an image like any other special token. It then puts the blank before the whole
text only, and the chat template writes the others (`qvlm_plugin.models.prompts.PromptStyle`).

The model file is read by sentencepiece's own library, because the Python description of the format needs one particular
version of protobuf.
"""

from pathlib import Path

from pydantic import BaseModel, Field, TypeAdapter
from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import generate_merges

from qvlm_plugin.errors import QVLMError
from qvlm_plugin.reading import one_line, read_json

SENTENCEPIECE_FILE = "tokenizer.model"


class _AddedToken(BaseModel):
    content: str


class LlamaSettings(BaseModel):
    """The tokenizer settings in ``tokenizer_config.json``; the defaults are those of transformers.

    Attributes:
        legacy: whether a blank also follows special tokens.
        add_bos_token: whether a text begins with the beginning-of-sequence token.
        add_eos_token: whether each text ends with the end token; with LLaVA, that on either side of an image.
        added_tokens_decoder: tokens by their ids, including those of the vocabulary.
    """

    legacy: bool | None = None
    add_bos_token: bool = True
    add_eos_token: bool = False
    added_tokens_decoder: dict[int, _AddedToken] = Field(default_factory=dict)

    @property
    def is_legacy(self) -> bool:
        """``legacy``; None, the default, means true, as in transformers."""
        return self.legacy is not False


def read_settings(folder: Path) -> LlamaSettings:
    """The settings of a folder's tokenizer; the defaults if it has none.

    Raises:
        QVLMError: they cannot be read, or are not supported.
    """
    file = folder / "tokenizer_config.json"
    try:
        settings = LlamaSettings.model_validate(read_json(file) if file.is_file() else {})
    except (OSError, ValueError) as error:
        raise QVLMError(f"{file} does not load: {one_line(error)}") from error
    if settings.add_eos_token:
        raise QVLMError(f"{file}: add_eos_token=true would end every text before its answer; it must be false")
    return settings


def llama_tokenizer(folder: Path, settings: LlamaSettings) -> PreTrainedTokenizerFast:
    """The tokenizer of a folder with a sentencepiece model and, optionally, added tokens; padding on the left.

    Raises:
        QVLMError: the model is missing or damaged, or added tokens do not continue its vocabulary.
    """
    file = folder / SENTENCEPIECE_FILE
    if not file.is_file():
        raise QVLMError(f"{folder}: {SENTENCEPIECE_FILE} is missing")
    try:
        pieces = SentencePieceProcessor(model_file=str(file))
    except (OSError, RuntimeError, ValueError) as error:
        raise QVLMError(f"{file} is not a sentencepiece model: {one_line(error)}") from error
    size = len(pieces)
    vocabulary = {pieces.id_to_piece(index): index for index in range(size)}
    scores = {piece: pieces.get_score(index) for piece, index in vocabulary.items()}
    unknown, begin, end = (pieces.id_to_piece(index) for index in (pieces.unk_id(), pieces.bos_id(), pieces.eos_id()))
    merges = generate_merges(vocabulary, scores)
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    if settings.is_legacy:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", left=1)]
    )
    if settings.add_bos_token:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{begin} $A", pair=f"{begin} $A {begin} $B", special_tokens=[(begin, pieces.bos_id())]
        )
    added = _added_tokens(folder, settings, size)
    backend.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in (unknown, begin, end, *added)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token=unknown,
        bos_token=begin,
        eos_token=end,
        pad_token=end,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def _added_tokens(folder: Path, settings: LlamaSettings, size: int) -> list[str]:
    """The tokens that were added to a vocabulary of ``size``, in the order of their ids."""
    file = folder / "added_tokens.json"
    try:
        added = read_json(file) if file.is_file() else {}
        added = TypeAdapter(dict[str, int]).validate_python(added)
    except (OSError, ValueError) as error:
        raise QVLMError(f"{file} does not load: {one_line(error)}") from error
    added |= {token.content: index for index, token in settings.added_tokens_decoder.items()}
    added = dict(sorted(((token, index) for token, index in added.items() if index >= size), key=lambda item: item[1]))
    if list(added.values()) != list(range(size, size + len(added))):
        raise QVLMError(f"{file}: its tokens do not continue the vocabulary of {SENTENCEPIECE_FILE}, which has {size}")
    return list(added)
