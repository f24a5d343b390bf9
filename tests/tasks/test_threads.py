"""lmms-eval 0.7.3 scores documents in four threads: scores are those of one thread."""

import copy
import itertools
import sys
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from types import SimpleNamespace

import pytest
from harness.mirrors import scienceqa_row, vizwiz_row, vqav2_row
from lmms_eval.api.task import ConfigurableTask
from tasks.test_definitions import ANSWERS, definition

from qvlm_plugin.harness import likelihood
from qvlm_plugin.harness.likelihood import Likelihood
from qvlm_plugin.harness.provenance import is_readable

ROWS = {
    "qvlm_scienceqa": scienceqa_row,
    "qvlm_scienceqa_lepa": scienceqa_row,
    "qvlm_vizwiz": vizwiz_row,
    "qvlm_vqav2": vqav2_row,
}
EXPLAINED = ("SOLUTION: so.\nANSWER: A.", "The answer is (B).", "ANSWER: none", "1,000 mice\tran", "two\nboats, it's")
WORKERS = 4


@pytest.fixture(autouse=True)
def threads_that_switch_all_the_time():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def in_threads(function, items):
    """Results in the order of ``items``; the threads begin at the same moment."""
    start = Barrier(WORKERS)
    with ThreadPoolExecutor(WORKERS, initializer=start.wait) as executor:
        return list(executor.map(function, items))


@pytest.mark.parametrize("name", ROWS)
def test_scores_are_those_of_one_thread(name):
    process, row = definition(name)["process_results"], ROWS[name]
    asked = list(itertools.product(range(10), (*ANSWERS, *EXPLAINED)))

    def score(item):  # as the harness does: a document of its own for each, which its own functions write into
        index, answer = item
        return process(copy.deepcopy(row(index)), [answer])

    alone = [score(item) for item in asked]
    assert len({str(metrics) for metrics in alone}) > 3
    for _ in range(2):
        assert in_threads(score, asked) == alone


@pytest.mark.parametrize("name", ROWS)
def test_scores_of_one_document_do_not_depend_on_who_else_scores_it(name):
    """Several filters, or repeats, may hand the same document to several threads at once."""
    process, row = definition(name)["process_results"], ROWS[name]
    for index in range(4):
        answers = list((*ANSWERS, *EXPLAINED) * 4)
        alone = [process(copy.deepcopy(row(index)), [answer]) for answer in answers]
        shared = row(index)
        assert in_threads(lambda answer, document=shared: process(document, [answer]), answers) == alone


def test_likelihoods_and_readable_answers_are_those_of_one_thread():
    likelihood.install()
    lines = [[Likelihood(-float((7 * i + 3 * j) % 11), j == i % 3) for j in range(4)] for i in range(200)]
    config = SimpleNamespace(process_results=None)

    def process(self, doc, results):
        return [doc, list(results)]  # np.argmin(lls), by which the harness's own is known

    wrapped = likelihood._scoring_likelihoods(process)
    for kind in ("multiple_choice", "generate_until"):
        task = SimpleNamespace(config=config, OUTPUT_TYPE=kind)
        score = lambda item, task=task: wrapped(task, item[0], item[1])  # noqa: E731
        items = list(enumerate(lines))
        assert in_threads(score, items) == [score(item) for item in items]
    assert ConfigurableTask.process_results.wrapped_by_qvlm
    texts = [*ANSWERS, *EXPLAINED] * 20
    readable = lambda text: is_readable("qvlm_scienceqa", text)  # noqa: E731
    assert in_threads(readable, texts) == [readable(text) for text in texts]
