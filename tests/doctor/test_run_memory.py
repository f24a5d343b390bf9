from qvlm_plugin.doctor.needs import open_skeleton, search_peaks, weight_needs
from qvlm_plugin.doctor.run_memory import TOKENS, opening_of, run_memory
from qvlm_plugin.doctor.space import HEADROOM
from qvlm_plugin.methods.peak import Setting
from qvlm_plugin.plan_request import check_request


def test_a_run_needs_its_weights_and_the_peak_of_its_search(tiny_llava):
    request = check_request("qvlm", "w4a4", {})
    arguments = {"pretrained": str(tiny_llava), "calibration": "a.json:8+b.json:24", "dtype": "float32"}
    skeleton = open_skeleton({"pretrained": str(tiny_llava)})
    needs = weight_needs(skeleton, request.scheme)
    found = run_memory(skeleton, arguments, request)
    assert found.evaluation == 2 * needs.full * HEADROOM  # float32; the reference arithmetic does not pack weights
    assert found.search == max(peak.bytes for peak in search_peaks(skeleton, request, Setting(32, TOKENS, element=4)))
    assert run_memory(skeleton, arguments | {"backend": "packed"}, request).evaluation == needs.packed * HEADROOM


def test_full_precision_is_neither_packed_nor_searched(tiny_llava):
    request = check_request("none", "w16a16", {})
    arguments = {"pretrained": str(tiny_llava), "backend": "packed", "dtype": "float16"}
    skeleton = open_skeleton(opening_of(arguments))
    found = run_memory(skeleton, arguments, request)
    assert found.search == 0 and found.evaluation == weight_needs(skeleton, request.scheme).full * HEADROOM
