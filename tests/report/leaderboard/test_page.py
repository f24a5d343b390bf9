"""The page in a real browser, without network."""

import json
import random

import pytest
from report.leaderboard.browser import find_browser, opened
from report.leaderboard.written import DATA, content, provenance, samples, write, write_run

from qvlm_plugin.report.leaderboard.write import write_leaderboard

pytestmark = pytest.mark.skipif(not find_browser(), reason="the page is tested in a Chromium")

HOSTILE = (
    "</script><img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>|`[x](javascript:0)"
)
ACCURACY = {"none": 90, "rtn": 60, "qlora": 70, "awq": 72, "qvlm": 80}
CLASSES = ("NAT", "SOC", "LAN", "TXT", "IMG", "NO")
TASK = "qvlm_scienceqa"


@pytest.fixture(scope="module")
def board(tmp_path_factory):
    """A leaderboard of two real evaluations, a stand-in, a hostile name and a broken file; returns its folder."""
    folder = tmp_path_factory.mktemp("board")
    generator = random.Random(0)
    for number, ((method, accuracy), bits) in enumerate((one, b) for one in ACCURACY.items() for b in (16, 6, 4)):
        if (method == "none") != (bits == 16):
            continue
        scheme = f"w{bits}a{bits}"
        right = min(accuracy + (15 if bits == 6 else 0), 89) if bits < 16 else accuracy
        scores = [1] * right + [0] * (100 - right)
        facts = provenance(method, scheme, packed_bytes=bits * 1_000_000 + number, data={TASK: DATA, "game": DATA})
        facts["backend"] = "reference" if bits == 6 else "packed"
        if bits < 16:
            facts["calibration"] = {"source": "scienceqa:train:64", "seed": 0}
        classes = {name: min(1, right / 100 + generator.uniform(-0.05, 0.05)) for name in CLASSES}
        whole = content(scores, facts, task=TASK, metrics=classes | {"parse_failure": 0.01})
        whole["throughput"] = {"avg_speed": 30.0 + 5 * number}
        rows = [row | classes | {"parse_failure": 0.01} for row in samples(scores)]
        del whole["qvlm"]["seal"]
        write(folder / f"{method}-{scheme}", whole, rows, task=TASK)
        if bits != 6:
            write_run(folder / f"{method}-{scheme}-game", scores[::-1], facts, task="game")
    write_run(folder / "hostile", [1] * 65 + [0] * 35, None, task=TASK, model_name=HOSTILE)
    write_run(folder / "broken", [1]).write_text("{")
    stand_in = {"quiz": DATA | {"stand_in": True}}
    for name, method, rating in (("small", "rtn", 1280.25), ("plain", "none", 1480.5)):
        facts = provenance(method, "w4a4", data=stand_in, stand_in=True)
        write_run(folder / name, [1, 0, 1], facts, metrics={"mme_perception_score": rating})
    write_leaderboard([folder], folder, with_reported=True)
    return folder


@pytest.fixture(scope="module")
def browser(board, tmp_path_factory):
    with opened(board / "leaderboard.html", tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture
def desk(browser):
    """The page as it opens."""
    browser.run("(document.activeElement?.blur(), location.hash = '')")
    browser.run("new Promise((done) => setTimeout(done, 20))")
    return browser


@pytest.fixture
def science(desk):
    """The page at the evaluation of ten runs."""
    choose_view(desk, TASK)
    return desk


def choose_view(page, text):
    views = page.run("[...document.querySelectorAll('#view option')].map((one) => [one.value, one.textContent])")
    page.choose("view", next(value for value, title in views if text in title))


def column(page, name):
    return [row[name] for row in page.table()]


def sort_by(page, key):
    page.click(f"#runs thead button[data-key={json.dumps(key)}]")


def tick(page, menu, value):
    page.run(f"document.querySelector('#menu-{menu} input[value={json.dumps(value)}]').click()")


def tick_row(page, place):
    page.click(f"#runs tbody tr.run:nth-of-type({place + 2}) input")


# The overview, and one evaluation


def test_the_overview_has_a_column_for_each_benchmark_and_their_mean(desk):
    rows = {(row["method"], row["scheme"]): row for row in desk.table()}
    names = desk.run("[...document.querySelectorAll('#runs thead button')].map((one) => one.textContent)")
    assert names[3:8] == ["rank", "mean of 2 %", "mean difference", "game %", f"{TASK} %"]
    assert rows["none", "w16a16"]["mean"].startswith("90.0 ±") and rows["none", "w16a16"]["rank"] == "1"
    assert rows["qvlm", "w4a4"]["difference"] == "−10.0" and rows["qvlm", "w6a6"]["mean"] == ""
    assert rows["qvlm", "w6a6"]["rank"] == "" and "–" in rows["awq", "w4a4"]["rank"]
    assert column(desk, "mean")[:5] == sorted(column(desk, "mean")[:5], reverse=True) and len(rows) == 10


def test_the_mean_is_that_of_the_benchmarks_shown(desk):
    key = desk.run("document.querySelectorAll('#runs thead th:not(.run) button')[3].dataset.key")
    tick(desk, "columns", key)
    rows = {(row["method"], row["scheme"]): row for row in desk.table()}
    assert "mean of 1" in desk.text("#runs thead") and key not in rows["qvlm", "w6a6"]
    assert rows["qvlm", "w6a6"]["mean"].startswith("89.0") and "rank" not in rows["qvlm", "w6a6"]
    tick(desk, "columns", key)
    tick(desk, "columns", "search")
    assert "4 s" in column(desk, "search")


def test_rows_of_an_evaluation_come_ranked(science):
    rows = science.table()
    assert len(rows) == 10 and (rows[0]["method"], rows[0]["scheme"]) == ("none", "w16a16")
    assert rows[0]["score"].startswith("90.0 ±") and rows[0]["rank"].startswith("1")
    assert {row["difference"] for row in rows} >= {"−10.0", "−1.0", ""}
    assert any("–" in row["rank"] for row in rows) and rows[-1]["rank"].endswith("10")
    classes = [name for name in rows[0] if name.startswith("metric ")]
    assert classes == [f"metric {name}" for name in (*CLASSES, "parse_failure")]


def test_sorting_keeps_the_focus(science):
    sort_by(science, "packed")
    ascending = [float(text.split()[0]) for text in column(science, "packed") if text]
    assert ascending == sorted(ascending) and column(science, "packed")[-1] == ""
    assert science.run("document.activeElement.dataset.key") == "packed"
    science.press("Enter", 13)
    science.run("document.activeElement.click()")
    descending = [float(text.split()[0]) for text in column(science, "packed") if text]
    assert descending == ascending[::-1] and column(science, "packed")[-1] == ""  # what is not known stays last
    assert science.run("document.activeElement.closest('th').ariaSort") == "descending"
    assert science.run("document.activeElement.dataset.key") == "packed"
    sort_by(science, "method")
    assert column(science, "method") == sorted(column(science, "method"), key=lambda name: name if name != "–" else "~")


# Filters


def test_filters(science):
    tick(science, "method", "qvlm")
    assert set(column(science, "method")) == {"qvlm"} and len(science.table()) == 2
    tick(science, "method", "rtn")
    assert (
        set(column(science, "method")) == {"qvlm", "rtn"} and science.text("#menu-method summary") == "method: 2 of 6"
    )
    tick(science, "scheme", "w4a4")
    assert len(science.table()) == 2 and science.text("#count") == "2 of 10 rows"
    science.click("#clear")
    assert len(science.table()) == 10 and science.run("document.activeElement.id") == "search"
    science.choose("search", "AWQ w6")
    assert [(row["method"], row["scheme"]) for row in science.table()] == [("awq", "w6a6")]
    science.choose("search", "")
    science.choose("bits", "5")
    assert set(column(science, "scheme")) == {"w4a4"}
    science.choose("bits", "")
    science.choose("size", "0.007")
    assert set(column(science, "scheme")) == {"w4a4", "w6a6"}


def test_an_empty_result_gives_the_reason(science):
    assert not science.is_shown("#empty")
    science.choose("bits", "3")
    tick(science, "method", "qvlm")
    assert science.table() == [] and science.is_shown("#empty")
    reasons = science.run("[...document.querySelectorAll('#empty li')].map((one) => one.textContent)")
    assert reasons == ["Remove: method qvlm leaves 0 rows", "Remove: at most 3 bits leaves 2 rows"]
    science.click("#empty li:last-child button")
    assert len(science.table()) == 2 and science.run("document.activeElement.id") == "table"


def test_the_address_contains_the_state(science, board, tmp_path):
    tick(science, "method", "qvlm")
    science.choose("search", "w")
    science.choose("metric", "NAT")
    sort_by(science, "scheme")
    tick(science, "columns", "date")
    address, rows = science.run("location.hash"), science.table()
    assert len(rows) == 2 and rows[0]["date"] == "2026-11-21"
    with opened(board / "leaderboard.html", tmp_path, address=address) as page:
        assert page.table() == rows and page.run("document.getElementById('search').value") == "w"
        assert page.run("document.getElementById('metric').value") == "NAT" and page.trouble() == []
        page.run("location.hash = '#view=nonsense&sort=x&compare=1&compare=2&metric=7'")
        page.run("new Promise((done) => setTimeout(done, 20))")
        assert len(page.table()) == 10 and page.trouble() == []


# Plots


def points(page, plot):
    """How many shapes its paths have."""
    return page.run(f"[...document.querySelectorAll('#{plot} .points')].flatMap((one) => "
                    "one.getAttribute('d').match(/M/g)).length")  # fmt: skip


def test_plots(science):
    assert points(science, "plot-size") == 9  # the other package's model does not tell its size
    # Six bits are simulated here, which takes no time that says anything.
    simulated = sum(row["scheme"] == "w6a6" for row in science.table())
    assert simulated == 4 and points(science, "plot-speed") == 10 - simulated
    assert science.is_shown("#simulated")
    science.choose("metric", "NAT")
    assert "NAT (%) against packed size – 9 of 9" not in science.text("#plot-size figcaption")
    assert "NAT (%) against packed size" in science.text("#plot-size figcaption")


def test_no_figure_is_cut_off(tmp_path):
    for number, right in enumerate((50, 97, 100)):
        facts = provenance("rtn", f"w{4 + number}a16", packed_bytes=10**9)
        write_run(tmp_path / str(number), [1] * right + [0] * (100 - right), facts)
    write_leaderboard([tmp_path], tmp_path, with_reported=False)
    with opened(tmp_path / "leaderboard.html", tmp_path / "profile", width=1000) as page:
        text = "[...document.querySelectorAll('#runs tbody td:not(.text)')]"
        assert "100.0 [96.3, 100.0]" in page.run(f"{text}.map((cell) => cell.textContent)")
        cut = page.run(f"{text}.filter((cell) => cell.scrollWidth > cell.clientWidth).map((cell) => cell.textContent)")
        assert cut == []


def test_models_with_equal_names_keep_their_owners(tmp_path):
    for number, model in enumerate(("one/llava", "other/llava", "one/smol", "folder/local/")):
        write_run(
            tmp_path / str(number), [1, 0, 1], provenance("none", "w16a16", pretrained=model, model_fingerprint=model)
        )
    write_leaderboard([tmp_path], tmp_path, with_reported=False)
    with opened(tmp_path / "leaderboard.html", tmp_path / "profile") as page:
        shown = page.run("[...document.querySelectorAll('#runs tbody .model')].map((one) => one.textContent)")
    assert sorted(shown) == ["local", "one/llava", "other/llava", "smol"]


def test_marks_do_not_change_with_filters(science):
    def marks():
        icons = "[...document.querySelectorAll('#runs tbody tr.run')].map((row) => [row.querySelector('.more')"
        return dict(science.run(f"{icons}.textContent, row.querySelector('.icon').innerHTML])"))

    before = marks()
    assert len(set(before.values())) == len(before) == 6
    tick(science, "method", "qvlm")
    assert marks() == {"qvlm": before["qvlm"]}
    choose_view(science, "quiz")
    science.click("#clear")
    assert marks() == {name: before[name] for name in ("none", "rtn")}


def test_the_line_joins_the_pareto_front(science):
    label = science.run("document.querySelector('#plot-size svg').getAttribute('aria-label')")
    best = label.partition("Pareto line: ")[2].split("; ")
    runs = science.run("JSON.parse(document.getElementById('data').textContent).runs")
    sizes = {(run["method"], run["scheme"]): run["packed_bytes"] for run in runs}
    scores = {(row["method"], row["scheme"]): float(row["score"].split()[0]) for row in science.table()}
    everyone = [(sizes[run], score) for run, score in scores.items() if sizes.get(run)]
    unbeaten = [one for one in everyone if not any(a <= one[0] and b >= one[1] and (a, b) != one for a, b in everyone)]
    shown = [(sizes[run], scores[run]) for run in (tuple(one.split(",")[0].split(" ")) for one in best)]
    assert shown == sorted(unbeaten) and len(shown) > 2


# Details, comparison, downloads


def test_details_link_to_results_and_samples_and_give_the_focus_back(science, board):
    science.click("#runs tbody tr.run .more")
    links = science.run("[...document.querySelectorAll('#details a')].map((link) => link.getAttribute('href'))")
    assert len(links) == 2 and all((board / link).is_file() for link in links)
    assert "plan hash" in science.text("#details")
    science.press("Escape", 27)
    assert not science.is_shown("#details") and science.run("document.activeElement.className") == "more"


def test_two_rows_side_by_side_with_the_documents_that_flipped(desk):
    tick_row(desk, 0)
    assert desk.is_shown("#chosen") and desk.run("document.activeElement.type") == "checkbox"
    tick_row(desk, 1)
    assert desk.is_shown("#compare") and desk.run("document.activeElement.id") == "compare-title"
    rows = desk.run("[...document.querySelectorAll('#compare-rows tr')].map((row) => "
                    "[...row.cells].map((cell) => cell.textContent))")  # fmt: skip
    told = {name: cells for name, *cells in rows}
    assert told["method"] == ["none", "qvlm", ""] and told["mean of 2"][2] == "−10.0"
    assert told["packed size"][2] == "× 0.25"
    counts = {kind: int(desk.text(f"#count-{kind}")) for kind in ("broke", "fixed", "changed")}
    assert counts == {"broke": 10, "fixed": 0, "changed": 0}
    assert "exact_match: −10.0 (95 % interval −16.2 to −3.8) on 100 documents" in desk.text("#flips-sum")
    documents = desk.run("[...document.querySelectorAll('#documents > li')].map((one) => one.textContent)")
    assert len(documents) == 10 and all("red scores 1" in one and "blue scores 0" in one for one in documents)
    assert "question 10" in documents[0] and "document 10" in documents[0]
    desk.click("#swap")
    assert desk.text("#count-fixed") == "10" and desk.text("#count-broke") == "0" and desk.is_shown("#no-documents")
    assert "compare=" in desk.run("location.hash")
    desk.click("#compare-close")
    assert not desk.is_shown("#compare") and "compare=" not in desk.run("location.hash")


def test_another_packages_model_can_be_compared(science):
    models = science.run("[...document.querySelectorAll('#runs tbody .model')].map((one) => one.title)")
    tick_row(science, 0)
    tick_row(science, next(place for place, name in enumerate(models) if HOSTILE in name))
    assert science.is_shown("#flips") and not science.is_shown("#no-flips")
    science.click("#compare-close")


def test_downloads_have_the_rows_shown(science):
    science.run(
        "(() => { window.kept = {}; const make = URL.createObjectURL;"
        "URL.createObjectURL = (blob) => { blob.text().then((text) => { window.kept[blob.type] = text; });"
        "return make(blob); }; })()"
    )
    tick(science, "method", "qvlm")
    science.click("#download-csv")
    science.click("#download-json")
    science.run("new Promise((done) => setTimeout(done, 100))")
    kept = science.run("window.kept")
    header, *lines = kept["text/csv"].splitlines()
    assert header.startswith("model,method,scheme,exact_match,difference,") and len(lines) == 2
    assert {row["scheme"] for row in json.loads(kept["application/json"])["rows"]} == {"w4a4", "w6a6"}


# What others wrote


def test_stand_ins_are_another_table_and_say_so(desk):
    labels = desk.run("[...document.querySelectorAll('optgroup')].map((one) => [one.label, one.children.length])")
    assert labels == [["Complete benchmarks", 3], ["Stand-in data or a part", 2]]
    assert not desk.is_shown("#apart")
    choose_view(desk, "quiz")
    assert len(desk.table()) == 2 and desk.is_shown("#apart")


def test_scores_that_are_no_shares_are_shown_as_they_are(desk, board):
    choose_view(desk, "quiz")
    assert column(desk, "score")[0].startswith("66.7 ± ")
    desk.choose("metric", "mme_perception_score")
    assert column(desk, "score") == ["1480.5 ± 0.02", "1280.3 ± 0.02"] and column(desk, "difference")[1] == "−200.25"
    assert "(%)" not in desk.text("#plot-size figcaption")
    markdown = (board / "leaderboard.md").read_text()
    assert "| 1480.5 ± 0.02 |" in markdown and "| 66.7 ± 2.0 |" in markdown


def test_the_papers_tables_are_separate_from_measured_rows(desk):
    assert desk.run("document.querySelectorAll('#reported details').length") == 4
    assert desk.run("document.querySelectorAll('#reported tbody tr').length") == 4 + 21 + 6 + 7
    assert not any("Q-VLM" in cell for row in desk.table() for cell in row.values())


def test_hostile_names_are_text(desk, board):
    shown = desk.run("[...document.querySelectorAll('#runs .model')].map((one) => [one.title, one.textContent])")
    assert [f"{HOSTILE} (other)", f"{HOSTILE.rpartition('/')[2]} (other)"] in shown
    assert desk.run("document.title") == "Leaderboard" and desk.run("document.images.length") == 0
    markdown = (board / "leaderboard.md").read_text()
    assert "<img" not in markdown and "<script" not in markdown
    line = next(line for line in markdown.splitlines() if "onerror" in line)
    table = markdown[: markdown.index(line)].rpartition("\n\n")[2]
    assert line.count(" | ") == table.splitlines()[0].count(" | ")


def test_nothing_is_fetched_and_nothing_fails(desk):
    assert desk.trouble() == []
    assert "broken/" in desk.text("#problems")
    assert "Made 20" in desk.text("footer") and "qvlm_plugin 0." in desk.text("footer")


@pytest.mark.parametrize("width", [360, 800])
def test_it_fits_narrow_screens(board, tmp_path, width):
    with opened(board / "leaderboard.html", tmp_path, width=width, height=740, mobile=width < 500) as page:
        for view in ("Overview", TASK):
            choose_view(page, view)
            assert page.run("document.documentElement.scrollWidth") <= width
            heights = page.run("[...document.querySelectorAll('#runs tbody tr.run')].map((row) => row.offsetHeight)")
            assert len(set(heights)) == 1 and heights[0] < 60
            left = "document.querySelector('#runs tbody th').getBoundingClientRect().left"
            before = page.run(left)
            page.run("document.getElementById('table').scrollLeft = 200")
            assert page.run(left) == before  # names stay in sight
        assert page.trouble() == []


def test_every_control_has_a_name(desk):
    tick_row(desk, 0)
    tick_row(desk, 1)
    tree = desk.send("Accessibility.getFullAXTree")["nodes"]
    roles = {"button", "checkbox", "combobox", "link", "radio", "searchbox", "spinbutton", "textbox", "region"}
    controls = [node for node in tree if node.get("role", {}).get("value") in roles and not node["ignored"]]
    nameless = [node["role"]["value"] for node in controls if not node["name"]["value"].strip()]
    assert len(controls) > 40 and nameless == []
    desk.click("#compare-close")


def test_of_many_rows_those_in_sight_are_there(tmp_path):
    for number in range(260):
        write_run(tmp_path / str(number), [1] * (number % 50) + [0] * (50 - number % 50), provenance(f"m{number}"))
    write_leaderboard([tmp_path], tmp_path, with_reported=False)
    with opened(tmp_path / "leaderboard.html", tmp_path / "profile") as page:
        assert 30 < len(page.table()) < 120 and page.text("#count") == "260 rows"
        sort_by(page, "method")
        seen = set(column(page, "method"))
        for _ in range(30):
            page.run("document.getElementById('table').scrollTop += 400")
            page.run("new Promise((done) => requestAnimationFrame(() => setTimeout(done, 0)))")
            seen |= set(column(page, "method"))
        assert len(seen) == 260
        assert page.run("document.querySelector('#runs tbody tr.run:nth-last-of-type(2)').ariaRowIndex") == "261"
        page.choose("search", "m259")
        assert column(page, "method") == ["m259"] and page.trouble() == []
