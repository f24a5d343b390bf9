"""The page in a real browser, without network."""

import random

import pytest
from report.leaderboard.browser import opened
from report.leaderboard.written import DATA, content, provenance, samples, write, write_run

from qvlm_plugin.report.leaderboard.write import write_leaderboard

HOSTILE = (
    "</script><img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>|`[x](javascript:0)"
)
ACCURACY = {"none": 90, "rtn": 60, "qlora": 70, "awq": 72, "qvlm": 80}
CLASSES = ("NAT", "SOC", "LAN", "TXT", "IMG", "NO")


@pytest.fixture(scope="module")
def board(tmp_path_factory):
    """A leaderboard of two real evaluations, a stand-in, a hostile name and a broken file; returns its folder."""
    folder = tmp_path_factory.mktemp("board")
    generator = random.Random(0)
    for number, ((method, accuracy), bits) in enumerate((one, b) for one in ACCURACY.items() for b in (16, 6, 4)):
        if (method == "none") != (bits == 16):
            continue
        scheme, task = f"w{bits}a{bits}", "qvlm_scienceqa"
        right = min(accuracy + (15 if bits == 6 else 0), 89) if bits < 16 else accuracy
        scores = [1] * right + [0] * (100 - right)
        facts = provenance(method, scheme, packed_bytes=bits * 1_000_000 + number, data={task: DATA})
        facts["backend"] = "reference" if bits == 6 else "packed"
        if bits < 16:
            facts["calibration"] = {"source": "scienceqa:train:64", "seed": 0}
        classes = {name: min(1, right / 100 + generator.uniform(-0.05, 0.05)) for name in CLASSES}
        whole = content(scores, facts, task=task, metrics=classes | {"parse_failure": 0.01})
        whole["throughput"] = {"avg_speed": 30.0 + 5 * number}
        rows = [row | classes | {"parse_failure": 0.01} for row in samples(scores)]
        del whole["qvlm"]["seal"]
        write(folder / f"{method}-{scheme}", whole, rows, task=task)
    write_run(folder / "hostile", [1] * 65 + [0] * 35, None, task="qvlm_scienceqa", model_name=HOSTILE)
    write_run(folder / "broken", [1]).write_text("{")
    stand_in = {"quiz": DATA | {"stand_in": True}}
    for name, method, rating in (("small", "rtn", 1280.25), ("plain", "none", 1480.5)):
        facts = provenance(method, "w4a4", data=stand_in, stand_in=True)
        write_run(folder / name, [1, 0, 1], facts, metrics={"mme_perception_score": rating})
    write_leaderboard([folder], folder, with_reported=True)
    return folder


@pytest.fixture(scope="module")
def desk(board, tmp_path_factory):
    with opened(board / "leaderboard.html", tmp_path_factory.mktemp("profile")) as page:
        yield page


def column(page, name):
    names = ["rank", "model", "method", "scheme", "bits", "score", "drop", "weights", "peak", "speed", "search"]
    return [row[names.index(name)] for row in page.table()]


def test_rows_come_ranked(desk):
    desk.choose("search", "")
    assert column(desk, "rank") == sorted(column(desk, "rank"), key=int) and len(desk.table()) == 10
    assert desk.table()[0][2:4] == ["none", "w16a16"] and desk.table()[0][5].startswith("90.0")
    assert "−10.0" in column(desk, "drop")
    assert "qvlm_scienceqa" in desk.run("document.querySelector('caption').textContent")


def test_sorting_by_a_click(desk):
    desk.click("#runs th:nth-child(8) button")
    ascending = [float(text.split()[0]) for text in column(desk, "weights") if text]
    assert ascending == sorted(ascending) and column(desk, "weights")[-1] == ""
    desk.click("#runs th:nth-child(8) button")
    descending = [float(text.split()[0]) for text in column(desk, "weights") if text]
    assert descending == ascending[::-1] and column(desk, "weights")[-1] == ""  # what is not known stays last
    assert desk.run("document.querySelector('#runs th:nth-child(8)').ariaSort") == "descending"
    desk.click("#runs th:nth-child(1) button")


def test_filters(desk):
    desk.choose("method", "qvlm")
    assert set(column(desk, "method")) == {"qvlm"} and len(desk.table()) == 2
    desk.choose("scheme", "w4a4")
    assert len(desk.table()) == 1 and "1 of 10" in desk.run("document.getElementById('count').textContent")
    desk.choose("method", "all")
    assert len(desk.table()) == 4
    desk.choose("scheme", "all")
    desk.choose("search", "AWQ w6")
    assert [row[2:4] for row in desk.table()] == [["awq", "w6a6"]]
    desk.choose("search", "nothing like it")
    assert desk.table() == []
    desk.choose("search", "")


def test_metrics_and_plots(desk):
    points = "[...document.querySelectorAll('#memory circle.point')].length"
    assert desk.run(points) == 9  # the other package's model does not tell its size
    # Six bits are simulated here, which takes no time that says anything.
    simulated = sum(row[3] == "w6a6" for row in desk.table())
    assert simulated == 4
    assert desk.run("document.querySelectorAll('#speed circle.point').length") == 10 - simulated
    assert not desk.run("document.getElementById('simulated').hidden")
    desk.choose("metric", "parse_failure")
    assert len(desk.table()) == 9 and desk.table()[0][0] == "1"
    desk.choose("metric", "NAT")
    assert "NAT (%) against packed size" in desk.run("document.querySelector('#memory figcaption').textContent")
    desk.choose("metric", "exact_match")
    classes = desk.run("[...document.querySelectorAll('#breakdown th')].map(cell => cell.textContent)")
    assert [name for name in classes if name in CLASSES] == list(CLASSES)


def test_details_link_to_results_and_samples(desk, board):
    desk.click("#runs tbody tr:first-child .more")
    links = desk.run("[...document.querySelectorAll('.facts a')].map(link => link.getAttribute('href'))")
    assert len(links) == 2 and all((board / link).is_file() for link in links)
    desk.click("#runs tbody tr:first-child .more")
    assert desk.run("document.querySelectorAll('.facts').length") == 0


def test_stand_ins_are_another_table_and_say_so(desk):
    labels = desk.run("[...document.querySelectorAll('optgroup')].map(one => [one.label, one.children.length])")
    assert labels == [["Whole benchmarks", 1], ["Stand-in data or a part", 1]]
    assert desk.run("document.getElementById('apart').hidden")
    desk.choose("evaluation", desk.run("document.querySelector('optgroup:last-child option').value"))
    assert len(desk.table()) == 2 and not desk.run("document.getElementById('apart').hidden")
    desk.choose("evaluation", desk.run("document.querySelector('optgroup option').value"))


def test_scores_that_are_no_shares_are_shown_as_they_are(desk, board):
    desk.choose("evaluation", desk.run("document.querySelector('optgroup:last-child option').value"))
    assert column(desk, "score")[0].startswith("66.7 ± ")
    desk.choose("metric", "mme_perception_score")
    assert column(desk, "score") == ["1480.5 ± 0.02", "1280.3 ± 0.02"] and column(desk, "drop")[1] == "−200.25"
    assert "(%)" not in desk.run("document.querySelector('#memory figcaption').textContent")
    desk.choose("evaluation", desk.run("document.querySelector('optgroup option').value"))
    markdown = (board / "leaderboard.md").read_text()
    assert "| 1480.5 ± 0.02 |" in markdown and "| 66.7 ± 2.0 |" in markdown


def test_the_papers_tables_are_apart_from_measured_rows(desk):
    assert desk.run("document.querySelectorAll('#reported details').length") == 4
    assert desk.run("document.querySelectorAll('#reported tbody tr').length") == 4 + 21 + 6 + 7
    assert not any("Q-VLM" in cell for row in desk.table() for cell in row)


def test_hostile_names_are_text(desk, board):
    assert HOSTILE in "".join(column(desk, "model"))
    assert desk.run("document.title") == "Leaderboard" and desk.run("document.images.length") == 0
    markdown = (board / "leaderboard.md").read_text()
    assert "<img" not in markdown and "<script" not in markdown
    line = next(line for line in markdown.splitlines() if "onerror" in line)
    assert line.count(" | ") == next(one for one in markdown.splitlines() if "| none |" in one).count(" | ")


def test_nothing_is_fetched_and_nothing_fails(desk):
    assert desk.trouble() == []
    assert "broken/" in desk.run("document.getElementById('problems').textContent")


def test_it_reads_on_a_phone(board, tmp_path):
    with opened(board / "leaderboard.html", tmp_path, width=360, height=740, mobile=True) as page:
        assert page.run("document.documentElement.scrollWidth") <= 360
        assert page.run("getComputedStyle(document.querySelector('#runs thead')).display") == "none"
        first = page.run("getComputedStyle(document.querySelector('#runs td[data-label=rank]'), '::before').content")
        assert "rank" in first
        page.choose("sort", "method")
        assert column(page, "method")[:2] == ["awq", "awq"]
        assert page.trouble() == []
