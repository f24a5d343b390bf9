"""LLaVA's own layout: detected, loaded directly, every key accounted for; against an independent forward pass."""

import json
import pickle
import shutil

import pytest
import torch
import torch.nn.functional as F
from original_llava import VISION, write_original_llava, write_tower
from PIL import Image
from sentencepiece import SentencePieceProcessor
from tiny_llava import random_image
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from qvlm_plugin import plugins
from qvlm_plugin.cli import app
from qvlm_plugin.conversation import Conversation, encode, render
from qvlm_plugin.errors import QVLMError
from qvlm_plugin.models.converting import convert
from qvlm_plugin.models.loading import load
from qvlm_plugin.models.prompts import PROMPT_FORMATS, name_of
from qvlm_plugin.models.weights import read_tensors
from qvlm_plugin.topology import kept_linears, resolve

KINDS = {
    "v1.3": {},
    "v1.3-tower-inside": {"tower_inside": True, "safetensors": True, "shards": 3},
    "v1-between": {"between": True, "added_tokens": ("<im_patch>", "<im_start>", "<im_end>")},
    "v1-between-not-legacy": {
        "between": True,
        "added_tokens": ("<im_patch>", "<im_start>", "<im_end>"),
        "legacy": False,
    },
    "v1.5": {"projector": "mlp2x_gelu", "pads": True, "image_size": 42, "shards": 2},
}


@pytest.fixture(scope="module", params=KINDS)
def original(request, tmp_path_factory):
    return write_original_llava(tmp_path_factory.mktemp("original") / "llava", **KINDS[request.param])


@pytest.fixture
def folder(tmp_path):
    return write_original_llava(tmp_path / "llava")


def raw_weights(folder):
    files = [*folder.glob("*.bin"), *folder.glob("*.safetensors"), *(folder / "tower").glob("*.bin")]
    return {name: tensor.float() for name, tensor in read_tensors(files).items()}


@torch.no_grad()
def published_forward(folder, ids, images):
    """LLaVA as its paper and code define it, on one row of ids in which -200 stands for each image in turn."""
    config, weights = json.loads((folder / "config.json").read_text()), raw_weights(folder)
    size = json.loads((folder / "tower" / "config.json").read_text())["image_size"]
    tower = CLIPVisionModel(CLIPVisionConfig(**VISION, image_size=size)).eval()
    ours = {name.removeprefix("model.vision_tower.vision_tower."): tensor for name, tensor in weights.items()}
    tower.load_state_dict(
        {name.removeprefix("vision_model."): t for name, t in ours.items() if name.startswith("vision_model.")}
    )
    language = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config["vocab_size"],
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=config["num_hidden_layers"],
            num_attention_heads=4,
            num_key_value_heads=2,
            rms_norm_eps=1e-5,
        )
    ).eval()
    own = {n: t for n, t in weights.items() if n.startswith(("model.layers", "model.embed", "model.norm", "lm_head"))}
    language.load_state_dict({name: tensor for name, tensor in own.items() if "inv_freq" not in name})

    pieces, rest = [], list(ids)
    for image in images:
        if config.get("image_aspect_ratio") == "pad":
            side = max(image.size)
            square = Image.new("RGB", (side, side), (122, 116, 104))  # CLIP's mean
            square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
            image = square
        clip = CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
        pixels = clip(images=[image], return_tensors="pt")["pixel_values"]
        hidden = tower(pixels, output_hidden_states=True).hidden_states[-2][0, 1:]
        if "model.mm_projector.weight" in weights:
            features = F.linear(hidden, weights["model.mm_projector.weight"], weights["model.mm_projector.bias"])
        else:
            first, second = ({k: weights[f"model.mm_projector.{i}.{k}"] for k in ("weight", "bias")} for i in (0, 2))
            features = F.linear(F.gelu(F.linear(hidden, **first)), **second)
        cut = rest.index(-200)
        pieces += [F.embedding(torch.tensor(rest[:cut]), weights["model.embed_tokens.weight"]), features]
        rest = rest[cut + 1 :]
    pieces.append(F.embedding(torch.tensor(rest), weights["model.embed_tokens.weight"]))
    return language(inputs_embeds=torch.cat(pieces)[None]).logits[0]


def published_ids(folder, text):
    """LLaVA's tokenizer_image_token: the pieces around the images by themselves, <s> once; -200 for an image."""
    legacy = json.loads((folder / "tokenizer_config.json").read_text())["legacy"]
    pieces = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    added = json.loads((folder / "added_tokens.json").read_text()) if (folder / "added_tokens.json").exists() else {}
    ids = [1]
    for index, chunk in enumerate(text.split("<image>")):
        ids += [-200] if index else []
        for token in ("<im_start>", "<im_end>"):
            chunk = chunk.replace(token, f"\0{token}\0")
        for part in filter(None, chunk.split("\0")):
            if part in added:
                ids.append(added[part])
            else:  # not legacy: the template has written the blanks, and sentencepiece's own stands before the bar
                ids += pieces.encode(part) if legacy else pieces.encode(f"|{part}")[2:]
    return ids


@torch.inference_mode()
@pytest.mark.parametrize("count", [0, 1, 2])
def test_tokens_and_logits_are_those_of_the_published_definition(original, count):
    loaded = load(str(original), dtype="float32")
    images = [random_image(seed, 30).resize((50, 30)) for seed in range(count)]
    conversation = Conversation.from_prompt("What is this?", images)
    inputs, _ = encode(loaded.processor, [conversation])
    ids = published_ids(original, render(loaded.processor, conversation))
    image_token, per_image = loaded.model.config.image_token_id, loaded.model.config.image_seq_length
    expected = [token for one in ids for token in ([image_token] * per_image if one == -200 else [one])]
    assert inputs["input_ids"][0].tolist() == expected
    logits = loaded.model(**inputs).logits[0]
    published = published_forward(original, ids, images)
    assert torch.allclose(logits[:, : published.shape[1]], published, atol=1e-5)


def test_every_weight_is_the_checkpoints_own(original):
    loaded, raw = load(str(original)), raw_weights(original)
    own = {name: tensor.float() for name, tensor in loaded.model.state_dict().items()}
    vocab = json.loads((original / "config.json").read_text())["vocab_size"]
    unused = {name for name in raw if "inv_freq" in name or name.startswith("text_model")}
    sizes = sorted(tensor.numel() for name, tensor in raw.items() if name not in unused)
    linear = "model.mm_projector.weight" in raw
    extra = [32 * 32, 32] if linear else []
    grown = [vocab * 32, vocab * 32]  # embeddings and head have one more row: the image token's
    assert sorted([*sizes, *extra]) == sorted([*(t.numel() for n, t in own.items() if len(t) != vocab + 1), *grown])
    assert len(own["lm_head.weight"]) == vocab + 1
    assert torch.equal(own["lm_head.weight"][:vocab], raw["lm_head.weight"])
    assert loaded.model.config.image_token_id == vocab
    if linear:  # the second Linear is a unit matrix, which no scheme may round
        (kept,) = kept_linears(plugins.topology(loaded.model.config), loaded.model)
        assert kept == "model.multi_modal_projector.linear_2"
        assert torch.equal(own[f"{kept}.weight"], torch.eye(32)) and not own[f"{kept}.bias"].any()
        sites = resolve(plugins.topology(loaded.model.config), loaded.model)
        assert [site.name for site in sites if site.part == "projector"] == ["model.multi_modal_projector.linear_1"]


def test_a_vocabulary_with_spare_rows_is_not_resized(tmp_path):
    spare = ("<im_patch>", "<im_start>", "<im_end>")
    folder = write_original_llava(tmp_path / "m", added_tokens=spare)
    (folder / "added_tokens.json").unlink()  # three rows that no token of the tokenizer has
    loaded = load(str(folder))
    rows = json.loads((folder / "config.json").read_text())["vocab_size"]
    assert len(loaded.model.lm_head.weight) == rows and loaded.model.config.image_token_id == rows - 3


def test_a_tower_in_the_folder_is_used_only_where_it_was_trained(tmp_path):
    """LLaVA loads the tower that is named, over the folder's own, unless unfreeze_mm_vision_tower is set."""
    folder = write_original_llava(tmp_path / "m", tower_inside=True)
    write_tower(folder / "tower", 28, seed=9)
    name = "vision_model.encoder.layers.0.mlp.fc1.weight"
    within = read_tensors([folder / "pytorch_model.bin"])[f"model.vision_tower.vision_tower.{name}"]
    named = read_tensors([folder / "tower" / "pytorch_model.bin"])[name]
    config = json.loads((folder / "config.json").read_text())
    fingerprints = set()
    for unfreeze, expected in ((True, within), (False, named), (None, named)):
        (folder / "config.json").write_text(json.dumps(config | {"unfreeze_mm_vision_tower": unfreeze}))
        loaded = load(str(folder), dtype="float32")
        fingerprints.add(loaded.fingerprint)
        assert torch.equal(loaded.model.model.vision_tower.encoder.layers[0].mlp.fc1.weight, expected)
    assert len(fingerprints) == 3
    (folder / "tower" / "pytorch_model.bin").unlink()
    with pytest.raises(QVLMError, match=r"'tower': missing.*in the folder is used with unfreeze_mm_vision_tower only"):
        load(str(folder))


@pytest.mark.parametrize("place", ["added_tokens.json", "tokenizer_config.json"])
def test_added_tokens_without_embeddings_are_allowed_where_no_prompt_has_them(folder, place):
    """Vicuna's <pad>: LLaVA's loader makes the embeddings longer."""
    plain, values = load(str(folder)), json.loads((folder / "tokenizer_config.json").read_text())
    rows = json.loads((folder / "config.json").read_text())["vocab_size"]
    if place == "added_tokens.json":
        (folder / place).write_text(json.dumps({"<pad>": rows}))
    else:
        (folder / place).write_text(json.dumps({**values, "added_tokens_decoder": {rows: {"content": "<pad>"}}}))
    padded = load(str(folder))
    assert padded.processor.tokenizer.convert_tokens_to_ids("<pad>") == rows
    assert padded.model.config.image_token_id == rows + 1 and len(padded.model.lm_head.weight) == rows + 2
    logits = []
    for loaded in (plain, padded):
        loaded.model.float()
        inputs, _ = encode(loaded.processor, [Conversation.from_prompt("is <pad> it?", [random_image(0)])])
        with torch.inference_mode():
            logits.append(loaded.model(**inputs).logits[:, :, :rows])
    assert torch.equal(*logits)


@pytest.mark.parametrize("longest, context", [(None, 512), (300, 300), (2048, 512)])
def test_the_context_is_the_shorter_of_positions_and_tokenizer_limit(folder, longest, context, tmp_path):
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, "tokenizer_model_max_length": longest}))
    assert load(str(folder)).context == context
    assert load(str(convert(str(folder), tmp_path / "hf"))).context == context


def test_padding_can_be_chosen_and_makes_another_model(tmp_path, loaded):
    folder = write_original_llava(tmp_path / "m", pads=True)
    image = random_image(0, 40).resize((60, 30))
    kinds = {
        None: load(str(folder)),
        **{kind: load(str(folder), image_aspect_ratio=kind) for kind in ("pad", "square")},
    }
    pixels = {
        kind: encode(each.processor, [Conversation.from_prompt("a", [image])])[0]["pixel_values"]
        for kind, each in kinds.items()
    }
    assert torch.equal(pixels[None], pixels["pad"]) and not torch.equal(pixels["pad"], pixels["square"])
    clip = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    assert torch.equal(pixels["square"], clip(images=[image], return_tensors="pt")["pixel_values"])
    assert kinds["square"].fingerprint != kinds[None].fingerprint
    with pytest.raises(QVLMError, match=r"image_aspect_ratio='wide' is not supported .* pad and square"):
        load(str(folder), image_aspect_ratio="wide")
    with pytest.raises(QVLMError, match="image_aspect_ratio is only for checkpoints in LLaVA's own layout"):
        load(loaded.source, image_aspect_ratio="pad")


def test_the_image_processing_is_the_towers(folder):
    settings = {"size": 40, "crop_size": 28, "resample": 2, "image_mean": [0.1, 0.2, 0.3], "do_rescale": True}
    (folder / "tower" / "preprocessor_config.json").write_text(json.dumps(settings))
    image = random_image(0, 50)
    inputs, _ = encode(load(str(folder)).processor, [Conversation.from_prompt("a", [image])])
    own = {"size": {"shortest_edge": 40}, "crop_size": {"height": 28, "width": 28}, "resample": 2}
    expected = CLIPImageProcessorPil(**own, image_mean=[0.1, 0.2, 0.3])(images=[image], return_tensors="pt")
    assert torch.equal(inputs["pixel_values"], expected["pixel_values"])


def test_the_default_type_is_the_checkpoints_and_offloading_works(folder):
    assert load(str(folder), dtype="bfloat16").model.dtype == torch.bfloat16
    plain, offloaded = load(str(folder), dtype="float32"), load(str(folder), dtype="float32", device_map="offload")
    inputs, _ = encode(plain.processor, [Conversation.from_prompt("a", [random_image(0)])])
    with torch.inference_mode():
        assert torch.equal(plain.model(**inputs).logits, offloaded.model(**inputs).logits)
    assert all(parameter.is_meta for parameter in offloaded.model.parameters())


def test_converting_gives_the_same_model_in_the_other_layout(original, tmp_path):
    loaded = load(str(original), dtype="float32")
    converted = load(str(convert(str(original), tmp_path / "hf", dtype="float32")), dtype="float32")
    conversations = [Conversation.from_prompt("What is this?", [random_image(0, 40).resize((50, 30))])]
    one, other = (encode(each.processor, conversations)[0] for each in (loaded, converted))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    own, theirs = loaded.model.state_dict(), converted.model.state_dict()
    assert own.keys() == theirs.keys() and all(torch.equal(own[name], theirs[name]) for name in own)
    assert (converted.prompt, converted.stops) == (loaded.prompt, loaded.stops)
    assert "vision_config" in json.loads((tmp_path / "hf" / "config.json").read_text())
    with pytest.raises(QVLMError, match="not an empty folder"):
        convert(str(original), tmp_path / "hf")


def test_converting_keeps_what_was_asked_for_in_place_of_the_configuration(folder, tmp_path):
    conversations = [Conversation.from_prompt("What is this?", [random_image(0, 40).resize((50, 30))])]
    pixels = {}
    for kind in ("pad", "square"):
        done = CliRunner().invoke(app, ["convert", str(folder), str(tmp_path / kind), "--image-aspect-ratio", kind])
        assert done.exit_code == 0, done.output
        loaded, converted = load(str(folder), image_aspect_ratio=kind), load(str(tmp_path / kind))
        pixels[kind], other = (encode(each.processor, conversations)[0]["pixel_values"] for each in (loaded, converted))
        assert torch.equal(pixels[kind], other)
    assert not torch.equal(pixels["pad"], pixels["square"])


def test_the_command_converts_or_says_in_one_line_why_not(folder, tmp_path):
    arguments = ["convert", str(folder), str(tmp_path / "hf"), "--conv", "llava_v0"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0 and done.stdout.strip().splitlines()[-1] == str(tmp_path / "hf")
    assert load(str(tmp_path / "hf")).stops == ("###",)
    again = CliRunner().invoke(app, arguments)
    assert again.exit_code == 2 and "is not an empty folder" in again.output


def test_settings_of_the_tokenizer_are_followed_or_refused(folder):
    file = folder / "tokenizer_config.json"
    values = json.loads(file.read_text())
    plain = load(str(folder)).processor.tokenizer("is</s>it").input_ids
    for legacy in (None, "absent"):  # transformers' default is true
        changed = {key: value for key, value in values.items() if key != "legacy"}
        file.write_text(json.dumps(changed if legacy else {**changed, "legacy": None}))
        assert load(str(folder)).processor.tokenizer("is</s>it").input_ids == plain
    file.write_text(json.dumps({**values, "legacy": False}))
    other = load(str(folder)).processor.tokenizer("is</s>it")
    assert other.tokens() == ["<s>", "▁is", "</s>", "i", "t"] and other.input_ids != plain
    file.write_text(json.dumps({**values, "add_bos_token": False}))
    assert load(str(folder)).processor.tokenizer("is</s>it").input_ids == plain[1:]
    for odd in ({"add_eos_token": True}, {"legacy": "perhaps"}):
        file.write_text(json.dumps({**values, **odd}))
        with pytest.raises(QVLMError, match=f"tokenizer_config.json.*{next(iter(odd))}"):
            load(str(folder))
    file.unlink()
    assert load(str(folder)).processor.tokenizer("is</s>it").input_ids == plain


def test_the_prompt_format_follows_the_projector_and_can_be_chosen(folder, tmp_path):
    assert load(str(folder)).prompt == "llava_v1"
    assert load(str(write_original_llava(tmp_path / "new", projector="mlp2x_gelu"))).prompt == "vicuna_v1"
    chosen = load(str(folder), conv="llava_v0")
    assert chosen.prompt == "llava_v0" and chosen.stops == ("###",)
    between = write_original_llava(tmp_path / "between", between=True, added_tokens=("<im_start>", "<im_end>"))
    template = load(str(between), conv="vicuna_v1").processor.chat_template
    assert name_of(template) == "vicuna_v1" and "<im_start><image><im_end>" in template


class Code:
    def __reduce__(self):
        return (print, ("this must never run",))


def spoil(folder, change):
    config = json.loads((folder / "config.json").read_text())
    match change:
        case dict():
            (folder / "config.json").write_text(json.dumps({**config, **change}))
        case "no tower":
            shutil.rmtree(folder / "tower")
        case "no tower weights":
            (folder / "tower" / "pytorch_model.bin").unlink()
        case "siglip":
            (folder / "tower" / "config.json").write_text(json.dumps({"model_type": "siglip_vision_model"}))
        case "neither":
            keys = {key: value for key, value in config.items() if not key.startswith("mm_")}
            (folder / "config.json").write_text(json.dumps({**keys, "model_type": "llama"}))
        case "no type":
            (folder / "config.json").write_text("{}")
        case "projector only":
            (folder / "pytorch_model.bin").rename(folder / "mm_projector.bin")
        case "code":
            (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"model.norm.weight": Code()}))
        case "zipped code":
            torch.save({"model.norm.weight": Code()}, folder / "pytorch_model.bin")
        case "no tensors":
            torch.save({"epoch": 1}, folder / "pytorch_model.bin")
        case "truncated":
            file = folder / "pytorch_model.bin"
            file.write_bytes(file.read_bytes()[:5000])
        case "empty":
            (folder / "pytorch_model.bin").write_bytes(b"")
        case "missing key" | "unknown key":
            weights = torch.load(folder / "pytorch_model.bin")
            if change == "missing key":
                del weights["model.layers.1.mlp.up_proj.weight"]
            else:
                weights["model.resampler.weight"] = torch.ones(2)
            torch.save(weights, folder / "pytorch_model.bin")
        case "no language model":
            torch.save({"model.norm.weight": torch.ones(32)}, folder / "pytorch_model.bin")
        case "no tokenizer":
            (folder / "tokenizer.model").unlink()
        case "bad tokenizer":
            (folder / "tokenizer.model").write_bytes(b"nothing")
        case "two Linears":
            weights = torch.load(folder / "pytorch_model.bin")
            for part in ("weight", "bias"):
                weights[f"model.mm_projector.0.{part}"] = weights.pop(f"model.mm_projector.{part}")
                weights[f"model.mm_projector.2.{part}"] = torch.ones(32, 32) if part == "weight" else torch.ones(32)
            torch.save(weights, folder / "pytorch_model.bin")
        case "odd added tokens":
            (folder / "added_tokens.json").write_text('{"<im_patch>": 100000}')


@pytest.mark.parametrize(
    "change, message",
    [
        ("neither", "model type 'llama' is not supported; supported are .*llava"),
        ("no type", "has neither layout; .* a model_type and a vision_config, .* mm_vision_tower or mm_image_tower"),
        ("no tower", "vision tower 'tower' is neither a hub id nor in the checkpoint's folder"),
        ("no tower weights", "vision tower 'tower': missing model.safetensors; .* found no weight file"),
        ("siglip", "is a 'siglip_vision_model'; supported .* CLIP"),
        ({"mm_projector_type": "resampler"}, "'resampler' is not known; known are linear and mlp2x_gelu"),
        ({"image_aspect_ratio": "anyres"}, "image_aspect_ratio='anyres' is not supported .* pad and square"),
        ({"s2": True}, "s2=True is not supported in the original layout; leave it out or set it to False"),
        ({"mm_patch_merge_type": "spatial_unpad"}, "mm_patch_merge_type='spatial_unpad' .* set it to 'flat'"),
        ({"tokenizer_model_max_length": "long"}, "tokenizer_model_max_length='long' is not a number of tokens"),
        ({"mm_resampler_type": "perceiver"}, "mm_resampler_type='perceiver' is not supported .* leave it out"),
        ({"mm_use_im_start_end": True}, "tokens, more than config.json's vocab_size"),
        ({"mm_vision_select_feature": "all"}, "mm_vision_select_feature='all' is not known"),
        ({"model_type": "llava_mpt"}, "'llava_mpt' is not supported in the original layout; supported are llava, "),
        ({"vocab_size": 9999}, "rows, but config.json has vocab_size=9999"),
        ({"vocab_size": 100}, "tokens, more than config.json's vocab_size=100"),
        ({"mm_vision_tower": 3}, "vision tower 3 is neither a hub id nor in the checkpoint's folder"),
        ({"mm_vision_select_layer": -9}, "mm_vision_select_layer=-9, but vision tower 'tower' has 3 layers"),
        ({"mm_vision_select_layer": "x"}, "config.json does not load"),
        ({"hidden_size": "wide"}, "config.json does not load: .*'hidden_size' expected int"),
        ({"num_attention_heads": 5}, "config.json does not load: .*not a multiple"),
        ({"intermediate_size": 48}, "6 weights are of another shape, for example .*down_proj"),
        ({"num_hidden_layers": 1}, "9 weights are unknown to the model"),
        ("two Linears", "projector of two Linears, but config.json has a linear one"),
        ("empty", r"pytorch_model\.bin: the weights do not load: \w+"),
        ("projector only", "missing model.safetensors; .* whole or in shards; found mm_projector.bin"),
        ("code", "pytorch_model.bin: contains pickled code or is damaged; supported are files of tensors only"),
        ("zipped code", "pytorch_model.bin: contains pickled code or is damaged"),
        ("no tensors", "contains no state dict"),
        ("truncated", "pytorch_model.bin: (the weights do not load|contains pickled code or is damaged)"),
        ("missing key", "1 weights are missing in the checkpoint, for example .*up_proj"),
        ("unknown key", "1 weights are unknown to the model, for example .*resampler"),
        ("no language model", "no model.embed_tokens.weight, so they contain no language model"),
        ("no tokenizer", "tokenizer.model is missing"),
        ("bad tokenizer", "not a sentencepiece model"),
        ("odd added tokens", "do not continue the vocabulary"),
    ],
)  # fmt: skip
def test_folders_that_cannot_be_used_are_one_line_errors(folder, change, message, capfd):
    spoil(folder, change)
    with pytest.raises(QVLMError, match=message) as caught:
        load(str(folder), check_config=plugins.topology)
    assert "\n" not in str(caught.value)
    assert "never run" not in capfd.readouterr().out


def test_a_missing_shard_is_named(tmp_path):
    folder = write_original_llava(tmp_path / "m", shards=3)
    (folder / "pytorch_model-00002-of-00003.bin").unlink()
    with pytest.raises(QVLMError, match=r"missing pytorch_model-00002-of-00003\.bin, which pytorch_model\.bin\.index"):
        load(str(folder))


def test_unknown_formats_and_formats_that_the_tokenizer_cannot_end_are_refused(folder):
    with pytest.raises(QVLMError, match=f"conv='chatty' is not known; allowed are {', '.join(PROMPT_FORMATS)}"):
        load(str(folder), conv="chatty")
    with pytest.raises(QVLMError, match=r"conv=stablelm ends answers with <\|endoftext\|>, the tokenizer with </s>"):
        load(str(folder), conv="stablelm")
    with pytest.raises(QVLMError, match="router_noise_seed is only for models"):
        load(str(folder), router_noise_seed=1)


def test_the_fingerprint_follows_the_tower_too(folder):
    before = load(str(folder)).fingerprint
    assert load(str(folder)).fingerprint == before
    (folder / "tower" / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5, 0.5, 0.5]}))
    assert load(str(folder)).fingerprint != before
