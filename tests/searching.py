"""A search's context for tests of its steps."""

from qvlm_plugin import plugins
from qvlm_plugin.methods.context import SearchContext
from qvlm_plugin.methods.observe import visit_site_inputs
from qvlm_plugin.methods.options import MethodOptions
from qvlm_plugin.scheme import Scheme


def context_of(loaded, calibration=None, scheme="w4a4", **options):
    """The context of a search in batches of two, unless the options say otherwise."""
    chosen = MethodOptions(**{"calibration_batch_size": 2, **options})
    topology = plugins.topology(loaded.model.config)
    return SearchContext(loaded, topology, Scheme.parse(scheme), chosen, calibration, "test")


def inputs_of(context, sites):
    """What each site reads over the calibration set, a list of tokens [N, C] for each batch."""
    return visit_site_inputs(context, sites, lambda site, x: [x.clone()], "look")
