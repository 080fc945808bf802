"""Result table, metrics, intervals, tests and claims; knows tables only."""
