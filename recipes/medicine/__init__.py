"""Medicine, preliminary: symptoms and history in; possible causes, next examinations and urgency out, as JSON and in words.

The rules are made up for testing, by nobody with medical training. They are no medical advice, and no model that learned them
gives any.

words.py         symptoms, red flags and questions in several wordings each, in English and Chinese
rules.py         the rule table, and what is served with a model: the notice, and the rule that raises urgency
cases.py         cases drawn from both
score.py         what answers are worth
assessments.py   the recipe
"""

from recipes.medicine.assessments import Medicine

RECIPE = Medicine()
