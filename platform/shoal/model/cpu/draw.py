"""Drawing tokens, compiled for the CPU with numba: `fused` calls these loops with tensors, for `engine.sampler`.

What a race is stands there. It takes a logarithm and an exponential of every token, and the threshold of top-p a sorted row:
together several times what a small model's step takes. Here a token gets its logarithm only where it may come first: -log u is
at least 1 - u, so that weight / (1 - u), which vector code is made of, is never less than what the token races with. And a
threshold sorts only the bucket of a histogram that it lies in.

Letters: R rows, V vocabulary, D rows that are drawn from.
"""

from __future__ import annotations

import math

import numpy as np

from shoal.model.cpu.compiled import exact, exp, fast, fill, largest

BLOCK = 256  # tokens whose bounds are made at once
SLACK = 1e-5  # what numbers of a race may be off by, when torch's are compared with these: ten times what fp32 rounds
BUCKETS = 2048
SPAN = 32.0  # nats from the likeliest token to those that share the last bucket


@fast
def bounds(logits, start, top, heat, lowest, ids, low, high, out):
    """Into out int32 [BLOCK]: the bits of a bound, at least 0, of what each token from `start` on races with; such bits order
    as their numbers do, and NaN comes last. Returns the largest. `top`, `heat`, `lowest`: of the row, as in `race`."""
    most, count = np.int32(0), min(BLOCK, len(logits) - start)
    for i in range(count):
        z = (logits[start + i] - top) / heat
        weight = np.float32(exp(z)) if z >= lowest or z != z else np.float32(0)
        missing = np.float32(0x7FFFFF - _uniform(ids[start + i], low, high)) + np.float32(0.5)
        bound = np.float32(weight / missing)
        bits = bound.view(np.int32)
        out[i] = bits
        most = max(most, bits)
    return most


@fast
def _uniform(scrambled, low, high):
    """23 bits of a hash of a token and the key of its row; `engine.sampler.Sampler.noise` has the same."""
    x = np.uint32(scrambled ^ low)
    x = np.uint32(x ^ (x >> np.uint32(16)))
    x = np.uint32(np.uint32(x * np.uint32(0x7FEB352D)) + high)
    x = np.uint32(x ^ (x >> np.uint32(15)))
    x = np.uint32(x * np.uint32(0x846CA68B))
    x = np.uint32(x ^ (x >> np.uint32(16)))
    return np.int32(x >> np.uint32(9))


@exact.called
def race(logits, rows, likeliest, heat, lowest, ids, keys, found, ties):
    """found [D]: the token that comes first in each of the `rows` [D] of logits [R, V], of those whose z is not below `lowest`
    [D]; z is the logit less that of the `likeliest` [D] token, over `heat` [D]. `ids` uint32 [V] and `keys` uint32 [D, 2] are
    what noise is made of. ties [D]: whether another comes so close that rounding decides. A row without any finite number
    gives its likeliest."""
    out = np.empty(BLOCK, np.int32)
    scores = np.empty(logits.shape[1], np.float64)  # of tokens that were looked at
    for d, row in enumerate(rows):
        z, first = logits[row], likeliest[d]
        top, low, high = z[first], keys[d, 0], keys[d, 1]
        best, at = -1 / _log(_uniform(ids[first], low, high)), first
        count = 0
        for start in range(0, len(z), BLOCK):
            most = bounds(z, start, top, heat[d], lowest[d], ids, low, high, out)
            if _value(most) * (1 + SLACK) < best:
                continue
            for i in range(min(BLOCK, len(z) - start)):
                if _value(out[i]) * (1 + SLACK) < best:
                    continue
                weight = math.exp(np.float64((z[start + i] - top) / heat[d]))
                score = -weight / _log(_uniform(ids[start + i], low, high))
                if score > 0:
                    scores[count] = score
                    count += 1
                if score > best:
                    best, at = score, start + i
        near = 0
        for c in range(count):
            near += scores[c] * (1 + SLACK) >= best
        found[d], ties[d] = at, near > 1


@exact.called
def log_sums(logits, rows, kept, totals):
    """Into kept [D, V] the `rows` [D] of logits [R, V], and into totals [D] the log of each one's sum of exponentials; of a row
    whose largest is no number that is NaN or infinite."""
    for d, row in enumerate(rows):
        for i in range(logits.shape[1]):
            kept[d, i] = logits[row, i]
        most = largest(kept[d])
        totals[d] = most + math.log(_sum(kept[d], most))


@exact.called(nogil=False)
def few_log_sums(logits, rows, kept, totals):
    """As `log_sums`, of some thousand numbers: over sooner than the interpreter's lock would come back from another thread."""
    log_sums(logits, rows, kept, totals)


@fast
def _sum(z, most):
    """Of e^(z - most)."""
    total = np.float64(0)
    for i in range(len(z)):
        total += np.float64(exp(z[i] - most))
    return total


@exact.called
def thresholds(logits, rows, likeliest, heat, top_k, top_p, floor, lowest):
    """lowest [D]: the least z that each of the `rows` [D] keeps, z and `likeliest` as in `race`: of the `top_k` [D] likeliest
    tokens (V: all), of the fewest of those that have `top_p` [D] of their mass (1: all), and of those from `floor` [D] on."""
    vocab = logits.shape[1]
    weights, buckets = np.empty(BLOCK, np.float64), np.empty(BLOCK, np.int32)
    counts, masses = np.empty(BUCKETS, np.int64), np.empty(BUCKETS, np.float64)
    for d, row in enumerate(rows):
        z = logits[row]
        top = z[likeliest[d]]
        fill(counts, 0)
        fill(masses, 0.0)
        for start in range(0, vocab, BLOCK):
            _weigh(z, start, top, heat[d], weights, buckets)
            for i in range(min(BLOCK, vocab - start)):
                counts[buckets[i]] += 1
                masses[buckets[i]] += weights[i]
        least, mass = floor[d], masses.sum()
        if top_k[d] < vocab:
            bucket, before, above = 0, 0, 0.0
            while bucket < BUCKETS - 1 and before + counts[bucket] < top_k[d]:
                before += counts[bucket]
                above += masses[bucket]
                bucket += 1
            inside = _falling(z, top, heat[d], bucket, counts[bucket], buckets)
            for i in range(top_k[d] - before):
                above += math.exp(inside[i])
            least, mass = max(least, inside[top_k[d] - before - 1]), above
        if top_p[d] < 1:
            bucket, above = 0, 0.0
            while bucket < BUCKETS - 1 and above + masses[bucket] < top_p[d] * mass:
                above += masses[bucket]
                bucket += 1
            inside = _falling(z, top, heat[d], bucket, counts[bucket], buckets)
            i = 0
            while i < len(inside) - 1:
                above += math.exp(inside[i])
                if above >= top_p[d] * mass:
                    break
                i += 1
            if len(inside):
                least = max(least, inside[i])
        lowest[d] = least


@fast
def _weigh(logits, start, top, heat, weights, buckets):
    """The weight of each token from `start` on, and its bucket."""
    for i in range(min(BLOCK, len(logits) - start)):
        z = np.float64((logits[start + i] - top) / heat)
        x = z if z > -708 else -708.0
        n = np.rint(x * 1.4426950408889634)
        r = x - n * 0.693147180369123816490 - n * 1.90821492927058770002e-10
        p = 1 / 479001600
        for k in (39916800, 3628800, 362880, 40320, 5040, 720, 120, 24, 6, 2, 1, 1):
            p = p * r + 1 / k
        power = np.int64((np.int64(n) + np.int64(1023)) << np.int64(52))
        weights[i] = p * power.view(np.float64) if z > -708 else (0.0 if z <= -708 else z)
        buckets[i] = np.int32(z * (-BUCKETS / SPAN)) if z > -SPAN * (1 - 1 / BUCKETS) else np.int32(BUCKETS - 1)


@exact
def _falling(logits, top, heat, bucket, count, buckets):
    """z of the `count` tokens of a bucket, the largest first."""
    found, weights, at = np.empty(count, np.float64), np.empty(BLOCK, np.float64), 0
    for start in range(0, len(logits), BLOCK):
        _weigh(logits, start, top, heat, weights, buckets)
        for i in range(min(BLOCK, len(logits) - start)):
            if buckets[i] == bucket:
                found[at] = np.float64((logits[start + i] - top) / heat)
                at += 1
    found.sort()
    return found[::-1]


@exact
def _value(bits):
    """The number that `bits` stand for times 2^23, which `bounds` leaves out."""
    plain = np.int32(bits)
    return np.float64(plain.view(np.float32)) * 2.0**23


@exact
def _log(uniform):
    """Of the middle of one of 2^23 equal parts of (0, 1)."""
    return math.log((uniform + 0.5) * 2.0**-23)
