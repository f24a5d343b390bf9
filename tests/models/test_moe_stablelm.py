"""MoE-LLaVA: the sparse layer against a loop over experts, the model against a forward pass from its definition."""

import json
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from moe_llava import EXPERTS, HEADS, HIDDEN, LAYERS, write_moe_llava
from tiny_llava import random_image
from transformers import CLIPVisionConfig, CLIPVisionModel, LlavaForConditionalGeneration

from qvlm_plugin import planning, plugins
from qvlm_plugin.conversation import Conversation, encode, to_device
from qvlm_plugin.errors import QVLMError
from qvlm_plugin.export import export
from qvlm_plugin.models.converting import convert
from qvlm_plugin.models.loading import load
from qvlm_plugin.models.moe_stablelm import SparseExperts, gumbel_noise, route
from qvlm_plugin.models.moe_stablelm_config import MoEStableLmConfig
from qvlm_plugin.models.weights import read_tensors
from qvlm_plugin.plan_request import check_request
from qvlm_plugin.topology import kept_linears, linear_layers, resolve


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_moe_llava(tmp_path_factory.mktemp("moe") / "moe")


def sparse_by_loop(x, router, experts):
    """The layer as DeepSpeed defines it: a plain loop over tokens. x [N, C]; experts: (gate, up, down) weights."""
    rows = []
    for token in x:
        probabilities = (router.float() @ token.float()).softmax(dim=0)
        first = int(probabilities.argmax())
        second = int(probabilities.scatter(0, torch.tensor(first), -1.0).argmax())
        total = probabilities[first] + probabilities[second]
        row = 0
        for index in (first, second):
            gate, up, down = experts[index]
            row = row + probabilities[index] / total * (down @ (F.silu(gate @ token) * (up @ token)))
        rows.append(row)
    return torch.stack(rows)


def test_the_sparse_layer_is_a_loop_over_experts():
    torch.manual_seed(0)
    layer = SparseExperts(MoEStableLmConfig(hidden_size=16, intermediate_size=24, num_experts=5), 0)
    x = torch.randn(2, 9, 16)
    experts = [(each.gate_proj.weight, each.up_proj.weight, each.down_proj.weight) for each in layer.experts]
    expected = sparse_by_loop(x.flatten(0, 1), layer.router.weight, experts).view_as(x)
    assert torch.allclose(layer(x), expected, atol=1e-6)


@torch.inference_mode()
def test_logits_are_those_of_the_definition(folder):
    loaded = load(str(folder), dtype="float32")
    weights = {name: one.float() for name, one in read_tensors(sorted(folder.glob("*.bin"))).items()}
    image = random_image(0, 42)
    inputs, _ = encode(loaded.processor, [Conversation.from_prompt("What is this?", [image])])

    tower = CLIPVisionModel(CLIPVisionConfig(**json.loads((folder / "tower" / "config.json").read_text()))).eval()
    named = read_tensors([folder / "tower" / "pytorch_model.bin"])  # MoE-LLaVA loads it over the folder's own
    prefix = "vision_model."
    tower.load_state_dict({name.removeprefix(prefix): t for name, t in named.items() if name.startswith(prefix)})
    seen = tower(inputs["pixel_values"], output_hidden_states=True).hidden_states[-2][0, 1:]
    w = weights.__getitem__
    for index in (0, 2):
        name = f"model.mm_projector.image_spatial_proj.{index}"
        seen = F.linear(F.gelu(seen) if index else seen, w(f"{name}.weight"), w(f"{name}.bias"))
    ids = inputs["input_ids"][0]
    x = torch.where(
        (ids == loaded.model.config.image_token_id)[:, None],
        0,
        F.embedding(ids.clamp(max=len(w("lm_head.weight")) - 1), w("model.embed_tokens.weight")),
    )
    x[ids == loaded.model.config.image_token_id] = seen

    head, count = HIDDEN // HEADS, len(ids)
    rotary = head // 4  # a quarter of each head is rotated
    angles = torch.arange(count)[:, None] / 10000 ** (torch.arange(0, rotary, 2) / rotary)
    cos, sin = (torch.cat([f, f], dim=1) for f in (angles.cos(), angles.sin()))

    def rotate(t):  # [heads, T, head]
        turned, rest = t[..., :rotary], t[..., rotary:]
        left, right = turned.chunk(2, dim=-1)
        return torch.cat([turned * cos + torch.cat([-right, left], dim=-1) * sin, rest], dim=-1)

    def norm(t, name):
        return F.layer_norm(t, (HIDDEN,), w(f"{name}.weight"), w(f"{name}.bias"), 1e-5)

    for index in range(LAYERS):
        layer = f"model.layers.{index}"
        inner = norm(x, f"{layer}.input_layernorm")
        q, k, v = (
            F.linear(inner, w(f"{layer}.self_attn.{n}_proj.weight"), w(f"{layer}.self_attn.{n}_proj.bias"))
            .view(count, HEADS, head)
            .transpose(0, 1)
            for n in "qkv"
        )
        scores = rotate(q) @ rotate(k).transpose(1, 2) / head**0.5
        scores = scores.masked_fill(torch.ones(count, count).triu(1).bool(), float("-inf"))
        mixed = (scores.softmax(dim=-1) @ v).transpose(0, 1).reshape(count, HIDDEN)
        x = x + F.linear(mixed, w(f"{layer}.self_attn.o_proj.weight"))
        inner, mlp = norm(x, f"{layer}.post_attention_layernorm"), f"{layer}.mlp"
        if index % 2 == 0:
            owners = [f"{mlp}.deepspeed_moe.experts.deepspeed_experts.{expert}" for expert in range(EXPERTS)]
            experts = [tuple(w(f"{owner}.{n}_proj.weight") for n in ("gate", "up", "down")) for owner in owners]
            x = x + sparse_by_loop(inner, w(f"{mlp}.deepspeed_moe.gate.wg.weight"), experts)
        else:
            gate, up, down = (w(f"{mlp}.{n}_proj.weight") for n in ("gate", "up", "down"))
            x = x + F.linear(F.silu(F.linear(inner, gate)) * F.linear(inner, up), down)
    expected = F.linear(norm(x, "model.norm"), w("lm_head.weight"))
    logits = loaded.model(**inputs).logits[0]
    assert torch.allclose(logits, expected, atol=1e-5)


def test_the_vocabulary_keeps_its_size_and_answers_stop_at_the_end_token(folder):
    loaded = load(str(folder))
    rows = json.loads((folder / "config.json").read_text())["vocab_size"]
    tokenizer = loaded.processor.tokenizer
    assert len(loaded.model.lm_head.weight) == rows and loaded.model.config.image_token_id == len(tokenizer) - 1 < rows
    assert loaded.prompt == "stablelm" and tokenizer.eos_token == "<|endoftext|>"
    assert loaded.model.generation_config.eos_token_id == tokenizer.eos_token_id
    inputs, _ = encode(loaded.processor, [Conversation.from_prompt("What?", [random_image(0)])])
    assert tokenizer.bos_token_id is None and (inputs["input_ids"] == tokenizer.eos_token_id).sum() == 0
    with torch.no_grad():  # a model that can say nothing but the end token says nothing
        loaded.model.lm_head.weight.zero_()
        loaded.model.lm_head.weight[tokenizer.eos_token_id] = loaded.model.model.language_model.norm.bias * 1e4
        loaded.model.model.language_model.norm.weight.zero_()
    answer = loaded.model.generate(**to_device(inputs, "cpu", loaded.model.dtype), max_new_tokens=8)
    assert answer.shape[1] == inputs["input_ids"].shape[1] + 1


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_router_is_kept_in_full_precision(folder, dtype):
    model = load(str(folder), dtype=dtype).model
    routers = {name: one for name, one in linear_layers(model).items() if name.endswith("router")}
    assert len(routers) == 2 and {one.weight.dtype for one in routers.values()} == {torch.float32}
    assert model.model.language_model.layers[1].mlp.up_proj.weight.dtype == getattr(torch, dtype)
    topology = plugins.topology(model.config)
    assert kept_linears(topology, model) == routers.keys()


def test_every_expert_is_a_site_of_its_own(folder):
    model = load(str(folder)).model
    sites = [site for site in resolve(plugins.topology(model.config), model) if site.part == "decoder"]
    first = [site for site in sites if site.block == 0]
    assert len(first) == 2 + 2 * EXPERTS and len([site for site in sites if site.block == 1]) == 4
    layer = "model.language_model.layers.0.mlp.experts"
    assert {site.expert for site in first} == {None, *(f"{layer}.{index}" for index in range(EXPERTS))}
    down = next(site for site in first if site.name == f"{layer}.2.down_proj")
    assert down.producer == f"{layer}.2.up_proj" and down.expert == f"{layer}.2"
    named = {name for site in sites for name in site.linears}
    rest = {name for name in linear_layers(model) if "language_model" in name} - named
    assert rest == {name for name in linear_layers(model) if name.endswith("router")}


def test_converting_keeps_the_model(folder, tmp_path):
    loaded, other = load(str(folder)), load(str(convert(str(folder), tmp_path / "hf")))
    own, theirs = loaded.model.state_dict(), other.model.state_dict()
    assert type(other.model) is LlavaForConditionalGeneration and own.keys() == theirs.keys()
    assert all(torch.equal(own[name], theirs[name]) and own[name].dtype == theirs[name].dtype for name in own)
    conversations = [Conversation.from_prompt("What is this 123?", [random_image(0, 50)])]
    one, two = (encode(each.processor, conversations)[0] for each in (loaded, other))
    assert all(torch.equal(one[name], two[name]) for name in one) and other.prompt == "stablelm"


def test_converted_and_exported_folders_load_where_the_package_is_imported(folder, tmp_path):
    convert(str(folder), tmp_path / "converted")
    loaded = load(str(folder))
    plan = planning.obtain_plan(loaded, check_request("rtn", "w4a16", {"group_size": 16}), None, None)
    export(plan, loaded, tmp_path / "exported")
    code = """
import sys, qvlm_plugin
from transformers import AutoConfig, AutoModelForImageTextToText
for folder in sys.argv[1:]:
    model = AutoModelForImageTextToText.from_pretrained(folder, config=AutoConfig.from_pretrained(folder))
    layers = model.model.language_model.layers
    print(type(layers[0].mlp.router).__name__, type(layers[0].mlp.experts[3].up_proj).__name__)
"""
    folders = [str(tmp_path / name) for name in ("converted", "exported")]
    done = subprocess.run([sys.executable, "-c", code, *folders], capture_output=True, text=True, timeout=600)
    assert done.stdout.split() == ["Router", "Linear", "Router", "QuantLinear"], done.stderr


def test_noise_chooses_the_second_expert_by_its_probability():
    torch.manual_seed(0)
    logits = torch.randn(20_000, 4)
    chosen, shares = route(logits, seed=3)
    plain, _ = route(logits)
    assert torch.equal(chosen[:, 0], plain[:, 0]) and torch.equal(chosen[:, 0], logits.argmax(dim=1))
    assert (chosen[:, 1] != chosen[:, 0]).all() and torch.allclose(shares.sum(dim=1), torch.ones(len(shares)))
    # Among the experts that are not the first, each is drawn with its share of their probability.
    rest = logits.scatter(1, chosen[:, :1], float("-inf")).softmax(dim=1)
    drawn = F.one_hot(chosen[:, 1], 4).double()
    for low, high in ((0.1, 0.3), (0.4, 0.6), (0.7, 0.9)):
        inside = (rest > low) & (rest < high)
        error = (inside.sum() * 0.25) ** 0.5 / inside.sum()
        assert abs(drawn[inside].mean() - rest[inside].double().mean()) < 4 * error
    assert torch.equal(route(logits, seed=3)[0], chosen) and not torch.equal(route(logits, seed=4)[0], chosen)
    assert torch.equal(route(logits[:7], seed=3)[0], chosen[:7])  # whatever else is in the batch


def test_the_noise_is_gumbels():
    noise = gumbel_noise(torch.randn(50_000, 4, generator=torch.Generator().manual_seed(0)), seed=0).double()
    assert abs(noise.mean() - 0.5772) < 0.02 and abs(noise.std() - 1.2825) < 0.02
    assert torch.corrcoef(noise.T).fill_diagonal_(0).abs().max() < 0.02


def test_noise_is_off_by_default_and_part_of_the_models_identity(folder):
    plain, noisy = load(str(folder)), load(str(folder), router_noise_seed=1)
    again = load(str(folder), router_noise_seed=1)
    assert plain.model.model.language_model.layers[0].mlp.seed is None
    assert noisy.fingerprint == again.fingerprint != plain.fingerprint
    inputs, _ = encode(plain.processor, [Conversation.from_prompt("What is this?", [random_image(0)])])
    with torch.inference_mode():
        one, two, three = (
            each.model(**to_device(inputs, "cpu", torch.float32)).logits for each in (plain, noisy, again)
        )
    assert torch.equal(two, three) and not torch.equal(one, two)


@pytest.mark.parametrize(
    "change",
    [{"use_residual": True}, {"top_k_experts": 1}, {"num_experts": [4, 2]}, {"num_experts": []}],
)
def test_other_mixtures_are_refused(tmp_path, change):
    folder = write_moe_llava(tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "moe": config["moe"] | change}))
    with pytest.raises(QVLMError, match=r"moe=.* is not supported; supported are layers of equally many experts"):
        load(str(folder))


@pytest.mark.parametrize(
    "change", [{"eval_capacity_factor": 1.0}, {"eval_capacity_factor": float("nan")}, {"num_experts": [6, 6]}, {}]
)
def test_mixtures_that_drop_tokens_are_refused(tmp_path, change):
    folder = write_moe_llava(tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    moe = config["moe"] | change
    if not change:
        del moe["eval_capacity_factor"]  # DeepSpeed's default is 1
    (folder / "config.json").write_text(json.dumps({**config, "moe": moe}))
    least = moe["num_experts"][0] / 2
    with pytest.raises(
        QVLMError, match=rf"eval_capacity_factor=([12]\.0|nan) of moe drops tokens .* at least {least:g}"
    ):
        load(str(folder))


@pytest.mark.parametrize(
    "moe, message", [([1], "config.json does not load"), ({"moe_layers_idx": [7]}, "has 7, but there are 3 layers")]
)
def test_damaged_mixtures_are_one_line_errors(tmp_path, moe, message):
    folder = write_moe_llava(tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "moe": moe}))
    with pytest.raises(QVLMError, match=message):
        load(str(folder))


def test_phi_and_qwen_variants_are_refused_by_name(tmp_path):
    folder = write_moe_llava(tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    for kind in ("moe_llava_phi", "moe_llava_qwen"):
        (folder / "config.json").write_text(json.dumps({**config, "model_type": kind}))
        with pytest.raises(QVLMError, match=f"'{kind}' is not supported .* and moe_llava_stablelm"):
            load(str(folder))
