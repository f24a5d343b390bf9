"""Train the demo's bridge from scratch on a CPU: the projector and a low-rank update of every decoder Linear.

It takes about 40 minutes on two cores, because
- the vision tower is frozen, so its features are computed once and kept;
- the projector first learns to map an image to the word embeddings of its colour and shape, without the language model;
- an image's questions share one sequence: each attends only to the start of the chat, the image and itself, at the
  positions that it would have alone, so that the result equals asking them one by one;
- the frozen language model runs in bfloat16, 2.3 times as fast as float32 on a CPU with AVX512-BF16.

Only easy-VQA's train images are used, without those that `questions.held_out` keeps for validation.
"""

import hashlib
import io
import json
import math
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration, LlavaProcessor, PreTrainedTokenizerBase

from qvlm_plugin.atomic import follow_umask, require_writable
from qvlm_plugin.cache import cache_root
from qvlm_plugin.demo import parts
from qvlm_plugin.demo.model import IMAGE_TOKEN, IMAGE_TOKENS, LOW_RANK_SCALE, assemble
from qvlm_plugin.demo.questions import (
    SCIENCEQA,
    VIZWIZ,
    VQAV2,
    Example,
    Picture,
    Pool,
    Question,
    example,
    held_out,
    official,
    png,
    scienceqa,
    text_only_document,
    vizwiz,
    vqav2,
)
from qvlm_plugin.progress import Progress, track

RANK = 16
EMPTY_PICTURES = 400
FORMATS = ("vqav2", "vizwiz", "scienceqa", "scienceqa text")


@dataclass(frozen=True)
class Recipe:
    """Hyperparameters. `early` and `late` are the numbers of questions of each of FORMATS for an image.

    Accuracy in multiple choice stays near chance long after the other formats are learnt, so most late questions are of
    that kind.
    """

    steps: int = 560
    images_per_step: int = 4
    align_steps: int = 200
    warmup_steps: int = 20
    early_steps: int = 120
    early: tuple[int, ...] = (1, 1, 2, 2)
    late: tuple[int, ...] = (1, 1, 3, 2)
    empty_share: float = 0.1
    open_share: float = 0.6
    projector_rate: float = 1e-3
    update_rate: float = 8e-4
    seed: int = 0


@dataclass(frozen=True)
class Batch:
    """B packed sequences of length T.

    ids, positions: int64 [B, T]. mask: bool [B, 1, T, T], true where a query (third axis) attends to a key.
    targets: int64 [B, T], the token that each position must predict, -100 where there is none.
    groups: int64 [B, T], the index of the question a target belongs to, -1 elsewhere. pictures: B.
    """

    ids: Tensor
    positions: Tensor
    mask: Tensor
    targets: Tensor
    groups: Tensor
    pictures: tuple[Picture, ...]


def train(output: Path, recipe: Recipe | None = None) -> Path:
    """Train the bridge and write it to `output` (safetensors, float16); returns `output`.

    Every 50 steps `<output>.checkpoint` is written, from which an interrupted training with the same recipe resumes.
    """
    recipe = recipe or Recipe()
    torch.manual_seed(recipe.seed)
    output = Path(output)
    require_writable(output)
    model, processor = assemble(None)
    features = _features(model, processor)
    questions = official("train")
    rows = Rows(questions, recipe)

    parameters = _prepare(model)
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for n, p in parameters.items() if "projector" in n], "lr": recipe.projector_rate},
            {"params": [p for n, p in parameters.items() if "lora" in n], "lr": recipe.update_rate},
        ],
        weight_decay=0.0,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, recipe))
    checkpoint = output.with_name(output.name + ".checkpoint")
    done = _restore(checkpoint, recipe, parameters, optimizer)
    if done == 0:
        _align(model, processor.tokenizer, features, questions, recipe)
    for _ in range(done):
        schedule.step()

    exam = [rows.held_out(index) for index in range(16)]
    with Progress("training", recipe.steps) as progress:
        progress.advance(done)
        for step in range(done, recipe.steps):
            batch = pack(processor.tokenizer, rows.at(step))
            loss = _loss(model, features, batch)
            loss.backward()
            nn.utils.clip_grad_norm_(parameters.values(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            progress.describe(f"training: loss {loss.item():.3f}")
            progress.advance()
            if step % 50 == 49 or step + 1 == recipe.steps:
                _save(checkpoint, step + 1, recipe, parameters, optimizer)
                scores = _examine(model, features, processor.tokenizer, exam)
                progress.print(f"step {step + 1}: held-out images: {scores}")
    _write(output, {name: p.detach().half().contiguous() for name, p in parameters.items()}, {})
    checkpoint.unlink()
    return output


class LowRank(nn.Module):
    """A frozen Linear plus a trained update of rank r: y = W x + scale · B A x, x [..., in] → y [..., out]."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear
        self.lora_a = nn.Parameter(torch.randn(RANK, linear.in_features) / math.sqrt(linear.in_features))
        self.lora_b = nn.Parameter(torch.zeros(linear.out_features, RANK))

    def forward(self, x: Tensor) -> Tensor:
        update = nn.functional.linear(nn.functional.linear(x, self.lora_a.to(x.dtype)), self.lora_b.to(x.dtype))
        return self.linear(x) + LOW_RANK_SCALE * update


def _prepare(model: LlavaForConditionalGeneration) -> dict[str, nn.Parameter]:
    """Freeze the model, cast its language part to bfloat16, insert the updates; returns the trained parameters."""
    model.requires_grad_(False)
    language = model.model.language_model.to(torch.bfloat16)
    for layer in language.layers:
        for block in (layer.self_attn, layer.mlp):
            for name, child in list(block.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(block, name, LowRank(child))
    model.model.multi_modal_projector.requires_grad_(True)
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _rate(step: int, recipe: Recipe) -> float:
    """Factor of the learning rate: linear warm-up, then cosine decay to 2 %."""
    if step < recipe.warmup_steps:
        return (step + 1) / recipe.warmup_steps
    done = (step - recipe.warmup_steps) / max(1, recipe.steps - recipe.warmup_steps)
    return 0.02 + 0.98 * (1 + math.cos(math.pi * min(1.0, done))) / 2


# Features of the frozen tower -----------------------------------------------------------------------------------------


def _features(model: LlavaForConditionalGeneration, processor: LlavaProcessor) -> dict[Picture, Tensor]:
    """The projector's input for each train and empty picture: bfloat16 [64, 384]; computed once, then cached."""
    pictures = [Picture("train", number) for number in range(4000)]
    pictures += [Picture("empty", number) for number in range(EMPTY_PICTURES)]
    key = json.dumps([parts.VISION.sha256, parts.QUESTIONS.sha256, len(pictures), 1])
    file = cache_root() / "demo" / f"features-{hashlib.sha256(key.encode()).hexdigest()[:12]}.safetensors"
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        chunks = []
        for start in track(range(0, len(pictures), 40), "vision features"):
            images = [Image.open(io.BytesIO(png(picture))) for picture in pictures[start : start + 40]]
            pixels = processor.image_processor(images=images, return_tensors="pt")["pixel_values"]
            with torch.inference_mode():
                states = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
            chunks.append(states[model.config.vision_feature_layer][:, 1:].bfloat16())  # all but the class token
        _write(file, {"features": torch.cat(chunks)}, {})
    return dict(zip(pictures, load_file(file)["features"], strict=True))


def _align(
    model: LlavaForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    features: Mapping[Picture, Tensor],
    questions: Sequence[Question],
    recipe: Recipe,
) -> None:
    """Train the projector to output, for every patch, the summed embeddings of the image's colour and shape words."""
    facts = {q.picture: q.fact for q in questions if q.fact and q.picture.number not in held_out()}
    facts |= {Picture("empty", number): "nothing" for number in range(EMPTY_PICTURES)}
    table = model.get_input_embeddings().weight.float()
    words = {word for fact in facts.values() for word in fact.split()}
    embeddings = {w: table[tokenizer(f" {w}", add_special_tokens=False).input_ids].mean(0) for w in words}
    projector = model.model.multi_modal_projector
    optimizer = torch.optim.AdamW(projector.parameters(), lr=recipe.projector_rate, weight_decay=0.0)
    rng = random.Random(f"align {recipe.seed}")
    pictures = list(facts)
    for _ in track(range(recipe.align_steps), "aligning the projector"):
        drawn = rng.sample(pictures, 32)
        wanted = torch.stack([torch.stack([embeddings[w] for w in facts[p].split()]).sum(0) for p in drawn])
        got = projector(torch.stack([features[p] for p in drawn]).float())
        loss = nn.functional.mse_loss(got, wanted[:, None].expand_as(got)) / wanted.var()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f"alignment: unexplained share of the word embeddings' variance {loss.item():.3f}")


# Packed questions -----------------------------------------------------------------------------------------------------


class Rows:
    """Draws each step's pictures and their questions; a step's draw depends on the seed and the step alone."""

    def __init__(self, questions: Sequence[Question], recipe: Recipe) -> None:
        self.recipe = recipe
        self.fact_questions = Pool.of(q for q in questions if q.fact and q.picture.number not in held_out())
        by_picture: dict[Picture, list[Question]] = {}
        for question in questions:
            by_picture.setdefault(question.picture, []).append(question)
        self.by_picture = {picture: Pool.of(own) for picture, own in by_picture.items()}
        self.seen = [p for p in self.by_picture if p.number not in held_out()]
        self.unseen = [p for p in self.by_picture if p.number in held_out()]

    def at(self, step: int) -> list[list[Example]]:
        rng = random.Random(f"step {self.recipe.seed} {step}")
        counts = self.recipe.early if step < self.recipe.early_steps else self.recipe.late
        order = random.Random(f"order {self.recipe.seed} {step * self.recipe.images_per_step // len(self.seen)}")
        pictures = order.sample(self.seen, len(self.seen))
        start = step * self.recipe.images_per_step % len(pictures)
        return [
            [e for _, e in self._row(picture, counts, rng)]
            for picture in (pictures + pictures)[start : start + self.recipe.images_per_step]
        ]

    def held_out(self, index: int) -> list[tuple[str, Example]]:
        """Two questions of each format about a picture that training does not use, with the format's name."""
        return self._row(self.unseen[index], (2, 2, 2, 2), random.Random(f"exam {index}"), "validation")

    def _row(
        self, picture: Picture, counts: Sequence[int], rng: random.Random, split: str = "train"
    ) -> list[tuple[str, Example]]:
        pool, share = self.by_picture[picture], self.recipe.open_share
        empty = Picture("empty", rng.randrange(EMPTY_PICTURES)) if rng.random() < self.recipe.empty_share else None
        row = []
        for name, count in zip(FORMATS, counts, strict=True):
            for _ in range(count):
                question = pool.draw(rng, share)
                if name == "scienceqa text":
                    row.append((name, example(SCIENCEQA, text_only_document(self.fact_questions, rng, share, split))))
                elif empty:  # the only format with an answer for an empty picture
                    row.append(("vizwiz", example(VIZWIZ, vizwiz(question, 0, empty))))
                elif name == "scienceqa":
                    row.append((name, example(SCIENCEQA, scienceqa(question, rng))))
                elif name == "vizwiz":
                    row.append((name, example(VIZWIZ, vizwiz(question, 0))))
                else:
                    row.append((name, example(VQAV2, vqav2(question, 0))))
        return row


def pack(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Sequence[Example]]) -> Batch:
    """One sequence per row: the start of the chat, the row's picture, then every question with its answer.

    The first question of a row must have a picture, and all its pictures must be the same.
    """
    image = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    packed = [_pack_row(tokenizer, row, image) for row in rows]
    length = max(len(row["ids"]) for row in packed)

    def stack(name: str, padding: int) -> Tensor:
        return torch.tensor([row[name] + [padding] * (length - len(row[name])) for row in packed])

    segments, with_image = stack("segments", -1), stack("with_image", 0).bool()
    same = segments[:, :, None] == segments[:, None, :]
    shared = (segments == 0)[:, None, :] | ((segments == 1)[:, None, :] & with_image[:, :, None])
    shared = shared & (segments >= 0)[:, :, None]
    return Batch(
        ids=stack("ids", tokenizer.pad_token_id),
        positions=stack("positions", 0),
        mask=((same | shared) & torch.ones(length, length, dtype=torch.bool).tril())[:, None],
        targets=stack("targets", -100),
        groups=stack("groups", -1),
        pictures=tuple(next(e.picture for e in row if e.picture) for row in rows),
    )


def _pack_row(tokenizer: PreTrainedTokenizerBase, row: Sequence[Example], image: int) -> dict[str, list[int]]:
    """The lists of one row of a Batch; segments: 0 start of the chat, 1 image, then one for each question."""
    packed: dict[str, list[int]] = {}
    for index, item in enumerate(row):
        content = [{"type": "image"}] * (item.picture is not None) + [{"type": "text", "text": item.prompt}]
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        ids = tokenizer(prompt + item.answer + tokenizer.eos_token, add_special_tokens=False).input_ids
        prompt_length = len(tokenizer(prompt, add_special_tokens=False).input_ids)
        head = len(tokenizer(prompt[: prompt.index(content[-1]["text"])], add_special_tokens=False).input_ids)
        shared = ids[:head]
        if item.picture:
            at = shared.index(image)
            shared = shared[:at] + [image] * IMAGE_TOKENS + shared[at + 1 :]
        if not packed:
            if not item.picture:
                raise ValueError("the first question of a row must have a picture")
            packed = {
                "ids": list(shared),
                "positions": list(range(len(shared))),
                "segments": [0] * at + [1] * (len(shared) - at),
                "with_image": [0] * at + [1] * (len(shared) - at),
                "targets": [-100] * len(shared),
                "groups": [-1] * len(shared),
            }
        own, answer = ids[head:], len(ids) - prompt_length
        packed["ids"] += own
        packed["positions"] += range(len(shared), len(shared) + len(own))
        packed["segments"] += [index + 2] * len(own)
        packed["with_image"] += [int(item.picture is not None)] * len(own)
        packed["targets"] += [-100] * (len(own) - answer - 1) + own[-answer:] + [-100]
        packed["groups"] += [-1] * (len(own) - answer - 1) + [index] * answer + [-1]
    return packed


def logits(model: LlavaForConditionalGeneration, features: Mapping[Picture, Tensor], batch: Batch) -> Tensor:
    """Float32 logits [number of targets, vocabulary] of the batch's target positions, in row-major order."""
    language = model.model.language_model
    embeddings = language.embed_tokens(batch.ids)
    pictures = torch.stack([features[picture] for picture in batch.pictures]).float()
    projected = model.model.multi_modal_projector(pictures).to(embeddings.dtype)
    is_image = (batch.ids == model.config.image_token_id)[..., None]
    embeddings = embeddings.masked_scatter(is_image, projected)
    hidden = language(
        inputs_embeds=embeddings, attention_mask=batch.mask, position_ids=batch.positions, use_cache=False
    ).last_hidden_state
    return nn.functional.linear(hidden[batch.targets >= 0], language.embed_tokens.weight).float()


def _loss(model: LlavaForConditionalGeneration, features: Mapping[Picture, Tensor], batch: Batch) -> Tensor:
    return nn.functional.cross_entropy(logits(model, features, batch), batch.targets[batch.targets >= 0])


@torch.no_grad()
def _examine(
    model: LlavaForConditionalGeneration,
    features: Mapping[Picture, Tensor],
    tokenizer: PreTrainedTokenizerBase,
    exam: Sequence[Sequence[tuple[str, Example]]],
) -> str:
    """For each format, the share of questions whose answer tokens are all the most likely ones."""
    right: dict[str, list[bool]] = {}
    for start in range(0, len(exam), 8):
        rows = exam[start : start + 8]
        batch = pack(tokenizer, [[e for _, e in row] for row in rows])
        is_target = batch.targets >= 0
        hits = torch.zeros_like(is_target)
        hits[is_target] = logits(model, features, batch).argmax(-1) == batch.targets[is_target]
        for row, names in enumerate(rows):
            for index, (name, _) in enumerate(names):
                right.setdefault(name, []).append(bool(hits[row][batch.groups[row] == index].all()))
    return ", ".join(f"{name} {sum(hits) / len(hits):.1%} of {len(hits)}" for name, hits in sorted(right.items()))


# Files ----------------------------------------------------------------------------------------------------------------


def _save(
    file: Path, step: int, recipe: Recipe, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.AdamW
) -> None:
    tensors = dict(_state(parameters, optimizer))
    _write(file, tensors, {"step": str(step), "recipe": repr(recipe)})


def _restore(file: Path, recipe: Recipe, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.AdamW) -> int:
    """Load the checkpoint into parameters and optimizer; returns its step, 0 if there is none with this recipe."""
    if not file.is_file():
        return 0
    with safe_open(file, "pt") as saved:
        metadata = saved.metadata()
    if metadata["recipe"] != repr(recipe):
        return 0
    tensors = load_file(file)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])
            optimizer.state[parameter] = {
                "step": torch.tensor(float(metadata["step"])),
                "exp_avg": tensors[f"{name}.exp_avg"],
                "exp_avg_sq": tensors[f"{name}.exp_avg_sq"],
            }
    return int(metadata["step"])


def _state(parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.AdamW) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in parameters.items():
        yield name, parameter.detach()
        for moment in ("exp_avg", "exp_avg_sq"):
            yield f"{name}.{moment}", optimizer.state[parameter][moment]


def _write(file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    fresh = file.with_name(f".{file.name}.{os.getpid()}")
    save_file(dict(tensors), fresh, metadata=dict(metadata))
    follow_umask(fresh)
    fresh.replace(file)
