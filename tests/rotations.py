"""Plans that rotate inputs."""

from dataclasses import replace

import torch

from qvlm_plugin.rotation import rotation_of


def rotated(plan, sites=None, seed=3):
    """The plan with a rotation at every site whose inputs can be rotated, or at ``sites``.

    Every second one is scaled, where the plan has no fold of the site.
    """
    found, tensors, folded = {}, dict(plan.tensors), {fold.site for fold in plan.folds}
    generator = torch.Generator().manual_seed(seed)
    for module in plan.modules:
        if module.site and module.site not in found and (sites is None or module.site in sites):
            rotation = rotation_of(module.site, module.shape[1], seed)
            if len(found) % 2 == 0 and module.site not in folded:
                rotation = rotation.model_copy(update={"scaled": True})
                tensors[f"{module.site}/scale"] = 0.5 + torch.rand(module.shape[1], generator=generator)
            if sites is not None or rotation.obstacle(module) is None:
                found[module.site] = rotation
    return replace(plan, rotations=tuple(found.values()), tensors=tensors)


def by_token(plan):
    """The plan with dynamic ranges of tokens at all sites, in place of static ones of channels."""
    modules, tensors = [], dict(plan.tensors)
    for module in plan.modules:
        if module.activation.kind == "static_channel":
            activation = module.activation.model_copy(update={"kind": "dynamic_token"})
            module = module.model_copy(update={"activation": activation})
            tensors[f"{module.site}/clip_ratio"] = torch.ones(1)
        modules.append(module)
    return replace(plan, modules=tuple(modules), tensors=tensors)
