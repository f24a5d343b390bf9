"""The checks of `qvlm doctor`, except for those of the harness (`qvlm_plugin.harness.checks`)."""
