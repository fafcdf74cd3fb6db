"""Recipes: an application each, from made-up data to a model that is measured beside simple rules. `named.py` finds them."""
