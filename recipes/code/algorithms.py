"""Functions that have a name of their own, as they are taught. What is right is said by a definition beside the source."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Algorithm:
    """`title`: what it is asked for by; `explained`: how it works, of which `slots` are the words that count; `right`: what it
    gives, by definition; `given`: arguments to try it with; `source`: as `ast.unparse` writes it."""

    name: str
    title: str
    explained: str
    slots: tuple[str, ...]
    right: Callable[..., Any]
    given: tuple[tuple[Any, ...], ...]
    source: str


def _fibonacci(n: int) -> int:
    return n if n < 2 else _fibonacci(n - 1) + _fibonacci(n - 2)


_LISTS: tuple[tuple[Any, ...], ...] = (
    ([],),
    ([3],),
    ([3, 1, 2],),
    ([5, -1, 5, 0, 2],),
    ([9, 8, 7, 6, 5],),
    ([2, 2, 1, 1],),
)
_TEXTS = (("",), ("a",), ("Level",), ("level",), ("abca",), ("noon",), ("Education",))
ALGORITHMS = (
    Algorithm(
        "quicksort", "quicksort",
        "It takes the first number as the pivot, sorts the smaller ones and the others in the same way, and joins them around "
        "the pivot. A list of at most one number is returned as it is.",
        ("pivot", "smaller", "in the same way", "at most one number"), sorted, _LISTS,
        """\
def quicksort(numbers):
    if len(numbers) <= 1:
        return numbers
    pivot = numbers[0]
    smaller = [number for number in numbers[1:] if number < pivot]
    others = [number for number in numbers[1:] if number >= pivot]
    return quicksort(smaller) + [pivot] + quicksort(others)""",
    ),
    Algorithm(
        "bubble_sort", "bubble sort",
        "It swaps neighbours that are in the wrong order, so that the largest number moves to the end, and does so again for "
        "the rest. It returns a new list.",
        ("neighbours", "wrong order", "largest", "new list"), sorted, _LISTS,
        """\
def bubble_sort(numbers):
    numbers = list(numbers)
    for end in range(len(numbers) - 1, 0, -1):
        for at in range(end):
            if numbers[at] > numbers[at + 1]:
                numbers[at], numbers[at + 1] = (numbers[at + 1], numbers[at])
    return numbers""",
    ),
    Algorithm(
        "binary_search", "binary search",
        "It looks at the middle of a sorted list and goes on in the half that can hold the number. It returns the place, or -1 "
        "if it is not there.",
        ("middle", "sorted", "half", "-1"), lambda numbers, wanted: numbers.index(wanted) if wanted in numbers else -1,
        (([], 1), ([1, 3, 5], 3), ([1, 3, 5], 5), ([1, 3, 5], 1), ([1, 3, 5], 4), ([2, 4, 6, 8], 8)),
        """\
def binary_search(numbers, wanted):
    low, high = (0, len(numbers) - 1)
    while low <= high:
        middle = (low + high) // 2
        if numbers[middle] == wanted:
            return middle
        if numbers[middle] < wanted:
            low = middle + 1
        else:
            high = middle - 1
    return -1""",
    ),
    Algorithm(
        "factorial", "the factorial of a number", "It multiplies all whole numbers from 2 to n. For 0 and 1 it returns 1.",
        ("multiplies", "from 2 to n", "returns 1"), math.factorial, ((0,), (1,), (2,), (5,), (10,)),
        """\
def factorial(n):
    result = 1
    for factor in range(2, n + 1):
        result *= factor
    return result""",
    ),
    Algorithm(
        "fibonacci", "the Fibonacci numbers", "It keeps two neighbours of the row and adds them n times. For 0 it returns 0.",
        ("two neighbours", "adds", "returns 0"), _fibonacci, ((0,), (1,), (2,), (7,), (12,)),
        """\
def fibonacci(n):
    first, second = (0, 1)
    for _ in range(n):
        first, second = (second, first + second)
    return first""",
    ),
    Algorithm(
        "gcd", "the greatest common divisor",
        "It replaces the pair by the second number and the remainder of the division until the remainder is 0, and returns the "
        "first.",
        ("remainder", "until", "returns the first"), math.gcd, ((12, 18), (7, 3), (5, 0), (100, 75), (9, 9)),
        """\
def gcd(a, b):
    while b:
        a, b = (b, a % b)
    return a""",
    ),
    Algorithm(
        "is_prime", "a test whether a number is prime",
        "It tries all factors up to the square root. Below 2 it returns False.",
        ("factors", "square root", "returns False"), lambda n: n > 1 and all(n % factor for factor in range(2, n)),
        ((0,), (1,), (2,), (9,), (13,), (15,), (25,), (29,)),
        """\
def is_prime(n):
    if n < 2:
        return False
    for factor in range(2, int(n ** 0.5) + 1):
        if n % factor == 0:
            return False
    return True""",
    ),
    Algorithm(
        "is_palindrome", "a test whether a text is a palindrome",
        "It compares the text with itself read backwards. For an empty text it returns True.",
        ("compares", "backwards", "returns True"), lambda text: list(text) == list(reversed(text)), _TEXTS,
        """\
def is_palindrome(text):
    return text == text[::-1]""",
    ),
    Algorithm(
        "count_vowels", "the number of vowels in a text",
        "It goes through the small letters of the text and counts those in aeiou. For an empty text it returns 0.",
        ("small letters", "aeiou", "returns 0"), lambda text: sum(map(text.lower().count, "aeiou")), _TEXTS,
        """\
def count_vowels(text):
    count = 0
    for letter in text.lower():
        if letter in 'aeiou':
            count += 1
    return count""",
    ),
    Algorithm(
        "unique", "the removal of duplicates from a list",
        "It keeps each number that it has not found before, in their order. For an empty list it returns [].",
        ("not found before", "order", "returns []"), lambda numbers: list(dict.fromkeys(numbers)), _LISTS,
        """\
def unique(numbers):
    found = []
    for number in numbers:
        if number not in found:
            found.append(number)
    return found""",
    ),
    Algorithm(
        "merge", "the merging of two sorted lists",
        "It takes the smaller of the two first numbers again and again, and at the end what is left of either list.",
        ("smaller", "first numbers", "what is left"), lambda left, right: sorted(left + right),
        (([], []), ([1], []), ([1, 3], [2]), ([1, 2], [1, 4]), ([5], [1, 2, 9])),
        """\
def merge(left, right):
    result = []
    while left and right:
        if left[0] <= right[0]:
            result.append(left[0])
            left = left[1:]
        else:
            result.append(right[0])
            right = right[1:]
    return result + left + right""",
    ),
)  # fmt: skip
