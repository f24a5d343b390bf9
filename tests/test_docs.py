"""What the documents say is so: commands parse, references are current, links and quotations are there."""

import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path

import lmms_eval.tasks
import pytest
import typer
from lmms_eval.__main__ import parse_eval_args
from typer.core import TyperGroup

from qvlm_plugin import builtin, plugins
from qvlm_plugin.calibration import parse_sources
from qvlm_plugin.cli import app
from qvlm_plugin.commands.arguments import reference
from qvlm_plugin.harness.arguments import ModelArguments, parse_arguments
from qvlm_plugin.harness.manifest import MODEL_IDS
from qvlm_plugin.models.prompts import PROMPT_FORMATS
from qvlm_plugin.scheme import Scheme

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
OURS = ("qvlm_scienceqa", "qvlm_scienceqa_lepa")
COMMAND = typer.main.get_command(app)
SHELL = ("bash", "console")


@pytest.fixture
def example(monkeypatch):
    """The example package, as if it were installed."""
    specification = importlib.util.spec_from_file_location("qvlm_example", DOCS / "example-plugin" / "qvlm_example.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    manager = plugins.create_manager(builtin, module)
    monkeypatch.setattr(plugins, "plugin_manager", lambda: manager)


def code_blocks(page):
    return re.findall(r"^```(\w+)\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def commands(block):
    """The command lines of a shell block, without prompts, comments and continuations."""
    lines = block.replace("\\\n", "").splitlines()
    split = (shlex.split(line.removeprefix("$ "), comments=True) for line in lines)
    return [words for words in split if words]


def check(words, monkeypatch):
    """Parse a command as the program that it calls would; nothing runs."""
    match words:
        case ["qvlm", *rest]:
            command = COMMAND
            while isinstance(command, TyperGroup):
                context = command.make_context("qvlm", rest)
                rest = [*context._protected_args, *context.args]
                name, command, rest = command.resolve_command(context, rest)
            command.make_context(name, rest)
        case ["lmms-eval", *rest] | ["torchrun", "--nproc_per_node", _, "-m", "lmms_eval", *rest]:
            monkeypatch.setattr(sys, "argv", ["lmms-eval", *rest])
            _, given = parse_eval_args()
            assert given.model in MODEL_IDS and given.tasks
            parse_arguments(dict(pair.split("=", 1) for pair in given.model_args.split(",")))
        case ["make", target, *_]:
            assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
        case ["python", script, *_]:
            assert (ROOT / script).is_file()
        case ["pip", "install", *_, place] if not place.startswith("qvlm_plugin"):
            assert (ROOT / place).is_dir()
        case ["vllm", "serve", _]:
            pass  # is not installed here
        case _:
            raise AssertionError(f"unknown program in {words}")


SHELL_BLOCKS = [
    (page, block)
    for page in PAGES
    if page.name not in ("reproduce.md", "arguments.md")  # rows that call a function; what the commands' own help says
    for language, block in code_blocks(page)
    if language in SHELL
]


def documented(*start):
    """Page and arguments of each command that runs Python with a script and these arguments first."""
    found = ((page, words) for page, block in SHELL_BLOCKS for words in commands(block))
    return [(page, words[1:]) for page, words in found if words[: 1 + len(start)] == ["python", *start]]


@pytest.mark.parametrize(("page", "block"), SHELL_BLOCKS, ids=lambda value: getattr(value, "stem", "")[:40])
def test_commands_parse_and_say_what_they_need(page, block, example, monkeypatch):
    for words in commands(block):
        check(words, monkeypatch)
        named = [re.split(r"pretrained[= ]", " ".join(words))[1]] if "pretrained" in " ".join(words) else []
        needs_hub = any(re.match(r"[\w-]+/[\w.-]+-hf|liuhaotian/", name) for name in named)
        assert not needs_hub or "# needs a hub" in block, words


def test_every_example_in_the_help_parses(example, monkeypatch):
    examples = re.findall(r"^```bash\n(.*?)\n```", page_of_arguments(), re.MULTILINE)
    assert len(examples) > 15
    for example_line in examples:
        words = shlex.split(example_line.partition(" > ")[0])
        if words[0] == "qvlm":
            check(words, monkeypatch)


def page_of_arguments():
    return reference(ModelArguments, plugins.methods(), COMMAND)


def test_the_reference_of_arguments_is_current(monkeypatch):
    manager = plugins.create_manager(builtin)
    monkeypatch.setattr(plugins, "plugin_manager", lambda: manager)
    page = page_of_arguments()
    assert (DOCS / "arguments.md").read_text() == page, "run: qvlm arguments > docs/arguments.md"
    rows = re.findall(r"^\| `.*", page, re.MULTILINE)
    assert len(rows) > 100 and not [row for row in rows if row.endswith("|  |")]  # everything is explained


def test_options_of_other_packages_are_listed(example):
    assert "share of the calibrated range that activations keep" in page_of_arguments()


def test_quoted_code_is_the_example_packages(example):
    blocks = [block for language, block in code_blocks(DOCS / "add-a-method.md") if language in ("python", "toml")]
    source = "".join(file.read_text() for file in (DOCS / "example-plugin").glob("*.*") if file.is_file())
    assert len(blocks) == 3 and all(block in source for block in blocks)


def test_quoted_messages_are_in_the_code():
    quoted = re.findall(r"^\| `([^`]+)` \|", (DOCS / "troubleshooting.md").read_text(), re.MULTILINE)
    source = "".join(file.read_text() for file in (ROOT / "qvlm_plugin").rglob("*.py"))
    assert len(quoted) > 30
    assert not [message for message in quoted if message not in source]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(((?!\w+://)[^)#]*)(?:#([^)]*))?\)", page.read_text())
    for file, section in links:
        target = page.parent / file if file else page
        assert target.exists(), file
        assert not section or section in sections(target), (file, section)


def sections(page):
    """The names by which links refer to a page's headings."""
    prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)", prose, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_what_is_chosen_by_was_measured():
    measured = (DOCS / "results-demo.md").read_text() + (DOCS / "performance.md").read_text()
    measured = " ".join(measured.replace(" points", "").split())
    table = [line for line in (DOCS / "choose.md").read_text().splitlines() if re.match(r"\| (bf16|W\d)", line)]
    figures = re.findall(r"[-+]\d+\.\d \[.*?\]|\d+\.\d+ GB|× \d\.\d+", "\n".join(table))
    assert len(figures) > 10 and not [figure for figure in figures if figure not in measured]


def test_the_readme_fits_two_screens():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 80


def test_the_readmes_python_is_that_of_the_page_that_a_test_runs():
    (block,) = (block for language, block in code_blocks(ROOT / "README.md") if language == "python")
    assert block == code_blocks(DOCS / "python.md")[0][1]  # which tests/test_api.py runs


def test_the_readmes_results_are_those_of_the_demos_page():
    rows = re.findall(
        r"^\| `(\w+)` \| (\S+ / \d) \| (\S+ ± \S+) \| (.+) \|$", (ROOT / "README.md").read_text(), re.MULTILINE
    )
    assert len(rows) == 5
    of_600, _ = (DOCS / "results-demo.md").read_text().split("\n### On 1,000 documents\n")
    for method, bits, score, draws in rows:
        line = f"| {method} | w4a4 | {bits} | 64 | 3 | average | {score} |"
        (row,) = (row for row in of_600.splitlines() if row.startswith(line))
        assert f"({draws})" in row


def test_every_row_of_the_papers_tables_has_a_command_with_valid_arguments():
    page = (DOCS / "reproduce.md").read_text()
    rows = re.findall(r"^evaluate (\S+) (\S+) (table\d/\S+)  # (.+)$", page, re.MULTILINE)
    counts = {
        table: sum(folder.startswith(table) for _, _, folder, _ in rows) for table in ("table2", "table3", "table4")
    }
    assert counts == {"table2": 21, "table3": 14, "table4": 7}
    assert len({folder for _, _, folder, _ in rows}) == len(rows)
    folder_of_tasks = Path(lmms_eval.tasks.__file__).parent
    standard = {file.stem for file in folder_of_tasks.rglob("*.yaml")}
    for given, tasks, folder, figure in rows:
        arguments = parse_arguments(dict(pair.split("=", 1) for pair in given.split(",")))
        assert arguments.conv in PROMPT_FORMATS and re.search(r"\d\d\.\d\d$", figure), folder
        assert all(task in OURS or task in standard for task in tasks.split(",")), folder
        if arguments.method != "none":
            assert str(Scheme.parse(arguments.scheme)) == folder.rpartition("-")[2]
            assert [source.count for source in parse_sources(arguments.calibration)] == [64]


def test_the_function_that_the_rows_call_gives_the_harness_its_arguments(tmp_path):
    function = code_blocks(DOCS / "reproduce.md")[0][1]
    script = 'lmms-eval() { printf "%s\\n" "$@"; }\n' + function + "evaluate a=b,c=d some_task table/row"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    words = done.stdout.split()
    assert words[words.index("--model_args") + 1] == "a=b,c=d" and words[words.index("--tasks") + 1] == "some_task"
    assert words[-1] == "results/table/row"
    more = "evaluate a=b some_task row --gen_kwargs do_sample=true,temperature=0.2"
    done = subprocess.run(["bash", "-c", script + "\n" + more], capture_output=True, text=True, check=True)
    words = done.stdout.split()[len(words) :]
    assert words[words.index("--gen_kwargs") + 1] == "do_sample=true,temperature=0.2" and words[-1] == "results/row"
