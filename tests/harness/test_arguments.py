from types import SimpleNamespace

import pytest
from lmms_eval import evaluator
from lmms_eval.tasks import TaskManager
from lmms_eval.utils import simple_parse_args_string

from qvlm_plugin.errors import QVLMError
from qvlm_plugin.harness.arguments import parse_arguments
from qvlm_plugin.harness.manifest import manifests
from qvlm_plugin.harness.refused_options import _refusing
from qvlm_plugin.harness.wrapper import QVLMChat, QVLMSimple


def parse(text):
    """As the harness does: split and guess types, then hand over."""
    return parse_arguments(simple_parse_args_string(text))


def test_values_as_the_harness_guesses_them():
    arguments = parse(
        "pretrained=a/b,trust_remote_code=False,allow_overlap=true,seed=007,revision=None,device_map=auto,"
        "method=rtn,scheme=w4a4+vision:w8a8,calibration=scienceqa:train:8+x.json:4,group_size=64,symmetric=true"
    )
    assert (arguments.batch_size, arguments.seed, arguments.device_map) == (1, 7, "auto")
    assert (arguments.trust_remote_code, arguments.allow_overlap, arguments.revision) == (False, True, None)
    assert arguments.scheme == "w4a4+vision:w8a8"
    assert arguments.options == {"group_size": 64, "symmetric": True}


def test_defaults_and_none():
    arguments = parse_arguments({"pretrained": "x", "batch_size": "4"})  # --batch_size arrives as text
    assert (arguments.method, arguments.batch_size, arguments.dtype) == ("none", 4, "auto")
    assert arguments.cache is not None and parse("pretrained=x,cache=none").cache is None
    assert parse("pretrained=x,method=none").method == "none"
    assert parse("pretrained=x,system_prompt=None,device=none").device is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("method=rtn", "pretrained= is missing"),
        (
            "pretrained=x,method=magic",
            "method='magic' is not known; allowed are awq, gptq, mbq, none, qlora, quarot, qvlm, ",
        ),
        ("pretrained=x,colour=red", "unknown model argument 'colour'; allowed are pretrained, revision"),
        ("pretrained=x,method=rtn,grupsize=4", "unknown model argument 'grupsize'.*for method=rtn: .*group_size"),
        ("pretrained=007", "pretrained=7: lmms-eval reads this value as a number.*write a folder as ./NAME"),
        ("pretrained=x,revision=1.10", "revision=1.1: .*full commit hash"),
        ("pretrained=x,seed=-1", "seed=-1"),
        ("pretrained=x,allow_overlap=maybe", "allow_overlap='maybe': .*boolean"),
        ("pretrained=x,device_map=offload", "works only for searches.*evaluate it with plan=DIR"),
        ("pretrained=x,plan=d,method=rtn,seed=1", "plan=DIR is a finished plan.*method, seed"),
    ],
)
def test_bad_arguments_are_one_line(text, message):
    with pytest.raises(QVLMError, match=message) as caught:
        parse(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("pretrained=x,batch_size=8", {"batch_size": 1}, "batch_size is an option of lmms-eval: write --batch_size 8"),
        ("pretrained=x,device=cpu", {"batch_size": 1, "device": "cuda:0"}, "device is given twice: --device cuda:0"),
        ("pretrained=x", {"batch_size": "0"}, "batch_size='0': .*greater than or equal to 1"),
        ("pretrained=x", {"batch_size": "auto"}, "batch_size='auto': .*integer"),
        ("pretrained=x", {"batch_size": 1, "max_batch_size": 8}, "--max_batch_size is not supported.* --batch_size 8"),
    ],
)
def test_options_of_the_harness_are_given_once_and_there(text, options, message):
    """As lmms-eval makes the model: of its text, and of options that it passes on."""
    with pytest.raises(QVLMError, match=message) as caught:
        QVLMChat.create_from_arg_string(text, {"max_batch_size": None, "device": None, **options})
    assert "\n" not in str(caught.value)


def test_the_harness_makes_the_model(tiny_llava):
    model = QVLMChat.create_from_arg_string(
        f"pretrained={tiny_llava},dtype=float32,device=cpu", {"batch_size": "3", "max_batch_size": None, "device": None}
    )
    assert (model.batch_size, model.device.type) == (3, "cpu")


def test_a_system_instruction_is_refused_before_a_model_is_made():
    manifests()
    TaskManager("ERROR")  # as lmms-eval makes one before it evaluates
    for model, wanted in (("qvlm_llava", QVLMError), ("no_such_model", Exception)):
        with pytest.raises(wanted) as caught:
            evaluator.simple_evaluate(model=model, tasks=[], system_instruction="Be brief.")
        assert ("system_prompt=TEXT" in str(caught.value)) == (model == "qvlm_llava")


def test_a_system_instruction_is_refused_for_a_model_that_is_made_already(tiny_llava):
    model = QVLMChat(pretrained=str(tiny_llava), dtype="float32", device="cpu")
    with pytest.raises(QVLMError, match="system_prompt=TEXT"):
        evaluator.evaluate(lm=model, task_dict={}, system_instruction="Be brief.")


@pytest.mark.parametrize("wrapper, refused", [(QVLMChat, True), (QVLMSimple, False)])
def test_fewshot_examples_are_refused_in_the_chat_format(tiny_llava, wrapper, refused):
    model = wrapper(pretrained=str(tiny_llava), dtype="float32", device="cpu")
    config = {"num_fewshot": 2}
    task = SimpleNamespace(get_config=config.get, dump_config=lambda: config, VERSION=1)
    evaluate = _refusing(lambda **_: "evaluated")
    if refused:
        with pytest.raises(QVLMError, match=r"task quiz has 2 examples.*--force_simple"):
            evaluate(lm=model, task_dict={"group": {"quiz": task}})
        config |= {"num_fewshot": 0, "output_type": "multiple_choice"}
        with pytest.raises(QVLMError, match=r"task quiz scores by likelihood.*--force_simple"):
            evaluate(lm=model, task_dict={"group": {"quiz": task}})
        config["output_type"] = "generate_until"
    assert evaluate(lm=model, task_dict={"group": {"quiz": task}}) == "evaluated"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scheme": "four bits", "method": "rtn"}, "scheme='four bits'"),
        ({"scheme": "w9a4", "method": "rtn"}, "9 bits; allowed are 2 to 8"),
        ({"backend": "abacus"}, "backend='abacus' is not known; allowed are .*reference"),
        ({"device": "toaster"}, "device='toaster' is not a device"),
        ({"device": "cuda:99"}, "this machine has .* CUDA devices"),
        ({"plan": "nowhere"}, "plan='nowhere': plan.json is missing"),
        ({"method": "rtn", "calibration": "x.json:4"}, "calibration='x.json': there is no such file"),
        ({"method": "rtn", "calibration": "scienceqa"}, "neither task:split:n"),
        ({"method": "rtn", "group_size": -7}, "group_size=-7 is not allowed"),
    ],
)
def test_bad_requests_fail_before_weights_are_loaded(monkeypatch, arguments, message):
    monkeypatch.setattr(
        "qvlm_plugin.harness.preparation.open_checkpoint", lambda *_, **__: pytest.fail("read before checking")
    )
    with pytest.raises(QVLMError, match=message) as caught:
        QVLMChat(pretrained="x", **arguments)
    assert "\n" not in str(caught.value)


def test_missing_calibration_and_checkpoint(tiny_llava, tmp_path):
    with pytest.raises(QVLMError, match="needs calibration"):
        QVLMChat(pretrained=str(tiny_llava), device="cpu", method="rtn", calibration="none", cache="none")
    with pytest.raises(QVLMError, match=r"config\.json is missing"):
        QVLMChat(pretrained=str(tmp_path), device="cpu")


def test_plan_of_another_model(tiny_llava, tmp_path):
    from tiny_llava import write_tiny_llava

    from qvlm_plugin.models.loading import load
    from qvlm_plugin.plan_request import check_request
    from qvlm_plugin.planning import obtain_plan

    other = load(str(write_tiny_llava(tmp_path / "other", seed=1)), dtype="float32")
    obtain_plan(other, check_request("rtn", "w4a16", {}), None, None).save(tmp_path / "plan")
    with pytest.raises(QVLMError, match="plan was made for another model"):
        QVLMChat(pretrained=str(tiny_llava), device="cpu", plan=str(tmp_path / "plan"))
