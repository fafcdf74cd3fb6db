"""What the engine counts, and the names it is shown under."""

from __future__ import annotations

import pickle

import pytest

from shoal import Engine, Request, Sampling
from shoal.engine.metrics import FAMILIES, Family, Histogram, Metrics, infos, sample, summed, together
from tests.unit.engine.lively import lively


def test_a_histogram_counts_what_is_at_most_each_bound() -> None:
    histogram = Histogram((0.1, 1.0))
    for value in (0.05, 0.1, 0.5, 7.0):
        histogram.observe(value)
    assert histogram.samples(Family("x", "histogram", "")) == {
        'x_bucket{le="0.1"}': 2, 'x_bucket{le="1.0"}': 3, 'x_bucket{le="+Inf"}': 4, "x_sum": pytest.approx(7.65), "x_count": 4,
    }  # fmt: skip


def test_the_sum_of_two_replicas_is_both() -> None:
    both, one, two = Metrics(), Metrics(), Metrics()
    for metrics, ends in ((one, [("stop", 1.0)]), (two, [("length", 2.0), ("error", 3.0)])):
        for reason, total in ends:
            for counted in (metrics, both):
                counted.ended(reason, 4, 0.1, 0.5, total, 3)
    told = [
        metrics.samples((1, 2, 4)) | {sample("kv_cache_usage_perc"): use} for metrics, use in ((one, 0.2), (two, 0.4))
    ]
    wanted = both.samples((1, 2, 4)) | {sample("kv_cache_usage_perc"): 0.3}
    assert together(told) == pytest.approx(wanted), "a share is the mean of both"


def test_ends_and_depths_are_told_by_their_names_and_those_that_never_were_as_none() -> None:
    metrics = Metrics(finished={"stop": 2, "cancelled": 3, "deadline": 4, "error": 5}, depths={2: 6, 7: 1})
    told = {str(key): value for key, value in metrics.samples((1, 2)).items() if "request" in key and value}
    assert told == {
        'request_success_total{finished_reason="stop"}': 2, "requests_cancelled_total": 3, "requests_deadline_total": 4,
        "requests_error_total": 5, "requests_depth_2_total": 6,
    }  # fmt: skip
    names = {'request_success_total{finished_reason="length"}', "requests_depth_1_total"}
    assert names <= {str(key) for key in metrics.samples((1, 2))}


def test_replicas_that_are_told_apart_are_not_added_up_and_their_shares_stay_what_they_are() -> None:
    use, steps = sample("kv_cache_usage_perc"), sample("steps")
    told = [{key.beside(replica=name): value for key in (use, steps)} for name, value in (("a", 0.25), ("b", 0.75))]
    found = together(told)
    assert {str(key): value for key, value in found.items()} == {
        'kv_cache_usage_perc{replica="a"}': 0.25, 'steps_total{replica="a"}': 0.25,
        'kv_cache_usage_perc{replica="b"}': 0.75, 'steps_total{replica="b"}': 0.75,
    }  # fmt: skip
    assert summed(found, "steps") == 1.0 and summed(found, "num_preemptions") == 0
    assert pickle.loads(pickle.dumps(found)) == found


def test_a_sample_s_name_has_all_labels_of_its_family_and_no_other() -> None:
    family = Family("requests_{kind}", "counter", "", ("kind", "depth", "end"))
    key = family.sample(kind="chat", depth="full", end="stop")
    assert key == 'requests_chat_total{depth="full",end="stop"}'
    assert (key.name, key.ending, key.labels) == ("requests_chat", "_total", {"depth": "full", "end": "stop"})
    for wrong in ({"kind": "chat", "depth": "full"}, {"kind": "chat", "depth": "full", "end": "stop", "more": 1}):
        with pytest.raises(ValueError, match="has the labels"):
            family.sample(**wrong)


def test_every_row_of_the_table_is_told_by_somebody() -> None:
    """A metric that is declared and never counted, or counted and not declared, is found here."""
    engine = Engine(lively(), units=20)
    told = {key.family.name for key in engine.stats()}
    told |= {key.family.name for key in infos([{**engine.info(), "weights": "ab"}])}
    of_deployments = {"num_replicas", "num_replicas_starting", "requests_resumed", "weights_update_refused"}
    of_deployments |= {"weights_loading"}
    of_gateways = {
        "request_errors",
        "capture_rows",
        "capture_dropped",
        "capture_scribes",
        "capture_lag_seconds",
        "capture_bytes",
        "capture_waiting_files",
        "feedback",
        "reruns",
    }
    of_releases = {"release_share", "version_requests", "release_rollbacks"}
    of_watches = {name for name in FAMILIES if name.startswith(("drift_", "regret_"))}
    assert told | of_deployments | of_gateways | of_releases | of_watches == set(FAMILIES)
    assert all(family.help.endswith(".") for family in FAMILIES.values())


def test_a_run_is_counted_under_the_names_that_dashboards_read() -> None:
    clock = iter(range(10_000))
    engine = Engine(lively(), units=200, max_batch=4, clock=lambda: float(next(clock)))
    prompt = list(range(50, 70))
    asked = [Request(prompt, Sampling(max_tokens=3, ignore_eos=True), depth=depth) for depth in ("shallow", "full")]
    engine.generate(asked)
    engine.generate(asked[1:])
    stats = engine.stats()
    tokens, page = 3 * 3, engine.config.page
    wanted = {
        "num_requests_running": 0, "num_requests_waiting": 0, "kv_cache_usage_perc": 0, "num_preemptions_total": 0,
        "prompt_tokens_total": 60, "generation_tokens_total": tokens, "prefix_cache_queries_total": 60,
        'request_success_total{finished_reason="length"}': 3, "requests_error_total": 0, "requests_refused_total": 0,
        "requests_depth_1_total": 1, "requests_depth_2_total": 0, "requests_depth_4_total": 2,
        "time_to_first_token_seconds_count": 3, "e2e_request_latency_seconds_count": 3,
        "request_queue_time_seconds_count": 3, "inter_token_latency_seconds_count": tokens - 3,
        "request_time_per_output_token_seconds_count": 3, "iteration_tokens_total_count": stats["steps_total"],
        "iteration_tokens_total_sum": stats["step_rows_total"], "request_kv_units_count": 3,
        "request_kv_units_sum": (1 + 4 + 4) * -(-22 // page), "spec_decode_num_draft_tokens_total": 0,
    }  # fmt: skip
    assert {name: stats[name] for name in wanted} == wanted
    assert stats["prefix_cache_hits_total"] > 0 and stats["e2e_request_latency_seconds_sum"] > 0


def observed(histogram: Histogram) -> tuple[int, float]:
    return histogram.count, histogram.sum


def test_only_a_good_end_has_latencies_and_only_more_tokens_than_one_a_time_for_each() -> None:
    metrics = Metrics()
    metrics.ended("error", 2, 1.0, 2.0, 3.0, 4)
    assert observed(metrics.request_kv_units) == (1, 2)
    assert observed(metrics.e2e_request_latency_seconds) == observed(metrics.time_to_first_token_seconds) == (0, 0.0)
    metrics.ended("stop", 0, 0.5, None, 3.0, 0)
    assert observed(metrics.request_kv_units) == (1, 2), "it never ran"
    assert observed(metrics.e2e_request_latency_seconds) == (1, 3.0) and observed(
        metrics.request_queue_time_seconds
    ) == (1, 0.5)
    assert observed(metrics.time_to_first_token_seconds) == (0, 0.0)
    metrics.ended("length", 1, 0.25, 1.0, 1.5, 1)
    assert observed(metrics.request_time_per_output_token_seconds) == (0, 0.0)
    metrics.ended("stop", 4, 0.25, 1.0, 3.0, 2)
    metrics.ended("stop", 4, 0.25, 1.0, 3.0, 5)
    assert observed(metrics.request_time_per_output_token_seconds) == (2, 2.5)
    assert observed(metrics.time_to_first_token_seconds) == (3, 3.0) and observed(metrics.request_kv_units) == (4, 11)
    assert metrics.finished == {"error": 1, "stop": 3, "length": 1}


def test_what_engines_say_of_themselves_is_how_many_say_so() -> None:
    said = [{"quantization": "none", "weights": "ab"}, {"quantization": "none"}, {"quantization": "w8a8", "other": "x"}]
    assert {str(key): value for key, value in infos(said).items()} == {
        'model_info{quantization="none"}': 2.0, 'model_info{quantization="w8a8"}': 1.0, 'replica_weights{weights="ab"}': 1.0,
    }  # fmt: skip
