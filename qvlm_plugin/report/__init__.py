"""Run evaluations; read, compare and show their results."""
