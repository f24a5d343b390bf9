"""``transform=rotate``: multiply what each site reads by an orthogonal matrix of its own size (`Rotation`).

QuaRot (Ashkboos et al., 2024) merges rotations into the weights where it can. Here every site's is computed while the
model runs, which takes no norm apart and is the same in a vision tower, a projector and any decoder.
"""

from dataclasses import replace

from qvlm_plugin.methods.context import SearchContext
from qvlm_plugin.methods.draft import Draft
from qvlm_plugin.rotation import rotation_of


def rotate_inputs(context: SearchContext, draft: Draft) -> Draft:
    """A rotation of every site whose weights or activations the scheme rounds."""
    quantized = dict.fromkeys((*context.weight_sites, *context.activation_sites))
    found = []
    for site in context.sites:
        if site in quantized:
            channels = context.model.get_submodule(site.name).in_features
            rotation = rotation_of(site.name, channels, context.options.rotation_seed)
            found.append(rotation.model_copy(update={"scaled": f"{site.name}/scale" in draft.tensors}))
    return replace(draft, rotations=(*draft.rotations, *found))
