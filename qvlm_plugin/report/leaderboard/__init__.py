"""The leaderboard: read results, group them by evaluation, rank and write them."""
