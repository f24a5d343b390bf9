"""How many hostile inputs there are: a fixed few in the suite, many and ever new ones with `make fuzz`."""

from hypothesis import HealthCheck, Phase, settings

settings.register_profile(
    "suite", derandomize=True, database=None, deadline=None, max_examples=100, phases=(Phase.explicit, Phase.generate),
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
settings.register_profile("fuzz", settings.get_profile("suite"), derandomize=False, max_examples=1_500, print_blob=True)
settings.load_profile("suite")
