"""How functions are asked for, described and explained. What is said of a part, and the sentence around it, belong to one
split: the last wording of each is only asked, the one before it only fitted to, the others are learned from.
"""

from __future__ import annotations

from collections.abc import Sequence

TRAIN, DEV, SUITE = SPLITS = ("train", "dev", "suite")

# what is done with a list of numbers -> its wordings
FILTERED = {
    "all": ("all numbers", "the numbers", "every number", "each number there is"),
    "even": ("the even numbers", "the numbers that are even", "even numbers", "numbers divisible by two"),
    "odd": ("the odd numbers", "the numbers that are odd", "odd numbers", "numbers not divisible by two"),
    "positive": ("the positive numbers", "the numbers above zero", "positive numbers", "numbers larger than zero"),
    "negative": ("the negative numbers", "the numbers below zero", "negative numbers", "numbers smaller than zero"),
    "over": ("the numbers greater than {n}", "the numbers above {n}", "those above {n}", "numbers larger than {n}"),
    "under": ("the numbers less than {n}", "the numbers below {n}", "those below {n}", "numbers smaller than {n}"),
    "divisible": ("the numbers divisible by {n}", "the multiples of {n}", "all multiples of {n}", "what {n} divides"),
}
CHANGED = {
    "self": ("", "", "", ""),
    "square": (", each squared", ", each times itself", ", squared", ", each multiplied by itself"),
    "times": (", each times {m}", ", each multiplied by {m}", ", times {m}", ", {m} times each"),
    "plus": (", each plus {m}", ", each increased by {m}", ", plus {m}", ", {m} added to each"),
    "minus": (", each minus {m}", ", each decreased by {m}", ", minus {m}", ", {m} taken from each"),
    "negated": (", each negated", ", each with the other sign", ", negated", ", the sign of each turned"),
}
MADE = {
    "sum": ("the sum of {what}", "the total of {what}", "the sum over {what}", "what adding up {what} gives"),
    "product": ("the product of {what}", "the product over {what}", "a product of {what}", "what multiplying {what} gives"),
    "list": ("a list of {what}", "the list of {what}", "as a list {what}", "a new list with {what}"),
    "last": ("the last of {what}", "the last one of {what}", "only the last of {what}", "the one at the end of {what}"),
    "count": ("how many there are of {what}", "the count of {what}", "a count of {what}", "the number of {what}"),
    "any": (
        "whether there are any of {what}", "whether it has any of {what}", "whether it has {what}", "True if it holds {what}",
    ),
}  # fmt: skip

WRITE = (
    "Write a Python function {name} that returns {what} in a list.",
    "I need a function called {name}: given a list of numbers, it returns {what}.",
    "Please write {name}, which takes a list and returns {what}, and explain it.",
    "Give me Python code for {name}(numbers): it should return {what}.",
    "{name} should take a list of numbers and return {what}. Write it in Python and explain.",
    "Could you code {name} for me? It gets numbers and gives back {what}.",
    "How would you write {name} in Python, if it has to return {what}?",
    "Make me a Python function named {name}; from a list it computes {what}, with an explanation.",
)
NAMED = (
    "Write a Python function for {title}.",
    "Implement {title} in Python and explain how it works.",
    "Please show me {title} as a Python function.",
    "I need {title} in Python, with an explanation.",
    "Can you code {title} in Python?",
    "Give me an implementation of {title}.",
    "Write {title} in Python and explain.",
    "How does one program {title}? Show the Python code.",
)
AGAIN = (  # from an explanation
    "Write the function {name} in Python. {explained}",
    "{name} is a Python function. {explained} Write it.",
    "This is what {name} does. {explained} Give me the code.",
    "Code {name} for me. {explained}",
    "Turn these words into a Python function {name}. {explained}",
    "{explained} How would you write this as {name}?",
)
EXPLAIN = (
    "Explain this function:\n{code}",
    "What does this code do?\n{code}",
    "Please explain:\n{code}",
    "{code}\nHow does this work?",
    "Tell me what this returns:\n{code}",
    "Describe what happens here:\n{code}",
    "Can you say in words what this function does?\n{code}",
)
REPAIR = (
    "This function is wrong:\n{code}\nThe test {test} fails, since it {got}. Mend it.",
    "{code}\nI expected {test}, but it {got}. Please fix the function.",
    "Find the mistake:\n{code}\nThe test is {test}, and it {got}.",
    "Debug this:\n{code}\n{test} does not hold, it {got}.",
    "Why does {test} fail? It {got}.\n{code}",
    "Here {test} should pass, and yet it {got}. Correct the code:\n{code}",
)

# in an explanation, which has one form
KEPT = {
    "all": "every number", "even": "even numbers", "odd": "odd numbers", "positive": "numbers above zero",
    "negative": "numbers below zero", "over": "numbers above {n}", "under": "numbers below {n}",
    "divisible": "multiples of {n}",
}  # fmt: skip
DOES = {
    "self": "takes them as they are", "square": "squares them", "times": "multiplies them by {m}", "plus": "adds {m} to them",
    "minus": "subtracts {m} from them", "negated": "negates them",
}  # fmt: skip
ENDS = {
    "sum": "adds them up", "product": "multiplies them together", "list": "collects them in a list",
    "last": "remembers the last one", "count": "counts them", "any": "notes whether there is one",
}  # fmt: skip
EXPLAINED = "It goes through the list, keeps {kept}, {does}, and {ends}. For an empty list it returns {empty}."


def of_split(wordings: Sequence[str], split: str) -> Sequence[str]:
    """The wordings of a split: of four as of eight, the last quarter is asked, one before it fitted to."""
    asked = max(1, len(wordings) // 4)
    return {
        TRAIN: wordings[: -asked - 1], DEV: wordings[-asked - 1 : -asked], SUITE: wordings[-asked:],
    }[split]  # fmt: skip
