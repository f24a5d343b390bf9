import pytest

from qvlm_plugin.errors import QVLMError
from qvlm_plugin.harness import task_names
from qvlm_plugin.harness.task_names import check_task_names


def test_names_that_stand_in_files_need_no_index(monkeypatch, tmp_path):
    monkeypatch.setattr(task_names, "_indexed", lambda: pytest.fail("indexed all tasks"))
    (tmp_path / "mine.yaml").write_text("task: mine\n")
    check_task_names(["scienceqa", "vizwiz_vqa_val", "vqav2_val", "qvlm_scienceqa_lepa", "mine.yaml"], tmp_path)


def test_the_index_decides_on_others(monkeypatch, tmp_path):
    names, indexed = set(task_names._listed()), task_names._indexed()
    monkeypatch.setattr(task_names, "_indexed", lambda: indexed)  # which takes seconds
    assert names < set(indexed.all_tasks)
    hidden = sorted(set(indexed.all_tasks) - names)  # tags in lists, tasks that inherit their names
    check_task_names([*hidden[:3], "scienceqa_*"], tmp_path)
    with pytest.raises(QVLMError, match="has no task 'sciencqa'; did you mean scienceqa or"):
        check_task_names(["scienceqa", "sciencqa"], tmp_path)
    with pytest.raises(QVLMError, match="has no task 'zzzzzz'; see: lmms-eval tasks list"):
        check_task_names(["zzzzzz"], tmp_path)
