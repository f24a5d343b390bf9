"""``transform=rotate``: multiply the input of each site by an orthogonal matrix of its size (`Rotation`).

QuaRot (Ashkboos et al., 2024) merges rotations into the weights where possible. Here every rotation is computed at run
time, which leaves norms unchanged and works in the same way in a vision tower, a projector and any decoder.
"""

from dataclasses import replace

from qvlm_plugin.methods.context import SearchContext
from qvlm_plugin.methods.draft import Draft
from qvlm_plugin.rotation import rotation_of


def rotate_inputs(context: SearchContext, draft: Draft) -> Draft:
    """Add a rotation for every site whose weights or activations the scheme rounds."""
    quantized = dict.fromkeys((*context.weight_sites, *context.activation_sites))
    found = []
    for site in context.sites:
        if site in quantized:
            channels = context.model.get_submodule(site.name).in_features
            rotation = rotation_of(site.name, channels, context.options.rotation_seed)
            found.append(rotation.model_copy(update={"scaled": f"{site.name}/scale" in draft.tensors}))
    return replace(draft, rotations=(*draft.rotations, *found))
