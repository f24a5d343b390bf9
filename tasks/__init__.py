"""Task definitions of lmms-eval that belong to this plugin."""
