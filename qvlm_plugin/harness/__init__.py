"""The interface to lmms-eval: registration, model wrapper, calibration from tasks, provenance of results."""
