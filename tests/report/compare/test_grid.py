import pytest

from qvlm_plugin.errors import QVLMError
from qvlm_plugin.report.compare.grid import cells, read_grid

FLAGS = {"models": ("demo", "org/model"), "methods": ("none", "rtn", "qvlm"), "schemes": ("w4a4", "w6a6+vision:w8a8")}
FLAGS |= {"tasks": ("quiz", "exam")}


def test_every_combination_once_and_full_precision_beside():
    found = cells(read_grid(None, FLAGS | {"limit": 7, "calibration": "x.json:4"}))
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
    (_, cell) = cells(read_grid(file, {"limit": 9, "tasks": None}))
    assert cell.limit == 9 and cell.tasks == ("quiz",)
    assert cell.model_args == {
        "pretrained": "demo", "method": "qvlm", "scheme": "w4a4", "calibration": "scienceqa:train:64", "beam": "2",
        "veo": "false", "dtype": "float16",
    }  # fmt: skip


@pytest.mark.parametrize(
    "text, message",
    [
        ("models: [a]\nmethods: [b]\ntasks: [c]", "schemes: is missing; allowed are models, methods"),
        ("models: [a]\nmethods: [b]\nschemes: [w4a4]\ntasks: []", "tasks: tuple should have at least 1 item"),
        (
            "models: [a, a]\nmethods: [b]\nschemes: [w4a4]\ntasks: [c]",
            "models: value error, each name must be there once",
        ),
        ("modells: [a]\nmodels: [a]\nmethods: [b]\nschemes: [w4a4]\ntasks: [c]", "modells: is no key"),
        ("[1, 2]", "must hold keys and values"),
        ("a: [", "is not a YAML file"),
    ],
)
def test_mistakes(tmp_path, text, message):
    file = tmp_path / "grid.yaml"
    file.write_text(text)
    with pytest.raises(QVLMError) as caught:
        read_grid(file, {})
    assert message in str(caught.value) and "\n" not in str(caught.value)
