"""Law, of one kind: questions about texts of free-software licences, with the clause quoted word for word. No legal advice.

clauses.py       what licences say of each matter, word for word, and which split each licence is of
words.py         what questions are put together of, in English and Chinese
questions.py     rows drawn from both
score.py         what answers are worth
licences.py      the recipe
"""

from recipes.law.licences import Law

RECIPE = Law()
