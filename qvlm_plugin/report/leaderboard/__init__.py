"""Results of many runs as one table: read, told apart by what was evaluated, ranked, written."""
