"""The loop around a served model: what is captured of its requests, what is noticed in them, and what may take its place.

Plain numpy and files: no part of it needs Ray or HTTP. May import evaluate, train, engine, data and model.
"""
