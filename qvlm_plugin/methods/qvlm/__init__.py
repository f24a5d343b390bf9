"""Q-VLM: cross-layer dependency mining and visual encoder optimization, one file for each step."""
