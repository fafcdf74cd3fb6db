"""Arithmetic with a bound beside each number: how far one may be from it that was computed in fp32, and now and then rounded to
bf16. So a bound is made by writing down what a kernel does.

u = 2^-24 is what rounding to fp32 may lose of a number. Sums of n numbers, in any order, lose at most n u of the sum of their
sizes; exp and log a few u of what they give.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

U = 2.0**-24
Array = np.ndarray


@dataclass(frozen=True, eq=False)
class Rounded:
    """Numbers in float64, and how far others that stand for them may be `off`, each by itself."""

    of: Array
    off: Array

    @classmethod
    def exact(cls, of: Array) -> Rounded:
        return cls(of, np.zeros_like(of))

    @cached_property
    def most(self) -> Array:
        """Their sizes at most."""
        found: Array = np.abs(self.of) + self.off
        return found

    def shaped(self, *shape: int) -> Rounded:
        return Rounded(self.of.reshape(shape), self.off.reshape(shape))

    def turned(self) -> Rounded:
        """Of matrices their transposes."""
        return Rounded(self.of.swapaxes(-1, -2), self.off.swapaxes(-1, -2))

    def where(self, there: Array, other: float) -> Rounded:
        """Themselves where they are `there`, elsewhere the number `other`."""
        return Rounded(np.where(there, self.of, other), np.where(there, self.off, 0.0))

    def cut(self, share: float) -> Rounded:
        """Rounded once more, by which so much is lost of a number."""
        return Rounded(self.of, self.off + share * self.most)

    def __add__(self, other: Rounded) -> Rounded:
        return Rounded(self.of + other.of, self.off + other.off).cut(U)

    def __sub__(self, other: Rounded) -> Rounded:
        return Rounded(self.of - other.of, self.off + other.off).cut(U)

    def __mul__(self, other: Rounded) -> Rounded:
        of = self.of * other.of
        return Rounded(of, self.most * other.most - np.abs(of)).cut(U)

    def __matmul__(self, other: Rounded) -> Rounded:
        sizes = self.most @ other.most
        off = sizes - np.abs(self.of) @ np.abs(other.of) + (self.of.shape[-1] + 16) * U * sizes
        return Rounded(self.of @ other.of, off)

    def sum(self, *axes: int) -> Rounded:
        """Over `axes`, which stay with one number each."""
        sizes = self.most.sum(axes, keepdims=True)
        count = self.of.size / sizes.size
        return Rounded(self.of.sum(axes, keepdims=True), self.off.sum(axes, keepdims=True) + (count + 16) * U * sizes)

    def exp(self) -> Rounded:
        found = np.exp(self.of)
        return Rounded(found, found * np.expm1(self.off)).cut(8 * U)

    def sigmoid(self) -> Rounded:
        """Its slope is at most e^t times what it is t away."""
        found = 1 / (1 + np.exp(-self.of))
        return Rounded(found, found * (1 - found) * np.expm1(self.off)).cut(8 * U)

    def log_of_sums(self, there: Array) -> Rounded:
        """[..., 1]: the log of the sum of exp of those of [..., n] that are `there`, tile after tile, each with the largest so
        far as its base. What a number is off, and what is lost where it is raised from that base, moves its share of the sum;
        what is lost with each new base moves all of it: these are steps on the way from the lowest number to the highest."""
        top = np.where(there, self.of, -np.inf).max(-1, keepdims=True)
        shares = np.where(there, np.exp(self.of - top), 0.0)
        total = shares.sum(-1, keepdims=True)
        raised = np.where(there, self.off + 2 * U * np.abs(self.of - top), 0.0)
        found = top + np.log(total)
        moved = np.log((shares / total * np.exp(raised)).sum(-1, keepdims=True))
        spread = 2 * U * (top - np.where(there, self.of, np.inf).min(-1, keepdims=True))
        return Rounded(found, moved + spread + (there.shape[-1] + 64) * U + 2 * U * (np.abs(found) + np.abs(top)))
