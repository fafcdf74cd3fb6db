"""Attention, blocks, exits, the router, INT8 linears, and the model directory. Torch only."""
