"""Customer service that looks things up: a seeded shop, four tools, and conversations of several turns in English and Chinese.

shop.py            orders, parcels, returns and stock in SQLite; the tools
service.py         the same over HTTP
words.py           what customers say, and what is answered
conversations.py   conversations drawn from both
score.py           what answers are worth, and whole conversations
baselines.py       what a model is held against
"""

from recipes.customer_service.customers import CustomerService

RECIPE = CustomerService()
