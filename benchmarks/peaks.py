"""The peak memory of each method's search at real sizes, computed by `qvlm_plugin.methods.peak` without running it.

python benchmarks/peaks.py
"""

import argparse

from random_llava import LAYOUTS, config_of

from qvlm_plugin import plugins
from qvlm_plugin.methods.footprint import Footprint
from qvlm_plugin.methods.peak import Setting, Shapes, peaks
from qvlm_plugin.models.placement import empty_model
from qvlm_plugin.plan_request import check_request
from qvlm_plugin.report.results import Grid

SETTINGS = {
    "GB": {},
    "caches on the CPU": {"footprint": Footprint(caches_on_cpu=True)},
    "weights offloaded": {"footprint": Footprint(caches_on_cpu=True), "offloaded": True},
}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--layouts",
        default="llava-1.5-7b,llava-1.5-13b",
        help=f"sizes of models, separated by commas: {', '.join(LAYOUTS)}",
    )
    parser.add_argument(
        "--methods", default="rtn,qlora,awq,qvlm,qvlm_jacobian,qvlm_rotated", help="separated by commas"
    )
    parser.add_argument("--scheme", default="w4a4", help="bits of weights and activations")
    parser.add_argument("--samples", type=int, default=64, help="number of calibration samples")
    parser.add_argument("--tokens", type=int, default=600, help="tokens of the longest sample")
    arguments = parser.parse_args()
    rows = []
    for layout in arguments.layouts.split(","):
        config = config_of(layout)
        shapes = Shapes.of(empty_model(config), plugins.topology(config))
        for name in arguments.methods.split(","):
            request = check_request(name, arguments.scheme, {})
            cells = []
            for more in SETTINGS.values():
                setting = Setting(arguments.samples, arguments.tokens, **more)
                found = peaks(shapes, request.method, request.scheme, request.options, setting)
                worst = max(found, key=lambda peak: peak.bytes)
                cells.append(f"{worst.bytes / 1e9:.1f} ({worst.step})")
            rows.append((layout, name, *cells))
    print(Grid(("layout", "method", *SETTINGS), tuple(rows)).markdown())


if __name__ == "__main__":
    main()
