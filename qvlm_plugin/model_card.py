"""The model card of a quantized checkpoint: README.md, which says what the folder contains and how to load it."""

from pathlib import Path

from huggingface_hub import ModelCardData

from qvlm_plugin import __version__
from qvlm_plugin.plan_header import PlanFacts

CARD = "README.md"

PACKED = """\
With `qvlm_plugin` installed (`pip install qvlm_plugin`), transformers loads the folder with packed weights:

```python
import qvlm_plugin
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("{name}", device_map="auto")
processor = AutoProcessor.from_pretrained("{name}")
```

```bash
lmms-eval --model qvlm --model_args pretrained={name} --tasks scienceqa --batch_size 8 --output_path results
```

Without the package, loading the folder fails."""
"""How to load a folder in this package's own format."""

COMPRESSED = """\
The format is compressed-tensors:

```bash
vllm serve {name}
```

```python
from transformers import AutoModelForImageTextToText  # pip install compressed-tensors

model = AutoModelForImageTextToText.from_pretrained("{name}", device_map="auto")
```"""
"""How to load a folder in the ``compressed-tensors`` format."""


def model_card(name: str, source: str, plan: PlanFacts, arithmetic: str, loading: str) -> str:
    """The text of the card.

    Args:
        name: name of the folder.
        source: the checkpoint that was quantized: a folder or a hub id.
        plan: the plan by which it was quantized.
        arithmetic: kernels or formats of its Linears, with their numbers.
        loading: `PACKED` or `COMPRESSED`.
    """
    local = Path(source).is_dir()
    head = ModelCardData(
        base_model=None if local else source,
        base_model_relation=None if local else "quantized",
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        tags=["qvlm", "quantized", plan.method, *plan.scheme.split("+")],
    )
    return f"---\n{head.to_yaml()}\n---\n\n{_body(name, Path(source).name if local else source, plan, arithmetic)}" + (
        f"\n\n## Load\n\n{loading.format(name=name)}\n"
    )


def _body(name: str, base: str, plan: PlanFacts, arithmetic: str) -> str:
    calibration = plan.calibration
    samples = (
        f"{len(calibration.digests)} samples of {calibration.source}, seed {calibration.seed}"
        if calibration
        else "none"
    )
    facts = {
        "base model": base,
        "method": plan.method,
        "scheme": plan.scheme,
        "calibration": samples,
        "Linears": arithmetic,
        "plan": plan.hash,
        "written by": f"qvlm_plugin {__version__}",
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    bits = "\n".join(
        f"| {part} | {sum(module.part == part for module in plan.modules)} | {effective['weight']:.3f} | "
        f"{effective['activation']:.2f} |"
        for part, effective in plan.effective_bits().items()
    )
    options = "\n".join(f"- `{name}={value}`" for name, value in plan.options.items())
    folded = f"<details><summary>Options of the method</summary>\n\n{options}\n\n</details>\n\n" if options else ""
    return f"""\
# {name}

{base}, quantized after training by `{plan.method}` at {plan.scheme}.

| | |
|---|---|
{table}

{folded}Effective bits, with scales and zero points:

| part | Linears | weight bits | activation bits |
|---|---|---|---|
{bits}

Embeddings, norms and the language model's head are in the compute type. The licence is that of the base model."""
