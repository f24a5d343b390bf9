"""The topology of a model, found by a run of it; see docs/add-a-family.md."""
