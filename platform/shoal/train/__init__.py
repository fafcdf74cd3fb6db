"""The training loop, its loss, its optimizer and its checkpoints; runs with or without Ray."""
