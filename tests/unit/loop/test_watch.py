"""A capture is watched: learning, quiet, watching, alarm; through kills, promotions, wrong clocks and other people's files."""

import fcntl
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from shoal.cli import main
from shoal.errors import DataError, ResourceError
from shoal.loop.capture import JOURNAL, Capture, Forgotten
from shoal.loop.forget import forget
from shoal.loop.looked import FOLDER, STATE, last_look, moved, shown
from shoal.loop.parts import make_parts
from shoal.loop.rows import RERUN, Row
from shoal.loop.tell import write_metrics
from shoal.loop.texts import Texts
from shoal.loop.unread import Read, unread
from shoal.loop.votes import Vote, Votes
from shoal.loop.watch import Watch
from shoal.loop.watched import COLUMNS, WATCHED

START = 1_795_780_800.0  # epoch seconds


class Service:
    """Requests to a model, a second apart, into a real capture."""

    def __init__(self, folder: Path) -> None:
        self.capture = Capture(folder, create=True)
        self.folder, self._count, self._rng = folder, 0, np.random.default_rng(0)
        self.now = START

    def serve(self, requests: int, *, up: float = 0.0, journal: str = "a", **more: object) -> None:
        """Their surprisal is up by so many standard deviations."""
        path = self.folder / JOURNAL / f"{journal}.jsonl"
        with path.open("ab") as file:
            for _ in range(requests):
                self._count += 1
                self.now += 1
                values = {
                    "weights": "aaaa", "status": 200, "finish": "stop", "layers": 8,
                    "prompt_surprisal": 3 + up + self._rng.normal(), "prompt_tokens": int(self._rng.integers(5, 40)),
                }  # fmt: skip
                row = Row(f"chatcmpl-{self._count}", round(self.now * 1000), **{**values, **more})
                file.write(row.line())

    def part(self, journal: str = "a") -> None:
        """What the journal holds becomes a part."""
        make_parts(self.capture, self.folder / JOURNAL / f"{journal}.jsonl")


@pytest.fixture
def service(tmp_path: Path) -> Service:
    return Service(tmp_path / "capture")


def watch(service: Service, **more: object) -> Watch:
    return Watch(service.folder, **{"learn": 500, **more})


def reran(service: Service, regret: float, requests: int) -> None:
    """Requests whose depth the router chose, each asked again."""
    for _ in range(requests):
        service.serve(1, router_bound=0.02)
        row = Row(
            f"chatcmpl-{service._count}", round(service.now * 1000), weights="aaaa", role=RERUN, tolerance=0.05,
            regret=regret * float(service._rng.gamma(2, 0.5)), regret_bound=0.02,
        )  # fmt: skip
        with (service.folder / JOURNAL / "a.jsonl").open("ab") as file:
            file.write(row.line())


def test_a_router_that_does_not_keep_its_tolerance_is_an_alarm_though_no_request_changed(
    service: Service, tmp_path: Path
) -> None:
    """Before there is a reference too; and nothing else is said to have moved."""
    reran(service, 0.02, 150)
    report = watch(service).look(service.now)
    assert report.state == "learning" and report.regret is not None and report.regret["high"] < 0.05
    assert moved(service.folder) == []
    reran(service, 0.2, 300)
    report = watch(service).look(service.now)
    assert report.state == "alarm" and report.do == "fit the router again" and "re-runs" in report.sentence
    assert moved(service.folder) == ["regret"] and report.regret["low"] > 0.05
    assert watch(service).look(service.now).regret == report.regret, "each row counts once"
    write_metrics(report, tmp_path / "drift.prom")
    told = (tmp_path / "drift.prom").read_text()
    assert f'shoal:regret_nats{{bound="low"}} {report.regret["low"]:g}' in told
    assert "shoal:regret_tolerance_nats 0.05" in told and "shoal:drift_state 3" in told
    assert len(service.capture.rows()) == 450 and len(service.capture.rows(copies=True)) == 900


def test_a_reference_is_made_of_requests_and_not_of_what_was_said_of_them(service: Service, tmp_path: Path) -> None:
    """Thumbs and re-runs have rows of their own: with one of each on every request 500 rows were a third of a reference."""
    reran(service, 0.01, 300)
    for number in range(1, 301):
        Votes(service.capture).put(Vote(f"chatcmpl-{number}", "b", "up", at=round(1000 * (START + number)) + 500))
    report = watch(service).look(service.now)
    assert (report.state, report.requests) == ("learning", 300) and "300 of the 500" in report.sentence
    service.serve(300)
    assert watch(service).look(service.now).state == "quiet"
    reference = json.loads(next(iter((service.folder / FOLDER).glob("reference-*.json"))).read_text())
    assert reference["requests"] == 500


def test_the_command_learns_two_weeks_unless_it_is_told_that_there_is_no_rhythm(
    service: Service, capsys: pytest.CaptureFixture[str]
) -> None:
    service.now -= 30 * 86_400
    service.serve(600)
    words = ["watch", "--capture", str(service.folder), "--once", "--learn", "500"]
    assert main(words) == 0
    assert "600 sessions have come, which do not span 14 days yet" in " ".join(capsys.readouterr().out.split())
    for day in range(1, 15):
        assert main(words) == 0
        assert capsys.readouterr().out.startswith("Not yet enough: "), day
        service.now += 86_400
        service.serve(1)
    assert main(words) == 0
    assert capsys.readouterr().out.startswith("Quiet: ")


def test_a_day_of_looks_reads_each_row_once_and_the_reference_is_that_of_one_look(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Conversations, thumbs, re-runs, parts and a row that comes late: as if nobody had looked before the day was over."""
    seen = list[int]()

    def counted(capture: Capture, read: Read, now: float) -> tuple[pa.Table, Read]:
        found = unread(capture, read, now)
        seen.append(len(found[0]))
        return found

    monkeypatch.setattr("shoal.loop.watch.unread", counted)
    for hour in range(26):
        service.now = START + hour * 3600
        journal = "a" if hour < 8 else "b"
        service.serve(20, conversation=f"c{hour}", journal=journal)
        service.serve(20, router_bound=0.02, journal=journal)
        reran(service, 0.01, 3 if hour < 8 else 0)
        Votes(service.capture).put(Vote(f"chatcmpl-{service._count - 5}", "b", "up", at=round(service.now * 1000)))
        if hour == 7:
            service.part()
        report = watch(service, hours=24).look(service.now)
        assert report.state == ("learning" if hour < 24 else "quiet"), report
    rows = 26 * (20 + 20 + 1) + 8 * 6
    assert sum(seen) <= 2 * rows, "those of the day twice, at its end"
    state = json.loads((service.folder / FOLDER / STATE).read_text())
    one = Capture(tmp_path / "one", create=True)
    for kind in ("rows", "journal", "feedback"):
        shutil.copytree(service.folder / kind, one.folder / kind, dirs_exist_ok=True)
    Watch(one.folder, learn=500, hours=24).look(service.now)
    again = json.loads((one.folder / FOLDER / STATE).read_text())
    assert (one.folder / FOLDER / again["reference"]).read_text() == (
        service.folder / FOLDER / state["reference"]
    ).read_text()
    assert again["detector"]["seen"] == state["detector"]["seen"] > 0
    assert again["detector"]["sums"] == state["detector"]["sums"] and again["regret"] == state["regret"]


@pytest.mark.parametrize("off", [2 * 86_400, -9_000 * 86_400])
def test_one_wrong_clock_makes_no_day_of_an_hour(service: Service, off: int) -> None:
    """One row of another day, ahead or from before a machine knew the time, and 600 requests of ten minutes were a day."""
    service.serve(300)
    service.now += off
    service.serve(1, journal="b")
    service.now -= off
    service.serve(300)
    assert watch(service, hours=24).look(service.now).state == "learning"
    service.now += 86_400
    service.serve(2)
    assert watch(service, hours=24).look(service.now).state == "quiet"


def test_a_look_reads_what_is_watched_and_nothing_else(service: Service) -> None:
    """Of 300,000 rows it held 608 MB, most of it of no use."""
    service.serve(5, tool_valid=True, finish="length", regret=0.1, regret_bound=0.2, answer_nll=1.0, router_bound=0.1)
    whole, (looked, _) = service.capture.rows(copies=True), unread(service.capture, Read())
    assert set(looked.column_names) == {*COLUMNS, "down"} and looked.nbytes < whole.nbytes
    for signal in WATCHED:
        assert np.array_equal(signal.of(looked), signal.of(whole), equal_nan=True), signal.name


def test_a_re_run_that_comes_after_its_request_was_looked_at_is_read(service: Service) -> None:
    """Both have the same id, and may lie in one journal."""
    service.serve(5)
    _, read = unread(service.capture, Read())
    with (service.folder / JOURNAL / "a.jsonl").open("ab") as file:
        file.write(Row("chatcmpl-3", 1, role=RERUN, regret=0.5).line())
    table, read = unread(service.capture, read)
    assert table["regret"].to_pylist() == [0.5]
    service.part()
    assert len(unread(service.capture, read)[0]) == 0


def test_a_version_of_equal_weights_is_another_and_a_refused_request_none(service: Service) -> None:
    """As where the router alone was fitted again."""
    service.serve(500, version="1.aa")
    service.serve(30, version=None, status=503)
    service.serve(60, version="2.aa")
    report = watch(service).look(service.now)
    assert (report.weights, report.state, report.requests) == ("2.aa", "learning", 60)


def test_from_nothing_to_an_alarm_and_back_by_accepting(service: Service) -> None:
    assert watch(service).look(service.now).sentence == "Not yet enough: no request has come yet."
    service.serve(300)
    report = watch(service).look(service.now)
    assert (report.state, report.requests, report.needed) == ("learning", 300, 500)
    service.serve(700)
    report = watch(service).look(service.now)
    assert (report.state, report.requests) == ("quiet", 500)
    moment = service.now
    service.serve(300, up=1.2)
    report = watch(service).look(service.now)
    assert report.state == "alarm" and report.meaning == "a new domain" and "curate" in report.do
    assert report.signals[0]["signal"] == "prompt_surprisal" and report.signals[0]["shift"] == pytest.approx(
        1.2, abs=0.3
    )
    assert report.found_after is not None and report.found_after <= 80
    assert abs(np.datetime64(report.since[:19]).astype(int) - moment) <= 30
    assert report.signals[0]["psi"] > report.signals[0]["psi_chance"]
    assert (
        report.sentence.startswith("Alarm: a new domain since 2026-11-")
        and "prompts more surprising" in report.sentence
    )
    service.serve(400)
    again = watch(service).look(service.now)
    assert again.state == "alarm", "it stays until somebody says what it was"
    service.serve(600, up=1.2)
    report = watch(service).accept("the new catalogue", who="ann", now=service.now)
    assert report.state in ("quiet", "watching") and report.reference["why"] == "the new catalogue"
    line = json.loads((service.folder / FOLDER / "accepted.jsonl").read_text())
    assert (line["who"], line["why"], line["weights"]) == ("ann", "the new catalogue", "aaaa")


def test_rows_are_read_once_from_journals_and_parts_and_whatever_happens_between(service: Service) -> None:
    service.serve(700)
    watch(service).look(service.now)
    service.serve(100)
    watch(service).look(service.now)
    service.part()
    service.serve(50, journal="b")
    watch(service).look(service.now)
    service.part("b")
    report = watch(service).look(service.now)
    assert report.requests == 700 + 100 + 50 - 500
    assert watch(service).look(service.now) == report, "nothing new, nothing changed"


def test_a_look_that_was_killed_is_made_again(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """At any write: before and after, the same rows come to the same report."""
    service.serve(900, up=0.0)
    service.serve(100, up=1.5)
    wanted = watch(service).look(service.now)
    for path in (service.folder / FOLDER).iterdir():
        path.unlink()
    calls = 0

    def fail(path: Path, text: str, **how: object) -> None:
        nonlocal calls
        calls += 1
        raise OSError("disk full")

    monkeypatch.setattr("shoal.loop.watch.write_aside", fail)
    with pytest.raises(ResourceError, match="disk full"):
        watch(service).look(service.now)
    monkeypatch.undo()
    assert calls == 1 and watch(service).look(service.now) == wanted


def test_another_version_is_learned_anew_and_late_rows_of_the_old_one_do_no_harm(service: Service) -> None:
    service.serve(800)
    old = watch(service).look(service.now)
    service.serve(10, weights="bbbb", up=2)
    assert watch(service).look(service.now).weights == "aaaa", "a few in a row are no promotion"
    service.serve(5)
    service.serve(300, weights="bbbb", up=2)
    report = watch(service).look(service.now)
    assert old.weights == "aaaa" and (report.state, report.weights) == ("learning", "bbbb")
    service.serve(400, weights="bbbb", up=2)
    report = watch(service).look(service.now)
    assert report.state == "quiet" and report.reference["requests"] == 500
    assert len(list((service.folder / FOLDER).glob("reference-*.json"))) == 1
    service.serve(300, up=0)  # taken back
    report = watch(service).look(service.now)
    assert (report.state, report.weights) == ("learning", "aaaa")


def test_an_old_capture_is_learned_from_its_last_version(service: Service) -> None:
    service.serve(600, up=3)
    service.serve(900, weights="bbbb")
    report = watch(service).look(service.now)
    assert (report.weights, report.state, report.requests) == ("bbbb", "quiet", 400)


def test_a_canary_and_a_shadow_do_not_count(service: Service) -> None:
    service.serve(800)
    watch(service).look(service.now)
    service.serve(300, up=3, role="canary", weights="bbbb")
    service.serve(300, up=3, role="shadow", weights="bbbb")
    report = watch(service).look(service.now)
    assert (report.state, report.requests, report.weights) == ("quiet", 300, "aaaa")


def test_turns_of_a_conversation_count_once(service: Service) -> None:
    service.serve(800)
    watch(service).look(service.now)
    service.serve(400, up=3, conversation="one")
    report = watch(service).look(service.now)
    assert (report.state, report.requests) == ("quiet", 301)


def test_a_clock_that_jumps_loses_nothing(service: Service) -> None:
    """Back by a day, then far ahead: all rows are looked at, and it is said."""
    service.serve(700)
    watch(service).look(service.now)
    before = service.now
    service.now -= 86_400
    service.serve(50)
    assert watch(service).look(before).requests == 250
    service.now = before + 10 * 365 * 86_400
    service.serve(50)
    report = watch(service).look(before)
    assert report.requests == 300 and any("clock is wrong" in warning for warning in report.warnings)
    service.now = before
    service.serve(200, up=1.5)
    report = watch(service).look(service.now)
    assert report.requests == 500 and report.state == "alarm"


def test_a_reference_waits_for_its_hours(service: Service) -> None:
    service.serve(3_000)
    assert watch(service, hours=1.0).look(service.now).state == "learning"
    service.serve(1_000)
    report = watch(service, hours=1.0).look(service.now)
    assert report.state == "quiet" and report.reference["requests"] >= 3_600


def test_a_bad_day_as_a_reference_is_said(service: Service) -> None:
    service.serve(450)
    service.serve(100, status=500)
    report = watch(service).look(service.now)
    assert any("requests failed" in warning for warning in report.warnings)


def test_errors_are_operations_and_no_training(service: Service) -> None:
    service.serve(900)
    watch(service).look(service.now)
    service.serve(60, status=503)
    report = watch(service).look(service.now)
    assert report.state == "alarm" and report.meaning == "operations" and "nothing to train" in report.do


def test_thumbs_down_alone_are_a_world_that_changed(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """Votes come after the answers; one in ten is down, then two in three."""
    votes, rng = Votes(service.capture, lambda: round(service.now * 1000)), np.random.default_rng(0)

    def vote(first: int, last: int, share: float) -> None:
        for number in range(first, last):
            service.now += 0.01
            votes.put(Vote(f"chatcmpl-{number}", f"p{number}", rating="down" if rng.random() < share else "up"))

    service.serve(700)
    vote(1, 300, 0.1)
    service.serve(1)
    assert watch(service, learn=701).look(service.now).state == "quiet"
    vote(300, 500, 0.1)
    report = watch(service).look(service.now)
    assert report.state == "quiet" and report.requests == 200
    assert watch(service).look(service.now).requests == 200, "each once"
    vote(500, 600, 0.67)
    vote(9_000, 9_100, 1.0)
    report = watch(service).look(service.now)
    assert report.state == "alarm" and report.signals[0]["signal"] == "down" and report.requests == 300
    assert report.meaning == "a world that changed" and "labels" in report.do


def test_one_person_who_is_angry_is_no_world_that_changed(service: Service) -> None:
    votes = Votes(service.capture, lambda: round(service.now * 1000))
    service.serve(700)
    for number in range(1, 300):
        votes.put(Vote(f"chatcmpl-{number}", f"p{number}", rating="down" if number % 10 == 0 else "up"))
    service.serve(1)
    assert watch(service, learn=701).look(service.now).state == "quiet"
    for number in range(300, 600):
        votes.put(Vote(f"chatcmpl-{number}", "ann", rating="down"))
    report = watch(service).look(service.now)
    assert (report.state, report.requests) == ("quiet", 1)


def test_re_runs_of_one_session_say_nothing_of_the_router(service: Service) -> None:
    """Ten requests of one person that lose much are one such request."""
    reran(service, 0.02, 150)
    before = watch(service).look(service.now).regret
    with (service.folder / JOURNAL / "a.jsonl").open("ab") as file:
        for number in range(200):
            row = Row(
                f"chatcmpl-{number}", round(service.now * 1000) + number, weights="aaaa", role=RERUN, tolerance=0.05,
                regret=0.5, regret_bound=0.02, subject="ann",
            )  # fmt: skip
            file.write(row.line())
    report = watch(service).look(service.now + 1)
    assert report.state == "learning" and report.regret == before


def test_requests_that_were_refused_have_no_weights_and_are_no_other_version(service: Service) -> None:
    service.serve(1, status=400, weights=None, finish=None, prompt_surprisal=None)
    service.serve(900)
    watch(service).look(service.now)
    service.serve(80, status=400, weights=None, finish=None, prompt_surprisal=None)
    report = watch(service).look(service.now)
    assert (report.state, report.weights, report.meaning) == ("alarm", "aaaa", "operations")
    service.serve(12, weights="bbbb")
    service.serve(5, status=400, weights=None)
    service.serve(12, weights="bbbb")
    assert watch(service).look(service.now).weights == "bbbb"


def test_what_is_forgotten_is_not_looked_at(service: Service) -> None:
    service.serve(800)
    watch(service).look(service.now)
    service.serve(200, up=2, subject="gone")
    (service.folder / "forgotten.jsonl").write_text('{"subject": "gone"}\n')
    assert watch(service).look(service.now).state == "quiet"


def test_what_was_asked_is_shown_where_texts_are_kept(service: Service) -> None:
    """Of the requests that are furthest from the reference, and of nobody who is forgotten."""
    service.serve(800)
    service.serve(200, up=4)
    texts = Texts(service.capture)
    for number in range(750, 1_001):
        choices = [{"message": {"role": "assistant", "content": "a"}}]
        asked = [{"role": "user", "content": f"What   is {number}?"}]
        texts.put("key", None, asked, {"id": f"chatcmpl-{number}", "choices": choices}, {})
    report = watch(service).look(service.now)
    numbers = [int(re.sub(r"What is (\d+)\?", r"\1", text)) for text in report.examples]
    assert len(numbers) == 3 and all(number > 800 for number in numbers)
    (service.folder / "forgotten.jsonl").write_text(json.dumps({"id": f"chatcmpl-{numbers[0]}"}) + "\n")
    assert f"What is {numbers[0]}?" not in watch(service).look(service.now).examples


def test_a_look_shows_nobody_what_somebody_asked_who_was_forgotten_since(service: Service) -> None:
    service.serve(800)
    service.serve(200, up=4)
    texts = Texts(service.capture)
    for number in range(750, 1_001):
        answer = {"id": f"chatcmpl-{number}", "choices": [{"message": {"role": "assistant", "content": "a"}}]}
        texts.put("key", f"p{number}", [{"role": "user", "content": f"What is {number}?"}], answer, {})
    watch(service).look(service.now)
    path, before = service.folder / FOLDER / STATE, last_look(service.folder)
    assert before is not None and len(before["report"]["examples"]) == len(before["asked"]) == 3
    first, second = (one["subject"] for one in before["asked"][:2])
    assert first not in (told := json.dumps(shown(before, Forgotten(set(), {first})))) and "asked" not in told
    assert shown(before, Forgotten())["report"] == before["report"]
    forget(service.capture, subject=first)
    forget(service.capture, id_=f"chatcmpl-{second[1:]}")
    left = last_look(service.folder)
    assert left is not None and left["report"]["examples"] == before["report"]["examples"][2:]
    assert not any(f"What is {whose[1:]}?" in path.read_text() for whose in (first, second))
    assert watch(service).look(service.now).state == "alarm"
    path.write_text("{")
    forget(service.capture, subject="nobody")
    assert path.read_text() == "{"


def test_what_was_always_the_same_is_said_to_have_moved_where_it_went(service: Service) -> None:
    service.serve(600)
    watch(service).look(service.now)
    service.serve(300, layers=2)
    report = watch(service).look(service.now)
    assert report.state == "alarm" and report.signals[0]["signal"] == "layers"
    assert report.signals[0]["words"] == "shallower answers" and report.meaning == "another use"


def test_tools_that_are_called_wrongly_are_no_other_use(service: Service) -> None:
    service.serve(600, tool_valid=True)
    watch(service).look(service.now)
    for valid in (True, False) * 150:
        service.serve(1, tool_valid=valid)
    report = watch(service).look(service.now)
    assert report.state == "alarm" and report.meaning == "calls of tools that are not valid"
    assert report.signals[0]["words"] == "more calls of tools that are not"


def test_a_disk_that_is_full_is_one_line_and_the_next_look_sees_all(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    service.serve(800)
    with monkeypatch.context() as then:
        then.setattr(
            Path, "write_text", lambda *given, **more: (_ for _ in ()).throw(OSError(28, "No space left on device"))
        )
        with pytest.raises(ResourceError, match="cannot be written: got 'No space left on device'"):
            watch(service).look(service.now)
    assert watch(service).look(service.now).requests == 300


def test_what_clients_say_is_no_markup_and_nothing_that_a_terminal_obeys(
    service: Service, capsys: pytest.CaptureFixture[str]
) -> None:
    for up in (0, 1):
        for _ in range(500):
            service.serve(1, slice="[/x] :x:", up=up)
            service.serve(1)
        watch(service, learn=800).look(service.now)
    texts = Texts(service.capture)
    for number in range(1_001, 2_001):
        choices = [{"message": {"role": "assistant", "content": "a"}}]
        asked = [{"role": "user", "content": "\x1b]0;calm\x07What\u202e\n is it?"}]
        texts.put("key", None, asked, {"id": f"chatcmpl-{number}", "choices": choices}, {})
    assert main(["watch", "--capture", str(service.folder), "--once", "--hours", "0"]) == 0
    said = capsys.readouterr()
    assert "in [/x] :x:" in " ".join(said.out.split()) and "asked: ]0;calmWhat is it?\n" in said.err


def test_two_at_once_are_refused(service: Service) -> None:
    watch(service).look(service.now)
    with (service.folder / FOLDER / ".lock").open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="is being watched"):
            watch(service).look(service.now)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"format": "shoal.watch", "version": 2}', '{"format": "x"}'])
def test_a_state_that_is_none_is_one_line(service: Service, text: str) -> None:
    watch(service).look(service.now)
    (service.folder / FOLDER / STATE).write_text(text)
    with pytest.raises(DataError, match=r"watch\.json"):
        watch(service).look(service.now)


def test_the_command(service: Service, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    service.serve(800)
    service.serve(200, up=1.5)
    words = ["watch", "--capture", str(service.folder), "--once", "--learn", "500", "--hours", "0"]
    assert main([*words, "--json", "--metrics", str(tmp_path / "drift.prom")]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["state"] == "alarm" and report["signals"][0]["signal"] == "prompt_surprisal"
    lines = (tmp_path / "drift.prom").read_text().splitlines()
    assert "shoal:drift_state 3" in lines and any(
        line.startswith('shoal:drift_shift_sd{signal="prompt_s') for line in lines
    )
    assert main(words) == 0
    said = capsys.readouterr()
    assert said.out.startswith("Alarm: a new domain since") and "what to do: curate" in said.err
    for wrong, code, says in (
        (["watch", "--capture", str(tmp_path)], 1, "capture.json"),
        (["watch", "accept", "--capture", str(service.folder)], 2, "--why"),
        (["watch", "acept", "--capture", str(service.folder)], 2, "acept"),
        (["watch", "--capture", str(service.folder), "--every", "0"], 2, "--every"),
        (["watch", "--capture", str(service.folder), "--learn", "5"], 2, "--learn"),
        ([*words, "--metrics", str(tmp_path / "no" / "x.prom")], 1, "cannot write"),
    ):
        assert main(wrong) == code
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1 and says in lines[0], lines
    assert main(["watch", "accept", "--capture", str(service.folder), "--why", "new shop", "--learn", "500"]) == 0
    assert capsys.readouterr().out.startswith("Not yet enough: ")
