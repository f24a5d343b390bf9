"""Records how LLaVA's own code tokenizes random dialogues: the file that `tests/models/test_llava_tokens.py` reads.

It runs LLaVA's ``conversation.py`` and ``mm_utils.py`` (github.com/haotian-liu/LLaVA at c121f04) on the slow Llama
tokenizer of transformers 4.37.2, which want an environment of their own with Python 3.11:

    pip install transformers==4.37.2 sentencepiece protobuf==4.25.3 torch pillow requests safetensors
    python tests/record_llava_tokens.py FOLDER_OF_LLAVA

Each line of the recording is a dialogue: the format's name; the user's and the assistant's texts in turn, each user's
with the number of its images; and the ids with every setting of `SETTINGS`, in which -200 stands for an image.
"""

import gzip
import importlib
import json
import random
import sys
import tempfile
import types
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from original_llava import WORDS, write_sentencepiece, write_tokenizer_files

RECORDING = Path(__file__).parent / "llava_tokens.jsonl.gz"
SETTINGS = [(legacy, between) for legacy in (True, False) for between in (False, True)]
"""``legacy`` of the tokenizer, ``mm_use_im_start_end`` of the model."""
MORE_PIECES = ("▁▁", "▁▁▁▁", "é", "日", "▁é", "s▁")
ADDED = ("<im_patch>", "<im_start>", "<im_end>")
PARTS = (
    *WORDS, "it's", "(A) 3.5", "<3", "<im", "image>", "ab", "é", "日本", "🙂", "▁", "###", "USER:", "\\n", "x=1;",
    "<Image>",
)  # fmt: skip
BETWEEN_PARTS = ("", " ", " ", " ", " ", "  ", "     ", "\n", "\n\n", " \n", "\t")


def random_text(draw, count):
    """A text of some words, with ``count`` places for images among them."""
    parts = draw.choices(PARTS, k=draw.randint(1, 7)) + ["<image>"] * count
    draw.shuffle(parts)
    ends = [draw.choice(BETWEEN_PARTS) if draw.random() < 0.2 else "" for _ in range(2)]
    text = ends[0] + "".join(part + draw.choice(BETWEEN_PARTS) for part in parts[:-1]) + parts[-1] + ends[1]
    return text if text.strip() else "it"


def random_dialogue(draw):
    """A format's name, and user's and assistant's turns: [text, images], text, …"""
    conv = draw.choice(["vicuna_v1", "vicuna_v1", "llava_v1", "llava_v1", "llava_v0", "plain"])
    turns = []
    for index in range(1 if conv == "plain" else draw.choice([1, 1, 1, 2, 3])):
        turns += [random_text(draw, 0)] if index else []
        count = draw.choice([1, 1, 1, 1, 0, 2, 3] if index == 0 else [0, 0, 0, 1])
        kind = draw.choice(["front", "written", "inside"])
        if kind == "written":
            turns.append(["<image>\n" * count + random_text(draw, 0), count])
        else:
            turns.append([random_text(draw, count if kind == "inside" else 0), count])
    return conv, turns


def official_ids(llava, tokenizer, dialogue, between):
    """What LLaVA's code makes of a dialogue; llava/eval/run_llava.py shows how it places images."""
    name, turns = dialogue
    image = "<im_start><image><im_end>" if between else "<image>"
    conversation = llava["conversation"].conv_templates[name].copy()
    for turn in turns:
        if isinstance(turn, str):
            conversation.append_message(conversation.roles[1], turn)
            continue
        text, count = turn
        placed = text.replace("<image>", image) if "<image>" in text else f"{image}\n" * count + text
        conversation.append_message(conversation.roles[0], placed)
    conversation.append_message(conversation.roles[1], None)
    return llava["mm_utils"].tokenizer_image_token(conversation.get_prompt(), tokenizer)


def main(folder, count=600):
    """Record ``count`` dialogues with LLaVA's code in ``folder``."""
    from transformers import LlamaTokenizer

    package = types.ModuleType("llava")
    package.__path__ = [str(Path(folder) / "llava")]  # without the models that its __init__ imports
    sys.modules["llava"] = package
    llava = {name: importlib.import_module(f"llava.{name}") for name in ("conversation", "mm_utils")}
    tokenizers = {}
    for legacy in (True, False):
        with tempfile.TemporaryDirectory() as written:
            vocab = write_sentencepiece(Path(written) / "tokenizer.model", MORE_PIECES) + len(ADDED)
            write_tokenizer_files(Path(written), vocab, ADDED, legacy)
            tokenizers[legacy] = LlamaTokenizer.from_pretrained(written)
    draw = random.Random(18)
    lines = []
    for _ in range(count):
        conv, turns = random_dialogue(draw)
        ids = [official_ids(llava, tokenizers[legacy], (conv, turns), between) for legacy, between in SETTINGS]
        lines.append(json.dumps([conv, turns, ids], ensure_ascii=False, separators=(",", ":")))
    RECORDING.write_bytes(gzip.compress("\n".join(lines).encode(), mtime=0))


if __name__ == "__main__":
    main(sys.argv[1])
