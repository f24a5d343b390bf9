import datasets
import pytest
from doctor.overlay import write_package

from qvlm_plugin.doctor import arithmetic
from qvlm_plugin.doctor.fault import LOCK, read_fault

REQUIRES = ["faulty_one>=2,<4.3", 'absent-one>=1.5; extra == "nf"', "torch>=2"]
FRAMES = f"""\
2026-11-27 10:00:00 | INFO | harness - begins
Traceback (most recent call last):
  File "{datasets.__file__}", line 583, in evaluate
    results = evaluate()
              ^^^^^^^^^^
  File "<frozen importlib._bootstrap>", line 1204, in _gcd_import
"""
AFTER = "\n\x1b[31mERROR\x1b[0m | harness - Error during evaluation. Please set --verbosity=DEBUG.\n"


@pytest.fixture(autouse=True)
def installed(monkeypatch, tmp_path):
    """A package of a version that is not allowed, and what this one requires."""
    write_package(tmp_path, "faulty_one", "4.3.1")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("importlib.metadata.requires", lambda name: REQUIRES)


@pytest.mark.parametrize(
    ("error", "package", "remedy"),
    [
        ("ModuleNotFoundError: No module named 'faulty_one._api'", "faulty_one", "pip install 'faulty_one>=2,<4.3'"),
        ("ImportError: cannot import name 'a b' from 'torch.nn' (/x.py)", "torch", LOCK),
        ("ImportError: cannot import name 'a' from partially initialized module 'torch'", "torch", LOCK),
        ("AttributeError: module 'torch.cpu' has no attribute 'gone'", "torch", LOCK),
        ("ModuleNotFoundError: No module named 'absent_one'", "absent_one", "pip install 'absent-one>=1.5'"),
        ("ModuleNotFoundError: No module named 'unheard_of'", "datasets", LOCK),
        ("some.package.Trouble: said\n  in two lines", "datasets", LOCK),
    ],
)
def test_the_package_that_lacks_a_name_is_blamed_before_the_one_that_raised(error, package, remedy):
    fault = read_fault(FRAMES + error + AFTER)
    assert (fault.package, fault.remedy) == (package, remedy)
    assert str(fault).startswith(error.splitlines()[0]) and f"({package} " in str(fault)
    assert ("4.3.1)" in str(fault)) == (package == "faulty_one")
    assert ("is not installed)" in str(fault)) == (package == "absent_one")


def test_the_cause_decides_and_the_last_traceback_counts():
    earlier = FRAMES + "KeyError: 'that was caught'\nand on it went\n"
    cause = FRAMES + "ModuleNotFoundError: No module named 'faulty_one.gone'\n"
    link = "\nThe above exception was the direct cause of the following exception:\n\n"
    fault = read_fault(earlier + cause + link + FRAMES.partition("\n")[2] + "ImportError: no Model" + AFTER)
    assert fault.package == "faulty_one" and "caught" not in fault.error
    assert fault.error.startswith("ImportError: no Model") and "'faulty_one.gone'" in fault.error


def test_errors_of_this_package_blame_no_other():
    fault = read_fault(f'{FRAMES}  File "{arithmetic.__file__}", line 1, in check\nValueError: ours{AFTER}')
    assert str(fault) == "ValueError: ours" and fault.remedy == LOCK


@pytest.mark.parametrize(
    ("log", "error"),
    [
        ("loading\nFatal Python error: Segmentation fault\n\nCurrent thread 0x1 (most recent call first):\n", "Fatal"),
        ("10 %\r20 %\r\x1b[1mkilled\x1b[0m\n\n", "it stopped without a traceback; the last line is: killed"),
        ("", "it stopped without a traceback; the last line is: nothing was printed"),
        ("Traceback (most recent call last):\n", "Traceback"),
    ],
)
def test_logs_without_a_complete_traceback(log, error):
    assert read_fault(log).error.startswith(error) and read_fault(log).remedy == LOCK


def test_a_harness_that_is_not_there_is_named(monkeypatch):
    assert read_fault("/bin/python: No module named absent_one").remedy == "pip install 'absent-one>=1.5'"
