import re

import pytest

from qvlm_plugin.errors import QVLMError
from qvlm_plugin.report.compare.grid import cells, read_grid

FLAGS = {"models": ("demo", "org/model"), "methods": ("none", "rtn", "qvlm"), "schemes": ("w4a4", "w6a6+vision:w8a8")}
FLAGS |= {"tasks": ("quiz", "exam")}


def run_of(flags):
    return [one.cell for one in cells(read_grid(None, flags))]


def test_every_combination_appears_once_and_full_precision_is_added():
    found = run_of(FLAGS | {"limit": 7, "calibration": "x.json:4"})
    assert len(found) == 2 * 2 * (1 + 2 * 2) == len({cell.name for cell in found})
    plain = [cell for cell in found if cell.model_args["method"] == "none"]
    assert len(plain) == 4 and all("calibration" not in cell.model_args for cell in plain)
    others = [cell for cell in found if cell.model_args["method"] != "none"]
    assert all(cell.model_args["calibration"] == "x.json:4" and cell.limit == 7 for cell in others)
    assert all(len(cell.tasks) == 1 and ":" not in cell.name for cell in found)
    searches = [tuple(cell.model_args.items()) for cell in found]
    assert all(searches[i] == searches[i + 1] for i in range(0, len(searches), 2))  # cells of a plan are neighbours


def test_a_file_and_flags_over_it(tmp_path):
    file = tmp_path / "grid.yaml"
    file.write_text(
        "models: [demo]\nmethods: [qvlm]\nschemes: [w4a4]\ntasks: [quiz]\nlimit: 5\n"
        "options: {qvlm: {beam: 2, veo: false}}\nmodel_args: {dtype: float16}\n"
    )
    (_, cell) = (one.cell for one in cells(read_grid(file, {"limit": 9, "tasks": None})))
    assert cell.limit == 9 and cell.tasks == ("quiz",)
    assert cell.model_args == {
        "pretrained": "demo", "method": "qvlm", "scheme": "w4a4", "calibration": "scienceqa:train:64", "beam": "2",
        "veo": "false", "dtype": "float16",
    }  # fmt: skip


def test_resources_of_jobs_override_the_file_one_by_one(tmp_path):
    file = tmp_path / "grid.yaml"
    file.write_text(GRID + "cluster: {gpus: 2, time: 90, sbatch: {account: me, exclusive: true}}\n")
    asked = read_grid(file, {"cluster": {"time": 30, "partition": "short"}}).cluster
    assert (asked.gpus, asked.time, asked.partition, asked.memory) == (2, 30, "short", None)
    assert asked.sbatch == {"account": "me", "exclusive": True}
    assert read_grid(None, FLAGS | {"cluster": {"gpus": 1}}).cluster.time == 1440


def test_each_seed_is_a_cell_if_samples_are_drawn():
    flags = {"models": ("m",), "methods": ("rtn", "awq"), "schemes": ("w4a4", "w4a16"), "tasks": ("quiz", "exam")}
    plain, seeded = run_of(flags), cells(read_grid(None, flags | {"seeds": (0, 1, 2)}))
    runs = dict.fromkeys((one.method, one.scheme, one.seed) for one in seeded)
    assert [*runs] == [
        ("none", "w16a16", None),
        *(("rtn", "w4a4", seed) for seed in range(3)),
        ("rtn", "w4a16", None),  # nothing to draw: weights are rounded as they are
        *(("awq", "w4a4", seed) for seed in range(3)),
        *(("awq", "w4a16", seed) for seed in range(3)),
    ]
    assert [one.cell for one in seeded if one.seed in (None, 0)] == plain  # runs of today are found again
    assert not any("seed" in cell.model_args for cell in plain)
    assert all(one.cell.model_args["seed"] == str(one.seed) for one in seeded if one.seed)
    assert len({one.cell.name for one in seeded}) == len(seeded)
    assert [one.cell.name for one in seeded if one.seed == 2][:2] == ["m/rtn-w4a4-seed2/quiz", "m/rtn-w4a4-seed2/exam"]


def test_options_decide_whether_samples_are_drawn():
    flags = {"models": ("m",), "methods": ("qlora",), "schemes": ("w4a16",), "tasks": ("quiz",), "seeds": (1, 2)}
    assert [one.seed for one in cells(read_grid(None, flags))] == [None, None]
    option = {"bias_correction": True}
    for changes in ({"options": {"qlora": option}}, {"model_args": option}):
        assert [one.seed for one in cells(read_grid(None, flags | changes))] == [None, 1, 2]


def test_a_named_row_gives_its_method():
    flags = {"models": ("m",), "methods": ("rtn", "+ all: two"), "schemes": ("w4a4",), "tasks": ("quiz",)}
    flags |= {"options": {"+ all: two": {"method": "qlora", "bias_correction": True}}}
    *_, plain, named = cells(read_grid(None, flags | {"baseline": "previous"}))
    assert (named.method, named.cell.name) == ("+ all: two", "m/+_all._two-w4a4/quiz")
    changed = {"method": "qlora", "bias_correction": "true"}
    assert named.cell.model_args == plain.cell.model_args | changed and "+" not in str(named.cell.model_args)
    with pytest.raises(QVLMError, match="method='two' is not known"):
        cells(read_grid(None, flags | {"options": {"+ all: two": {"method": "two"}}}))


def test_each_row_may_be_compared_with_the_one_before():
    grid = read_grid(None, FLAGS | {"baseline": "previous"})
    assert [grid.baseline_of(name, "w4a4") for name in grid.methods] == [None, ("none", "w16a16"), ("rtn", "w4a4")]


def test_unknown_names_are_reported_before_anything_runs():
    with pytest.raises(QVLMError, match="rtm"):
        run_of(FLAGS | {"methods": ("rtm",)})
    with pytest.raises(QVLMError, match="colour"):
        run_of(FLAGS | {"options": {"rtn": {"colour": "red"}}})


GRID = "models: [a]\nmethods: [qlora]\nschemes: [w4a4]\ntasks: [c]\n"


@pytest.mark.parametrize(
    "text, message",
    [
        ("models: [a]\nmethods: [b]\ntasks: [c]", "schemes: is missing; allowed are models, methods"),
        ("models: [a]\nmethods: [b]\nschemes: [w4a4]\ntasks: []", "tasks: tuple should have at least 1 item"),
        ("models: [a, a]\nmethods: [b]\nschemes: [w4a4]\ntasks: [c]", "models: values must be unique"),
        (GRID + "seeds: [0, 1, 0]", "seeds: values must be unique"),
        (GRID + "seeds: [-1]", "seeds.0: input should be greater than or equal to 0, not -1"),
        (GRID + "seeds: []", "seeds: tuple should have at least 1 item"),
        (GRID + "seeds: [one]", "seeds.0: input should be a valid integer"),
        (
            GRID + "baseline: awq",
            "grid.yaml: baseline: awq is not among the methods; allowed are none, previous, qlora",
        ),
        (GRID + "name: a/b", "grid.yaml: name: string should match pattern"),
        (GRID + "options: {awq: {}}", "options: awq is not among the methods; allowed are qlora"),
        (GRID + "cluster: slurm", "cluster: input should be a valid dictionary or instance of jobrequest"),
        (GRID + "cluster: {time: 4h}", "cluster.time: input should be a valid integer"),
        (GRID + "cluster: {gpu: 1}", "cluster.gpu: is not a key; allowed are partition, gpus, time"),
        (GRID + "model_args: {seed: 1}", "model_args: give seed=1 in seeds instead"),
        ("modells: [a]\nmodels: [a]\nmethods: [b]\nschemes: [w4a4]\ntasks: [c]", "modells: is not a key"),
        ("[1, 2]", "must have keys and values"),
        ("a: [", "is not a YAML file"),
    ],
)
def test_mistakes(tmp_path, text, message):
    file = tmp_path / "grid.yaml"
    file.write_text(text)
    with pytest.raises(QVLMError) as caught:
        read_grid(file, {})
    assert message in str(caught.value) and "\n" not in str(caught.value)


STORED = "models: [demo]\nmethods: [rtn, theirs, ours]\nschemes: [w4a16, w8a8]\ntasks: [quiz]\nseeds: [0, 1]\n"
STORED += "options: {theirs: {pretrained: a/folder}, ours: {pretrained: b}}\nmodel_args: {dtype: float16}\n"


def test_a_quantized_checkpoint_is_one_row_whatever_the_schemes_and_seeds(tmp_path):
    (tmp_path / "grid.yaml").write_text(STORED)
    grid = read_grid(tmp_path / "grid.yaml", {})
    found = [(one.method, one.scheme, one.seed) for one in cells(grid)]
    assert [one for one in found if one[0] == "rtn"] == [
        ("rtn", "w4a16", None), ("rtn", "w8a8", 0), ("rtn", "w8a8", 1),
    ]  # fmt: skip
    assert found[0] == ("none", "w16a16", None) and found[4:] == [("theirs", "stored", None), ("ours", "stored", None)]
    theirs = cells(grid)[4].cell
    assert theirs.model_args == {"pretrained": "a/folder", "dtype": "float16"} and theirs.name == "demo/theirs/quiz"
    assert grid.baseline_of("theirs", "stored") == ("none", "w16a16")


def test_what_a_quantized_checkpoint_is_compared_with(tmp_path):
    (tmp_path / "grid.yaml").write_text(STORED)

    def baseline_of(method, scheme, **changes):
        return read_grid(tmp_path / "grid.yaml", changes).baseline_of(method, scheme)

    assert baseline_of("theirs", "stored", baseline="rtn", schemes=["w8a8"]) == ("rtn", "w8a8")
    assert baseline_of("rtn", "w8a8", baseline="theirs") == ("theirs", "stored")
    assert baseline_of("ours", "stored", baseline="theirs") == ("theirs", "stored")
    assert baseline_of("ours", "stored", baseline="previous", schemes=["w8a8"]) == ("theirs", "stored")
    for changes, message in (
        ({"baseline": "rtn"}, "--baseline: theirs has its own scheme (pretrained), but rtn has 2"),
        ({"baseline": "previous"}, "theirs has its own scheme (pretrained), but rtn has 2; allowed are"),
        ({"models": ["demo", "other"]}, "--models: theirs is a checkpoint of one model (pretrained)"),
        ({"options": {"theirs": {"pretrained": "x", "method": "rtn"}}}, "theirs is already quantized (pretrained), so"),
    ):
        with pytest.raises(QVLMError, match=re.escape(message)):
            baseline_of("theirs", "stored", **changes)
