"""Benchmarks: `shoal bench decode`. Each prints a table, and JSON as its last line.

Random weights, since speed does not depend on their values. Variants run in turns, so that a drift of the machine hits
all of them; what is quoted is the median of the rounds. Load and threads stand beside every number.
"""
