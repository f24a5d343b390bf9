"""What lmms-eval wrote: read, compared and shown."""
