"""Documents to packed rows, rows to batches: plain functions and iterators, no Ray."""
