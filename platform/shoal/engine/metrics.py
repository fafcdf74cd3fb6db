"""The one table of all metrics of a service (`FAMILIES`), and the counts that the engine keeps of itself. No exporter.

To add a metric, add its row here and count it in `Metrics`, or wherever it is known. Names end as vLLM's do, so that its
dashboards need one replacement (ours stand under the prefix that `api.metrics` sets).

Everybody tells what it knows as one flat mapping of samples to values. So what two replicas tell together is the sum of their
mappings, key by key; of a share it is the mean (`together`).
"""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["counter", "gauge", "histogram"]


@dataclass(frozen=True)
class Family:
    """What one metric is: a row of the table. A label in braces stands in the name itself."""

    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...] = ()
    share: bool = False  # of several engines together the mean counts, not the sum

    def sample(self, part: str = "", /, **labels: object) -> Sample:
        """The sample with these values of the `labels`; `part`: of a histogram, ``bucket``, ``sum`` or ``count``."""
        wanted = (*self.labels, "le") if part == "bucket" else self.labels
        if tuple(labels) != wanted:
            raise ValueError(f"metric {self.name} has the labels {wanted}, got {tuple(labels)}")
        name = self.name.format(**labels)
        rest = {label: str(value) for label, value in labels.items() if f"{{{label}}}" not in self.name}
        return Sample(self, name, {"counter": "_total", "gauge": "", "histogram": f"_{part}"}[self.kind], rest)


class Sample(str):
    """The name of one number as Prometheus writes it, such as ``steps_total`` or ``requests_total{depth="full",end="stop"}``,
    which still knows its parts, so that nobody has to parse it."""

    family: Family
    name: str  # the family's, with the labels that stand in it
    ending: str
    labels: dict[str, str]

    def __new__(cls, family: Family, name: str, ending: str, labels: Mapping[str, str]) -> Sample:
        inside = ",".join(f'{label}="{value}"' for label, value in labels.items())
        made = super().__new__(cls, name + ending + (f"{{{inside}}}" if inside else ""))
        made.family, made.name, made.ending, made.labels = family, name, ending, dict(labels)
        return made

    def beside(self, **labels: str) -> Sample:
        """It with these labels before its own, which are none of its family: of whom it is, where several tell it."""
        return Sample(self.family, self.name, self.ending, {**labels, **self.labels})

    def __reduce__(self) -> tuple[Any, ...]:  # replicas send their samples
        return _again, (self.family.name, self.name, self.ending, self.labels)


def _again(family: str, name: str, ending: str, labels: Mapping[str, str]) -> Sample:
    return Sample(FAMILIES[family], name, ending, labels)


Samples = dict[Sample, float]

_TABLE = (
    Family("num_requests_running", "gauge", "Requests that run."),
    Family("num_requests_waiting", "gauge", "Requests in the queue."),
    Family("kv_cache_usage_perc", "gauge", "Share of the K/V units that requests hold, 0 to 1.", share=True),
    Family("kv_units", "gauge", "Units of K/V memory."),
    Family("kv_units_cached", "gauge", "Units that only the prefix cache holds."),
    Family("kv_cache_bytes", "gauge", "Bytes of K/V memory."),
    Family("num_preemptions", "counter", "Requests that lost their units to others."),
    Family("prefix_cache_queries", "counter", "Tokens of prompts that were looked up in the prefix cache."),
    Family("prefix_cache_hits", "counter", "Tokens of prompts that were found there."),
    Family("prompt_tokens", "counter", "Tokens of the prompts of admitted requests."),
    Family("generation_tokens", "counter", "Tokens of answers."),
    Family("steps", "counter", "Steps of the engine."),
    Family("step_rows", "counter", "Rows that ran in all steps."),
    Family("requests_refused", "counter", "Requests that found the queue full, or whose deadline was out of reach."),
    Family("spec_decode_num_draft_tokens", "counter", "Tokens that requests drafted ahead."),
    Family("spec_decode_num_accepted_tokens", "counter", "Drafts that stood."),
    Family("quality_tokens", "counter", "Tokens of answers with a tolerance that full depth looked at."),
    Family("quality_spent_nats", "counter", "Nats that those answers lost against full depth."),
    Family("audited_answers", "counter", "Answers of the router's depth that full depth looked at.", ("tolerance",)),
    Family("audited_lost_nats", "counter", "What each of them lost, nats a token, summed.", ("tolerance",)),
    Family(
        "audited_allowed_nats",
        "counter",
        "What each of them might lose by the bound of its tolerance, likewise.",
        ("tolerance",),
    ),
    Family(
        "router_correction_nats", "gauge", "Nats that predicted gaps are shifted by since.", ("tolerance",), share=True
    ),
    Family("audit_rows", "counter", "Rows that ran for that, among all."),
    Family("audits_dropped", "counter", "Answers that it chose and did not come to look at."),
    Family("request_success", "counter", "Requests that ended well.", ("finished_reason",)),
    Family("requests_cancelled", "counter", "Requests whose client left."),
    Family("requests_deadline", "counter", "Requests that ran out of their time."),
    Family("requests_error", "counter", "Requests that failed."),
    Family("requests_depth_{layers}", "counter", "Requests that began with so many layers.", ("layers",)),
    Family("second_looks", "counter", "Answers that the router looked at again after some tokens."),
    Family("second_looks_deeper", "counter", "Of those the ones that went on deeper."),
    Family("time_to_first_token_seconds", "histogram", "From submission to the first token."),
    Family("inter_token_latency_seconds", "histogram", "From one token of an answer to the next."),
    Family("request_time_per_output_token_seconds", "histogram", "Mean time of a token after the first, by request."),
    Family("e2e_request_latency_seconds", "histogram", "From submission to the end of the answer."),
    Family("request_queue_time_seconds", "histogram", "From submission to the first step."),
    Family("iteration_tokens_total", "histogram", "Rows of a step."),
    Family("request_kv_units", "histogram", "Units that a request held at its end."),
    # of the replicas of a deployment, and of what they say of themselves (`info`)
    Family("num_replicas", "gauge", "Replicas that answer."),
    Family("num_replicas_starting", "gauge", "Replicas that are on their way."),
    Family("requests_resumed", "counter", "Answers that went on at another replica after their own was lost."),
    Family("weights_update_refused", "gauge", "Replicas that could not load the weights that they were told to."),
    Family("weights_loading", "gauge", "Replicas that load other weights beside those that serve."),
    Family("model_info", "gauge", "Engines that compute so.", ("quantization",)),
    Family("replica_weights", "gauge", "Replicas that serve these weights.", ("weights",)),
    # of a release that is followed
    Family("release_share", "gauge", "Share of the conversations that a version answers.", ("version",)),
    Family("version_requests", "counter", "Requests that a version answered, or failed at.", ("version", "outcome")),
    Family("release_rollbacks", "counter", "Canaries that were taken back by themselves."),
    # of the HTTP side
    Family("capture_rows", "counter", "Rows that the gateway captured."),
    Family("capture_dropped", "counter", "Rows that it dropped.", ("reason",)),
    Family(
        "capture_scribes", "counter", "Processes that it began to write them: more than one says that one was killed."
    ),
    Family("capture_lag_seconds", "gauge", "For how long the oldest row has waited for the disk."),
    Family("capture_waiting_files", "gauge", "Files that the bucket does not have yet, where rows go to one."),
    Family("capture_bytes", "gauge", "Bytes of what is captured, as of the last hour."),
    Family(
        "reruns", "counter", "Requests that full depth was to answer again when idle, and what became.", ("outcome",)
    ),
    Family(
        "feedback", "counter", "Votes on answers; of other than up and down: text, or none (withdrawn).", ("rating",)
    ),
    # of what `shoal watch` has found, where it watches what the gateway captures (`tell.write_metrics` writes the same)
    Family("drift_state", "gauge", "0 learning, 1 quiet, 2 watching, 3 alarm."),
    Family("drift_evidence_requests", "gauge", "Evidence of a drift, in sessions."),
    Family("drift_needed_requests", "gauge", "Evidence that is an alarm."),
    Family("drift_requests", "gauge", "Sessions that were compared with the reference."),
    Family("drift_shift_sd", "gauge", "How far a signal moved, in standard deviations of a request.", ("signal",)),
    Family("regret_nats", "gauge", "Nats a token that answers of depth auto lose, by re-runs.", ("bound",)),
    Family("regret_tolerance_nats", "gauge", "What they may lose."),
    Family("regret_reruns", "gauge", "Re-runs that this was measured on."),
    Family("drift_looked_timestamp_seconds", "gauge", "When it was looked last, in Unix time."),
    Family("request_errors", "counter", "Requests answered with an error.", ("model_name", "code")),
)
FAMILIES = {family.name: family for family in _TABLE}


def sample(name: str, part: str = "", /, **labels: object) -> Sample:
    """The sample of the family `name`, as `Family.sample`."""
    return FAMILIES[name].sample(part, **labels)


def together(told: Sequence[Mapping[Sample, float]]) -> Samples:
    """What several engines told, as one: sums, and means of shares."""
    found: Samples = {}
    tellers = Counter(key for samples in told for key in samples)
    for samples in told:
        for key, value in samples.items():
            found[key] = found.get(key, 0.0) + value / (tellers[key] if key.family.share else 1)
    return found


def summed(samples: Samples, name: str) -> float:
    """The sum of all samples of the family `name`, whoever told them."""
    return sum(value for key, value in samples.items() if key.family.name == name)


def infos(told: Iterable[Mapping[str, str]]) -> Samples:
    """What engines say of themselves (`Engine.info`) as samples: how many say so."""
    total: Samples = {}
    for info in told:
        for family, label in (("model_info", "quantization"), ("replica_weights", "weights")):
            if label in info:
                key = sample(family, **{label: info[label]})
                total[key] = total.get(key, 0.0) + 1.0
    return total


SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)
COUNTS = tuple(2.0**k for k in range(15))  # 1 .. 16384


class Histogram:
    """How often a value was at most each of `bounds`, how often in all, and the sum."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)  # of values above the bound before, the last above all
        self.sum = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect.bisect_left(self.bounds, value)] += 1
        self.sum += value

    @property
    def count(self) -> int:
        return sum(self.counts)

    def samples(self, family: Family) -> Samples:
        """Prometheus' samples: cumulative buckets, sum and count."""
        found: Samples = {}
        below = 0
        for bound, count in zip([*map(str, self.bounds), "+Inf"], self.counts, strict=True):
            below += count
            found[family.sample("bucket", le=bound)] = below
        return found | {family.sample("sum"): self.sum, family.sample("count"): below}


def _seconds() -> Histogram:
    return Histogram(SECONDS)


def _token_seconds() -> Histogram:
    return Histogram(TOKEN_SECONDS)


def _counts() -> Histogram:
    return Histogram(COUNTS)


@dataclass
class Metrics:
    """Totals since the start. `finished` counts requests by their end, `depths` by the layers they began with."""

    preemptions: int = 0
    prefix_queries: int = 0  # tokens looked up in the prefix cache
    prefix_hits: int = 0  # tokens found there
    prompt_tokens: int = 0
    generation_tokens: int = 0
    steps: int = 0
    rows: int = 0
    drafts: int = 0  # tokens drafted by self-speculation
    drafts_accepted: int = 0
    measured: int = 0  # tokens of answers with a tolerance that is measured
    spent: float = 0.0  # nats of it, by those
    looks: int = 0  # answers that the router looked at again
    deeper: int = 0  # those of them that went on deeper
    refused: int = 0  # the queue was full, or the deadline out of reach
    finished: dict[str, int] = field(default_factory=dict)
    depths: dict[int, int] = field(default_factory=dict)
    # each of the following with the name it is shown under
    time_to_first_token_seconds: Histogram = field(default_factory=_seconds)  # from submission
    inter_token_latency_seconds: Histogram = field(default_factory=_token_seconds)
    request_time_per_output_token_seconds: Histogram = field(default_factory=_token_seconds)  # after the first
    e2e_request_latency_seconds: Histogram = field(default_factory=_seconds)
    request_queue_time_seconds: Histogram = field(default_factory=_seconds)  # from submission to its first step
    iteration_tokens_total: Histogram = field(default_factory=_counts)  # rows a step; vLLM's name
    request_kv_units: Histogram = field(default_factory=_counts)  # units owned at the end

    def routed(self, layers: int, prompt: int, cached: int) -> None:
        """Count a request that begins with `layers`, `cached` of whose `prompt` tokens were in the prefix cache."""
        self.prefix_queries += prompt
        self.prefix_hits += cached
        self.depths[layers] = self.depths.get(layers, 0) + 1

    def looked(self, *, deeper: bool) -> None:
        """Count an answer that the router looked at again."""
        self.looks += 1
        self.deeper += deeper

    def ended(self, reason: str, units: int, queue: float, first: float | None, total: float, tokens: int) -> None:
        """Count the end of a request that owned `units` and gave `tokens`; the times are from its submission, in seconds
        (`first`: of the first of these, None without one). Where another engine began the answer they are counted from its
        last token there. A request that ended badly has an end, and no latencies."""
        self.finished[reason] = self.finished.get(reason, 0) + 1
        if units:
            self.request_kv_units.observe(units)
        if reason not in ("stop", "length"):
            return
        self.e2e_request_latency_seconds.observe(total)
        self.request_queue_time_seconds.observe(queue)
        if first is not None:
            self.time_to_first_token_seconds.observe(first)
            if tokens > 1:
                self.request_time_per_output_token_seconds.observe((total - first) / (tokens - 1))

    def samples(self, exits: Sequence[int]) -> Samples:
        """Everything that is counted here; of `exits`, the requests that ran to each."""
        found: Samples = {
            sample("num_preemptions"): self.preemptions,
            sample("prefix_cache_queries"): self.prefix_queries,
            sample("prefix_cache_hits"): self.prefix_hits,
            sample("prompt_tokens"): self.prompt_tokens,
            sample("generation_tokens"): self.generation_tokens,
            sample("steps"): self.steps,
            sample("step_rows"): self.rows,
            sample("requests_refused"): self.refused,
            sample("spec_decode_num_draft_tokens"): self.drafts,
            sample("spec_decode_num_accepted_tokens"): self.drafts_accepted,
            sample("second_looks"): self.looks,
            sample("second_looks_deeper"): self.deeper,
            sample("quality_tokens"): self.measured,
            sample("quality_spent_nats"): self.spent,
        }
        for reason in ("stop", "length"):
            found[sample("request_success", finished_reason=reason)] = self.finished.get(reason, 0)
        for bad in ("cancelled", "deadline", "error"):
            found[sample(f"requests_{bad}")] = self.finished.get(bad, 0)
        for layers in exits:
            found[sample("requests_depth_{layers}", layers=layers)] = self.depths.get(layers, 0)
        for name, value in vars(self).items():
            if isinstance(value, Histogram):
                found |= value.samples(FAMILIES[name])
        return found
