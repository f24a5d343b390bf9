"""A grid of methods on the same tasks: run, compared document by document, reported."""
