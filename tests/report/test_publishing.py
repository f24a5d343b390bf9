import json

import pytest
import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries
from report.leaderboard.written import DATA, provenance, write_run

from qvlm_plugin.errors import QVLMError
from qvlm_plugin.report.publishing import publish_results, publishable
from qvlm_plugin.report.seal import seal


@pytest.fixture
def results(tmp_path):
    write_run(tmp_path / "results", [1, 1, 0], provenance())
    return tmp_path / "results"


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "model-w4a4"
    folder.mkdir()
    (folder / "README.md").write_text("---\nlicense: mit\ntags: [quantized]\n---\n# Mine\n\nText.\n")
    return folder


def test_the_card_gets_the_score_and_keeps_its_content(results, checkpoint):
    publish_results(publishable([results]), checkpoint, "https://example.org/runs")
    card = ModelCard.load(checkpoint / "README.md")
    assert card.data.license == "mit" and card.data.tags == ["quantized"] and "# Mine\n\nText." in card.content
    (found,) = card.data.eval_results
    assert (found.metric_type, found.metric_value) == ("accuracy", 66.67)
    assert (found.dataset_type, found.dataset_split, found.dataset_revision) == ("org/Quiz", "test", DATA["revision"])
    head = yaml.safe_load(card.content.split("---")[1])
    (index,) = head["model-index"]
    assert index["name"] == "model-w4a4" and index["results"][0]["task"]["type"] == "visual-question-answering"
    assert index["results"][0]["source"]["url"] == "https://example.org/runs"


def test_eval_results_are_read_by_the_hubs_reader(results, checkpoint):
    files = publish_results(publishable([results]), checkpoint, "https://example.org/runs")
    assert [file.relative_to(checkpoint).as_posix() for file in files] == [
        "README.md",
        ".eval_results/quiz-rtn-w4a4-reference.yaml",
    ]
    data = yaml.safe_load(files[1].read_text())
    assert set(data[0]) == {"dataset", "value", "date", "source", "notes"}
    (entry,) = parse_eval_result_entries(data)
    assert (entry.dataset_id, entry.task_id, entry.value, entry.date) == ("org/Quiz", "quiz", 66.67, "2026-11-21")
    assert "rtn w4a4" in entry.notes and f"plan {provenance()['plan_hash'][:12]}" in entry.notes


def test_publishing_again_replaces_and_adds(results, checkpoint, tmp_path):
    publish_results(publishable([results]), checkpoint)
    first = (checkpoint / "README.md").read_text()
    publish_results(publishable([results]), checkpoint)
    assert (checkpoint / "README.md").read_text() == first
    write_run(tmp_path / "more", [1, 0], provenance(data={"exam": DATA}), task="exam")
    publish_results(publishable([tmp_path / "more"]), checkpoint)
    found = ModelCard.load(checkpoint / "README.md").data.eval_results
    assert {one.metric_name.split()[0] for one in found} == {"quiz", "exam"}


@pytest.mark.parametrize(
    "metric, value, told",
    [("mme_perception_score", 1480.25, 1480.25), ("coco_CIDEr", 0.873, 0.87), ("NAT", 0.5, 50.0)],
)
def test_only_shares_are_published_in_percent(tmp_path, checkpoint, metric, value, told):
    write_run(tmp_path / "run", [1, 0], provenance(), metrics={metric: value})
    files = publish_results(publishable([tmp_path / "run"]), checkpoint)
    found = {one.metric_type: one for one in ModelCard.load(checkpoint / "README.md").data.eval_results}
    assert found[metric].metric_value == told and found["accuracy"].metric_value == 50.0
    assert ("(%)" in found[metric].metric_name) == (metric == "NAT")
    assert "exact_match in percent" in files[1].read_text()


def test_a_score_in_another_unit_is_shown_unscaled(tmp_path, checkpoint):
    run = write_run(tmp_path / "run", [1, 0], provenance())
    whole = json.loads(run.read_text())
    text = (
        json.dumps(whole)
        .replace("exact_match", "mme_perception_score")
        .replace('score,none": 0.5', 'score,none": 1480.25')
    )
    whole = json.loads(text.replace('"aggregation": "mean"', '"aggregation": "mme_aggregate_results"'))
    whole["qvlm"]["seal"] = seal(whole)
    run.write_text(json.dumps(whole))
    files = publish_results(publishable([run]), checkpoint)
    (entry,) = yaml.safe_load(files[1].read_text())
    assert entry["value"] == 1480.25 and "percent" not in entry["notes"]


@pytest.mark.parametrize(
    "facts, changes, message",
    [
        (provenance(stand_in=True, data={"quiz": DATA | {"stand_in": True}}), {}, "stand-in data"),
        (provenance(), {"total": 9}, "a part of the documents"),
        (None, {}, "not written by --model qvlm"),
    ],
)
def test_runs_that_must_not_be_published(tmp_path, facts, changes, message):
    write_run(tmp_path / "run", [1, 0], facts, **changes)
    with pytest.raises(QVLMError, match=message):
        publishable([tmp_path / "run"])


def test_a_checkpoint_has_one_plan(results, tmp_path):
    write_run(tmp_path / "other", [1, 0], provenance("awq"))
    with pytest.raises(QVLMError, match="of several plans"):
        publishable([results, tmp_path / "other"])


def test_a_card_that_cannot_be_read(results, checkpoint):
    (checkpoint / "README.md").write_text("---\na: [\n---\n")
    with pytest.raises(QVLMError, match="invalid front matter"):
        publish_results(publishable([results]), checkpoint)
