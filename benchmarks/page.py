"""The leaderboard's page in a browser: screenshots, response times with many rows, and accessibility rules.

Results are synthetic. Needs a Chromium, as the tests do; `make page` downloads axe-core's file.

python benchmarks/page.py pictures page-results            # 3 and 116 rows, three widths, light and dark
python benchmarks/page.py times page-results --rows 5000   # filter, sort, scroll: the longest pauses
python benchmarks/page.py rules page-results --axe node_modules/axe-core/axe.min.js
"""

import argparse
import base64
import io
import itertools
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from PIL import Image, ImageDraw

from qvlm_plugin.report.leaderboard.write import write_leaderboard
from qvlm_plugin.report.seal import seal

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from report.leaderboard.browser import Page, opened

TASKS = {"scienceqa": 76.0, "vizwiz_vqa_val": 58.0, "vqav2_val": 72.0}
MODELS = {
    "llava-hf/llava-1.5-7b-hf": (14.1, 0.0),
    "llava-hf/llava-1.5-13b-hf": (26.7, 3.0),
    "LanguageBind/MoE-LLaVA-StableLM-1.6B-4e": (5.7, -6.0),
    "llava-hf/llava-v1.6-vicuna-7b-hf": (14.2, 2.0),
}
METHODS = {"rtn": -12.0, "qlora": -5.0, "awq": -4.0, "gptq": -4.5, "quarot": -2.0, "qvlm": -2.5, "qvlm_rotated": -0.7}
SCHEMES = {"w8a8": (8.1, 8, 0.05), "w6a6": (6.2, 6, 0.3), "w4a16": (4.2, 16, 0.3), "w4a4": (4.3, 4, 1.0)}
COLOURS = ("red", "blue", "green", "yellow", "orange", "purple")


def configurations() -> Iterator[tuple[str, str, str]]:
    """Models × (full precision, methods × schemes): 116 of them."""
    for model in MODELS:
        yield model, "none", "w16a16"
        yield from ((model, method, scheme) for method, scheme in itertools.product(METHODS, SCHEMES))


def write_runs(folder: Path, rows: int, documents: int) -> None:
    """Write results files with samples for ``rows`` configurations; once all are used, models get numbered copies."""
    generator = random.Random(0)
    questions = {task: [_question(generator, index) for index in range(documents)] for task in TASKS}
    chosen = [("llava-hf/llava-1.5-7b-hf", *run) for run in (("none", "w16a16"), ("qlora", "w4a4"), ("qvlm", "w4a4"))]
    named = chosen if rows == len(chosen) else [*configurations()]
    for number in range(rows):
        model, method, scheme = named[number % len(named)]
        copy = number // len(named)
        _write_run(folder / f"run-{number}", (model, method, scheme), f"-{copy}" if copy else "", questions, generator)


def _question(generator: random.Random, index: int) -> dict[str, Any]:
    colour, shape = generator.choice(COLOURS), generator.choice(("circle", "rectangle"))
    image = Image.new("RGB", (64, 64), "white")
    left, top = generator.randrange(30), generator.randrange(30)  # nearly every question has a different picture
    box = (left, top, left + generator.randrange(10, 34), top + generator.randrange(10, 34))
    getattr(ImageDraw.Draw(image), {"circle": "ellipse"}.get(shape, shape))(box, fill=colour)
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return {
        "input": f"What is the colour of the {shape} in picture {index}?\nAnswer using a single word or phrase.",
        "target": colour,
        "input_media": [f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"],
        "hardness": generator.random(),
    }


def _write_run(
    folder: Path, run: tuple[str, str, str], suffix: str, questions: dict[str, list], generator: random.Random
) -> None:
    model, method, scheme = run
    size, gain = MODELS[model]
    weight, activation, harm = SCHEMES.get(scheme, (16.0, 16, 0.0))
    loss = METHODS.get(method, 0.0) * harm + generator.uniform(-1, 1)
    folder.mkdir(parents=True)
    results = {}
    for task, level in TASKS.items():
        lines = []
        for index, question in enumerate(questions[task]):
            fields = {key: value for key, value in question.items() if key != "hardness"}
            right = question["hardness"] + generator.gauss(0, 0.08) < (level + gain + loss) / 100
            answer = fields["target"] if right else generator.choice(COLOURS)
            score = float(answer == fields["target"])
            lines.append({"doc_id": index, "filtered_resps": answer, "exact_match": score, **fields})
        (folder / f"r_samples_{task}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        value = sum(line["exact_match"] for line in lines) / len(lines)
        error = (value * (1 - value) / len(lines)) ** 0.5
        results[task] = {"exact_match,none": value, "exact_match_stderr,none": error}
    count = len(next(iter(questions.values())))
    content = {
        "results": results,
        "n-samples": {task: {"original": count, "effective": count} for task in TASKS},
        "configs": {task: {"metric_list": [{"metric": "exact_match", "aggregation": "mean"}]} for task in TASKS},
        "versions": dict.fromkeys(TASKS, 1.0),
        "higher_is_better": {task: {"exact_match": True} for task in TASKS},
        "config": {"model": "qvlm_llava", "model_args": ""},
        "throughput": {"avg_speed": round(generator.uniform(0.9, 1.1) * 600 / size / weight**0.5, 2)},
        "date": "20261121_120000",
        "qvlm": {
            "method": method,
            "scheme": scheme,
            "pretrained": model + suffix,
            "model_fingerprint": model.ljust(64, "0") + suffix,
            "plan_hash": f"{method} {scheme} {model}".ljust(64, "0"),
            "bits": {"decoder": {"weight": weight, "activation": activation}},
            "packed_bytes": round(size * 1e9 * (0.06 + 0.94 * weight / 16)),
            "weight_bytes": round(size * 1e9 * (0.08 + 0.94 * weight / 16)),
            "peak_memory_bytes": round(size * 1e9 * (0.2 + 0.94 * weight / 16)),
            "calibration": None if method == "none" else {"source": "scienceqa:train:64", "seed": 0},
            "search_seconds": round(generator.uniform(100, 4000)),
            "backend": "reference" if scheme == "w6a6" else "packed",
            "dtype": "bfloat16",
            "device": "cpu",
            "versions": {"torch": "2.15.0", "qvlm_plugin": "0.1.0"},
        },
    }
    content["qvlm"]["seal"] = seal(content)
    (folder / "r_results.json").write_text(json.dumps(content))


def page_of(output: Path, rows: int, documents: int) -> Path:
    """The page with ``rows`` rows below ``output``; its runs are written if they do not exist yet."""
    folder = output / f"{rows}-rows"
    if not (folder / "runs").exists():
        write_runs(folder / "runs", rows, documents)
    write_leaderboard([folder / "runs"], folder, with_reported=rows < 1000)
    return folder / "leaderboard.html"


WIDTHS = {390: 844, 800: 1100, 1400: 900}
SCENES = {
    "top": "",
    "evaluation": "document.getElementById('view').selectedIndex = 1;"
    "document.getElementById('view').dispatchEvent(new Event('change'))",
    "compare": "[...document.querySelectorAll('#runs tbody input')].slice(1, 3).forEach((box) => box.click())",
    "empty": "document.getElementById('size').value = '0.1';"
    "document.getElementById('size').dispatchEvent(new Event('input'))",
    "details": "document.querySelector('#runs .more').click()",
}


def scenes(output: Path) -> Iterator[tuple[str, Page, int]]:
    """Each scene with 3 and with 116 rows, at each width, in both themes: a name, the page, and the width."""
    for rows, (width, height) in itertools.product((3, 116), WIDTHS.items()):
        file = page_of(output, rows, 200)
        with opened(file, output / "profile", width=width, height=height, mobile=width < 500) as page:
            for theme, (scene, script) in itertools.product(("light", "dark"), SCENES.items()):
                media = [{"name": "prefers-color-scheme", "value": theme}]
                page.send("Emulation.setEmulatedMedia", features=media)
                page.load(file.resolve().as_uri())
                page.run(script)
                yield f"{rows}-{width}-{theme}-{scene}", page, width


def pictures(output: Path) -> None:
    """Write a screenshot of each scene; fails if a scene is too wide or has an error."""
    for name, page, width in scenes(output):
        overflow = page.run("document.documentElement.scrollWidth") - width
        page.screenshot(output / f"{name}.png")
        assert overflow <= 0, f"{name}: {overflow} pixels too wide"
        assert not page.trouble(), page.trouble()
    print(f"pictures are in {output}")


TIMED = """(async () => {
  const frame = () => new Promise((done) => requestAnimationFrame(() => setTimeout(done, 0)));
  const set = (id, value) => {
    const box = document.getElementById(id);
    box.value = value;
    box.dispatchEvent(new Event('input'));
  };
  const taken = {};
  const time = async (name, act) => {
    await frame();
    const start = performance.now();
    act();
    await frame();
    (taken[name] ??= []).push(performance.now() - start);
  };
  for (let step = 0; step < 20; step++) await time('nothing', () => {});
  for (const text of ['q', 'qv', 'qvl', 'qvlm', 'qvlm w4', '']) await time('search', () => set('search', text));
  for (const text of ['8', '3', '']) await time('size', () => set('size', text));
  for (const box of document.querySelectorAll('#menu-method input')) await time('method', () => box.click());
  for (const box of document.querySelectorAll('#menu-method input')) await time('method', () => box.click());
  for (const button of document.querySelectorAll('#runs thead button')) await time('sort', () => button.click());
  const frameBox = document.getElementById('table');
  for (let step = 0; step < 60; step++) {
    await time('scroll', () => { frameBox.scrollTop += step < 40 ? 700 : frameBox.scrollHeight / 20; });
  }
  const boxes = [...document.querySelectorAll('#runs tbody input')].slice(0, 2);
  for (const box of boxes) await time('compare', () => box.click());
  return taken;
})()"""


def times(output: Path, rows: int) -> None:
    """Print the time from an action to the next frame: the median and the maximum of each kind of action.

    "nothing" is the time of a frame without an action; it is long while other processes use the machine.
    """
    file = page_of(output, rows, 40)
    with opened(file, output / "profile", width=1400, height=900) as page:
        started = page.run("performance.timing.loadEventEnd - performance.timing.responseEnd")
        taken = page.run(TIMED)
    print(f"{rows:,} rows, {file.stat().st_size / 1e6:.1f} MB: drawn {started} ms after the file was read")
    for name, values in taken.items():
        print(f"{name}: median {median(values):.0f} ms, longest {max(values):.0f} ms")
    slow = {name: max(values) for name, values in taken.items() if max(values) - max(taken["nothing"]) > 200}
    assert not slow, f"a pause of more than 200 ms: {slow}"


def rules(output: Path, axe: Path) -> None:
    """Check each scene by axe-core's rules: WCAG 2.2 AA, and good practice."""
    found = []
    for name, page, _ in scenes(output):
        page.run(axe.read_text())
        found += [
            f"{name}: {_described(violation)}"
            for violation in page.run("axe.run().then((result) => result.violations)")
        ]
    print("\n".join(found) or "no rule is broken")
    assert not found


def _described(violation: dict[str, Any]) -> str:
    nodes = violation["nodes"]
    return f"{violation['id']} ({violation['impact']}), {len(nodes)} places: {nodes[0]['html'][:160]}"


def main() -> None:
    """Run the command that the first argument names; see the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "command", choices=("pictures", "times", "rules"), help="screenshots, response times or accessibility rules"
    )
    parser.add_argument("output", type=Path, help="folder to write to")
    parser.add_argument("--rows", type=int, default=5000, help="rows of the page whose times are measured")
    parser.add_argument("--axe", type=Path, help="axe-core's file axe.min.js, which rules needs")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    if arguments.command == "pictures":
        pictures(arguments.output)
    elif arguments.command == "times":
        times(arguments.output, arguments.rows)
    else:
        rules(arguments.output, arguments.axe)


if __name__ == "__main__":
    main()
