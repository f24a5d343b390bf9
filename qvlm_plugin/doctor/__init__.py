"""What `qvlm doctor` looks at, beside the harness (`qvlm_plugin.harness.checks`)."""
