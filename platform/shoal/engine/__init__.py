"""Paged KV memory, continuous batching, depth and sampling: requests in, typed events out.

May import model, inputs and below; never ray, HTTP or another plane. `Engine` is the front.
"""
