"""The model: hybrid attention, four groups of blocks with exits, the router, INT8 linears, the model directory.

May import inputs and below, and torch; never ray, HTTP, data or the engine (which supplies the paged memory it asks for).
"""
