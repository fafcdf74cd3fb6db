"""What a model is worth: measures with their intervals, baselines, the frontier, INT8's cost, and the report page."""
