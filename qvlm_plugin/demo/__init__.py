"""The embedded default: a real small LLaVA assembled from PyPI packages, and stand-in data to evaluate it on."""
