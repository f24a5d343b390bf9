import dataclasses

import torch
from searching import context_of, inputs_of

from qvlm_plugin.methods.sampling import sample_tokens


def drawn(loaded, calibration, count, batch_size=2):
    context = context_of(loaded, calibration, calibration_batch_size=batch_size)
    found = sample_tokens(context, context.sites, count)
    assert all((sample.weights == 1).all() for sample in found.values())
    return context.sites, {name: sample.tokens for name, sample in found.items()}


def test_the_sample_is_drawn_from_what_the_sites_read(loaded, calibration):
    sites, sample = drawn(loaded, calibration, 12)
    seen = {site.name: tokens for site, tokens in inputs_of(context_of(loaded, calibration), sites).items()}
    assert sample.keys() == seen.keys()
    for name, tokens in sample.items():
        distances = torch.cdist(tokens, torch.cat(seen[name]), compute_mode="donot_use_mm_for_euclid_dist")
        assert len(tokens) == 12 and distances.amin(dim=1).max() == 0
    _, everything = drawn(loaded, calibration, 10**6)
    for name, tokens in everything.items():
        assert torch.allclose(tokens.sum(dim=0), torch.cat(seen[name]).sum(dim=0), atol=1e-3)
        assert len(tokens) == sum(map(len, seen[name]))


def test_the_sample_depends_on_the_seed_but_not_on_the_batch_size(loaded, calibration):
    (_, sample), (_, larger_batches) = drawn(loaded, calibration, 12), drawn(loaded, calibration, 12, batch_size=5)
    assert all(torch.allclose(sample[name], larger_batches[name], atol=1e-4) for name in sample)
    _, reseeded = drawn(loaded, dataclasses.replace(calibration, seed=1), 12)
    assert not any(torch.allclose(sample[name], reseeded[name], atol=1e-4) for name in sample)


def test_weights_go_with_their_tokens(loaded, calibration):
    """Each decoder layer's tokens are numbered, and carry their number."""
    context = context_of(loaded, calibration)
    batches = list(calibration.batches(loaded.processor, 2))
    numbers = [torch.arange(inputs["input_ids"].numel()).view(inputs["input_ids"].shape) + 1.0 for inputs, _ in batches]
    layers = [[number + 1000 * layer for number in numbers] for layer in range(len(context.layers))]
    found = sample_tokens(context, context.sites, 30, layers)
    seen = inputs_of(context, context.sites)
    for site, tokens in seen.items():
        sample = found[site.name]
        if site.part != "decoder":
            assert (sample.weights == 1).all()
            continue
        masks = [inputs["attention_mask"].bool() for inputs, _ in batches]
        expected = torch.cat([one[mask] for one, mask in zip(layers[site.block], masks, strict=True)])
        distances = torch.cdist(sample.tokens, torch.cat(tokens), compute_mode="donot_use_mm_for_euclid_dist")
        # Prompts begin alike: a token may be there several times, and the drawn one carries the number of one of these.
        same = (distances == 0) & (sample.weights[:, None] == expected)
        assert same.any(dim=1).all()
        weighted = sample.weighted(torch.device("cpu"))
        assert torch.allclose(weighted.square().sum(), (sample.tokens.square().sum(dim=1) * sample.weights).sum())
