"""The tasks are the harness's own ones with more metrics: the same prompts, the same scores for the same answers."""

import itertools
import random
from pathlib import Path

import lmms_eval.tasks
import pytest
from harness.mirrors import scienceqa_row, vizwiz_row, vqav2_row
from lmms_eval.utils import load_yaml_config

FOLDER = Path(__file__).parents[2] / "tasks"
STANDARD = Path(lmms_eval.tasks.__file__).parent
PAIRS = {
    "qvlm_scienceqa": ("scienceqa/scienceqa.yaml", scienceqa_row),
    "qvlm_vizwiz": ("vizwiz_vqa/vizwiz_vqa_val.yaml", vizwiz_row),
    "qvlm_vqav2": ("vqav2/vqav2_val.yaml", vqav2_row),
}
ANSWERS = ("A", "b", "B. the bottle", "C", "The answer is A", "", "a cup", "A cup.", "mug", "red", "Blue", "yes", "2")


def definition(name):
    return load_yaml_config(str(FOLDER / f"{name}.yaml"))


@pytest.mark.parametrize("name", PAIRS)
def test_all_but_the_metrics_is_as_in_the_standard_task(name):
    ours, standard = definition(name), load_yaml_config(str(STANDARD / PAIRS[name][0]))
    own = ("task", "metric_list", "metadata", "process_results", "process_results_use_image")
    left = [{key: value for key, value in config.items() if key not in own} for config in (ours, standard)]
    for config in left:
        for key in ("doc_to_visual", "doc_to_text", "doc_to_target"):
            function = config.pop(key)
            config[key] = getattr(function, "__code__", function)  # relative references load a module anew
    assert left[0] == left[1]


@pytest.mark.parametrize("name", PAIRS)
def test_scores_are_those_of_the_standard_task(name):
    process, row = definition(name)["process_results"], PAIRS[name][1]
    standard = load_yaml_config(str(STANDARD / PAIRS[name][0]))["process_results"]
    seen = set()
    for index, answer in itertools.product(range(8), ANSWERS):
        metrics = process(row(index), [answer])
        assert metrics["exact_match"] == metrics["score"] == standard(row(index), [answer])["exact_match"]
        seen.add(metrics["exact_match"])
    assert {0, 1} <= seen


@pytest.mark.parametrize("name", ["qvlm_scienceqa", "qvlm_scienceqa_lepa", "qvlm_vizwiz", "qvlm_vqav2"])
def test_every_metric_is_declared_and_a_class_has_its_documents_scores(name):
    config = definition(name)
    declared = {metric["metric"] for metric in config["metric_list"]}
    row = PAIRS.get(name, PAIRS["qvlm_scienceqa"])[1]
    found = [config["process_results"](row(index), ["A"]) for index in range(24)]
    assert {key for metrics in found for key in metrics} - {"score"} == declared
    assert all(isinstance(metric["metric"], str) for metric in config["metric_list"])  # a bare NO is a boolean
    for metrics in found:
        classes = metrics.keys() - {"exact_match", "score", "parse_failure"}
        assert {metrics[key] for key in classes} <= {metrics["exact_match"]} and classes


def science(**fields):
    return scienceqa_row(1) | fields


def test_question_classes():
    classes = load("scienceqa").classes
    text = {"hint": " ", "image": None, "subject": "natural science", "grade": "grade6"}
    assert classes(science(**text)) == ["NAT", "NO", "G1-6"]
    assert classes(science(**text | {"hint": "It is hot."})) == ["NAT", "TXT", "G1-6"]
    both = classes(science(hint="x", subject="social science", grade="grade7"))
    assert both == ["SOC", "TXT", "IMG", "G7-12"]
    assert classes(science(hint="", subject="language science", grade="grade12")) == ["LAN", "IMG", "G7-12"]
    for index in range(40):  # every document is of one context at least, and of NO only when of no other
        context = {"TXT", "IMG", "NO"} & set(classes(scienceqa_row(index)))
        assert context and ("NO" not in context or context == {"NO"})


def load(module):
    import importlib.util

    spec = importlib.util.spec_from_file_location(module, FOLDER / f"{module}.py")
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def test_the_explained_prompt_is_llavas():
    document = science(question="Which?", choices=["a key", "a  lamp"], hint="")
    assert load("scienceqa").explained_prompt(document) == ("Which?\nContext: N/A\nOptions: (A) a key (B) a lamp")
    assert "\nContext: Look.\n" in load("scienceqa").explained_prompt(document | {"hint": "Look. "})


@pytest.mark.parametrize(
    "text, letter",
    [
        ("LECTURE: x\nSOLUTION: y\n###\nANSWER: B.", "B"),
        ("LECTURE: x\n The answer is C.", "C"),
        ("The answer is (A).", "A"),
        ("The answer is A. ###\nANSWER: B.", "B"),
        ("ANSWER: Both", None),
        ("A", None),
        ("", None),
        ("LECTURE: cut off in the", None),
    ],
)
def test_explained_answers(text, letter):
    functions = load("scienceqa")
    assert functions.explained_answer(text) == letter
    for target in range(3):
        document = science(choices=["a", "b", "c"], answer=target)
        metrics = functions.explained_results(document, [text])
        assert metrics["exact_match"] == (letter == "ABC"[target]) and metrics["parse_failure"] == (letter is None)


def test_a_parse_failure_is_an_answer_that_no_target_would_make_right():
    from qvlm_plugin.harness.provenance import is_readable

    functions, generator = load("scienceqa"), random.Random(0)
    alphabet = ["A", "B", "b", ".", " ", "\n", "(", ")", "ANSWER:", "The answer is", "x", "1"]
    answers = ["".join(generator.choices(alphabet, k=generator.randint(0, 4))) for _ in range(3000)]
    for answer in answers:
        direct = functions.results(scienceqa_row(1), [answer])["parse_failure"]
        explained = functions.explained_results(scienceqa_row(1), [answer])["parse_failure"]
        assert is_readable("qvlm_scienceqa", answer) == (not direct)
        assert is_readable("qvlm_scienceqa_lepa", answer) == (not explained)
