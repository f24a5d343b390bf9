"""Grids of methods on the same tasks: run, compare document by document, report."""
