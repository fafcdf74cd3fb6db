"""Code: functions from a description with an explanation, explanations of functions, and wrong functions mended.

tasks.py        which functions there are, with what they give: put together from parts, or named ones (algorithms.py)
words.py        how they are asked for, described and explained
mistakes.py     one small mistake in a function
exercises.py    rows drawn from these
score.py        what answers are worth: programs are run in the sandbox
baselines.py    what a model is held against
coder.py        the recipe
"""

from recipes.code.coder import Code

RECIPE = Code()
