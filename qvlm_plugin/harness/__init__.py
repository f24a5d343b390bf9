"""The plugin's side that lmms-eval sees: registration, model wrapper, calibration from tasks, provenance of results."""
