"""May a candidate take the place of the stable version? Everything is asked of both, and compared question by question.

    shape, tokenizer, template  ─>  bits per byte  ─>  frozen suites, each task for itself: no worse by more than 3 points
      the same, or refused           at most +1 %       safety suites: no item newly failed
                                                        recent suites: better, or there is no reason to release
                                    answers no longer, the router as good, no more layers, no more time a token (`costs`)

All must pass. Where too few questions were asked to say, it says so, and how many it takes: that is no pass either.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from sacrebleu.metrics.chrf import CHRF

from shoal.config import AUTO
from shoal.data import models, remote
from shoal.data.chats.heldout import Question, questions
from shoal.data.shards import open_index, token_bytes
from shoal.data.sources.s3 import is_remote
from shoal.engine.engine import Engine
from shoal.engine.events import Guide, Request, Sampling
from shoal.errors import CheckpointError, DataError, RequestError, ShoalError
from shoal.evaluate import measures
from shoal.evaluate.evaluation import MOST_TOKENS, TASKS, Progress
from shoal.evaluate.measures import Answer, HeldoutRows
from shoal.inputs.tokenizer import Tokenizer
from shoal.loop import costs, suites
from shoal.loop.cut import RECENT as RECENT_FILE
from shoal.loop.cut import read
from shoal.loop.margins import of_difference, of_ratio, taken, together
from shoal.loop.paired import FAIL, INCONCLUSIVE, LEAST_RECENT, MARGIN, PASS, SKIPPED, Check, better, not_worse, paired
from shoal.loop.suites import FROZEN, RECENT, SAFETY, TIRED, Suite
from shoal.loop.versions import AnotherShapeError, need_same
from shoal.model.files import weights_sha256
from shoal.model.model import Model

FORMAT, VERSION = "shoal.gate", 1
REFUSED = "refused"
MOST_RISE = 0.01  # of bits per byte
BPB_ROWS = 96  # packed rows of a modality
MOST_LONGER = 1.10  # tokens of the answers to frozen suites
NOT_EXACT = ("code", "summarisation")  # tasks whose answers need not be the reference
SHAPE = "shape"  # the check that refuses
# messages, tools, tokenizer and format -> guide
Guides = Callable[
    [Sequence[Mapping[str, Any]], Sequence[Mapping[str, Any]], Tokenizer, Mapping[str, Any] | None], Guide | None
]


@dataclass(frozen=True)
class Verdict:
    """What came of all checks; `passed` is what a release asks for."""

    verdict: str  # pass, fail, inconclusive or refused
    passed: bool
    sentence: str
    checks: list[Check]
    candidate: dict[str, str]
    stable: dict[str, str]
    suites: list[dict[str, str]] = field(default_factory=list)
    uses: int = 0
    seconds: float = 0.0

    def told(self) -> dict[str, Any]:
        return {"format": FORMAT, "version": VERSION, **asdict(self)}


@dataclass
class _Seen:
    """Of the suites so far: tokens of both answers to what is frozen, and questions that both answered, by task; whether all
    that is new of the candidate is its router, and whether it broke off where it was asked."""

    alone: bool
    broke_off: bool = False

    longer: list[tuple[int, int]] = field(default_factory=list)
    answered: dict[str, list[Question]] = field(default_factory=dict)
    new: dict[str, list[Question]] = field(default_factory=dict)  # of recent suites


def gate(
    candidate: str | Path,
    stable: str | Path,
    folder: Path,
    *,
    cut: Path | None = None,
    data: str | Path | None = None,
    margin: float = MARGIN,
    need_recent: bool = True,
    on_progress: Progress | None = None,
    guides: Guides | None = None,
) -> Verdict:
    """The verdict on `candidate` beside `stable`, by the frozen suites in `folder`, what a `cut` holds out and what the corpus
    `data` does; models and corpus may be in S3. `guides`: what a service guides the answer to messages with tools or a format
    by [nothing]. Raises DataError for suites that changed or hold no question and where S3 does not answer, CheckpointError for
    a stable version that cannot be loaded, and for an address in S3 with no whole model."""
    began, tell = time.monotonic(), on_progress or (lambda what, done, total: None)
    frozen = [(suite, folder) for suite in suites.read(folder)]
    if cut is not None:
        # of what is new an answer may have as much as of what is frozen
        most = max((suite.most_tokens or 0 for suite, _ in frozen), default=0) or None
        frozen.append((Suite("recent", RECENT_FILE, read(cut)["sha256"][RECENT_FILE], RECENT, most), cut))
    of = [suite for suite, _ in frozen]
    new, old = models.here(candidate), models.here(stable)
    corpus = None if data is None else remote.local(data)
    known = Model.load(old)
    names = [{"path": str(place), "weights_sha256": _sha(path)} for place, path in ((candidate, new), (stable, old))]
    try:
        model = Model.load(new)
        need_same(new, old)
    except ShoalError as error:
        told = str(error)
        for place, path in ((candidate, new), (stable, old)):
            if is_remote(place):  # of a path each letter may be one of the words
                told = told.replace(str(path), str(place))  # not the copies' folders
        told = told if isinstance(error, AnotherShapeError) else f"it cannot be loaded: {told}"
        return _verdict([Check(SHAPE, FAIL, told)], names, of, 0, began)
    # before they are asked: one that is killed has asked them too, and a full disk costs no minutes
    uses = suites.use(folder, {"candidate": names[0]["weights_sha256"], "stable": names[1]["weights_sha256"]})
    checks = [Check(SHAPE, PASS, "shape, tokenizer and chat template are the stable version's")]
    steps, total = 0, len(frozen) + 2
    tell("bits per byte", steps, total)
    checks += _bits(model, known, corpus, data)
    seen = _Seen(_router_alone(model, known))
    for suite, place in frozen:
        steps += 1
        tell(suite.name, steps, total)
        checks += _asked(suite, place, model, known, margin, seen, guides)
    tell("router and speed", total - 1, total)
    checks += _lengths(seen.longer) + _costs(model, known, seen)
    if not any(suite.kind == FROZEN for suite in of):
        checks.append(Check("frozen", SKIPPED, "there is no frozen suite: nothing says that what it knew is kept"))
    if not any(suite.kind == SAFETY for suite in of):
        checks.append(Check("safety", SKIPPED, "there is no safety suite"))
    if not any(suite.kind == RECENT for suite in of):
        status = INCONCLUSIVE if need_recent else SKIPPED
        checks.append(Check("recent", status, "no recent suite: nothing says that the candidate is better at anything"))
    checks = together(checks, taken(old, names[1]["weights_sha256"], of))
    return _verdict(checks, names, of, uses, began)


def _verdict(
    checks: list[Check], names: Sequence[dict[str, str]], frozen: Sequence[Suite], uses: int, began: float
) -> Verdict:
    failed = [check for check in checks if check.status == FAIL]
    open_ = [check for check in checks if check.status == INCONCLUSIVE]
    if any(check.name == SHAPE for check in failed):
        verdict, why = REFUSED, failed[0].told
    elif failed:
        verdict, why = FAIL, "; ".join(f"{check.name}: {check.told}" for check in failed)
    elif open_:
        verdict, why = INCONCLUSIVE, "; ".join(f"{check.name}: {check.told}" for check in open_)
    else:
        verdict, why = PASS, f"{sum(check.status == PASS for check in checks)} checks"
    if uses >= TIRED:
        why += f"; the suites were asked {uses} times: draw new ones"
    return Verdict(
        verdict, verdict == PASS, f"{verdict.capitalize()}: {why}.", checks, names[0], names[1],
        [{"name": suite.name, "sha256": suite.sha256} for suite in frozen], uses, round(time.monotonic() - began, 1),
    )  # fmt: skip


def _sha(path: Path) -> str:
    try:
        return weights_sha256(path)
    except (OSError, CheckpointError):
        return ""


def _bits(model: Model, known: Model, here: Path | None, data: str | Path | None) -> list[Check]:
    """Bits per byte of text and code beside the stable version's, in the corpus `data`, which is `here`."""
    if here is None:
        return [Check("bits per byte", SKIPPED, "no corpus was given (--data)")]
    index = open_index(here)
    if index.tokenizer_sha256 != known.tokenizer.sha256:
        raise DataError(f"{data} was made with another tokenizer", do="give the corpus of the stable version")
    found = []
    for modality in ("text", "code"):
        if not index.total("rows", "heldout", modality):
            continue
        rows = HeldoutRows(here, modality, BPB_ROWS)
        beside = measures.beside([known.net, model.net], rows, token_bytes(known.tokenizer))[1]
        rise, (low, high) = beside.rise.value, beside.rise.interval
        name = f"bits per byte, {modality}"
        if not math.isfinite(rise):
            found.append(Check(name, FAIL, "it is no number: the weights are broken", limit=MOST_RISE))
            continue
        status = PASS if high <= MOST_RISE else FAIL if rise > MOST_RISE else INCONCLUSIVE
        told = f"{rise:+.2%} ({beside.rise.between('+.2%')}), at most {MOST_RISE:+.0%}"
        used = of_difference(rise, MOST_RISE)
        found.append(
            Check(
                name, status, told, rise, _finite(low), _finite(high), MOST_RISE,
                beside.rise.rows, beside.rise.groups, used=used,
            )
        )  # fmt: skip
    return found or [Check("bits per byte", SKIPPED, f"{data} holds out neither text nor code")]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _asked(
    suite: Suite, folder: Path, model: Model, known: Model, margin: float, seen: _Seen, guides: Guides | None
) -> list[Check]:
    """The checks of one suite, one a task; what later checks need of it goes to `seen`."""
    by_task = questions(folder / suite.file, known.tokenizer, known.config, known.chat_template)
    if not by_task:
        raise DataError(f"suite {suite.name} holds no question")
    fitted = _fitted(suite, folder, by_task)
    found = []
    for task, rows in by_task.items():
        most = suite.most_tokens or TASKS.get(task, MOST_TOKENS)
        asked = [row for row in rows if len(row.prompt.ids) + most <= known.config.context]
        name = f"{suite.name}, {task}"
        if not asked:
            found.append(Check(name, FAIL, f"no question of {len(rows)} fits the context"))
            continue
        try:
            (new, broken), (old, _) = (_answers(each, asked, most, guides) for each in (model, known))
        except ShoalError as error:
            found.append(Check(name, FAIL, f"it does not answer: {error}"))
            seen.broke_off = True
            continue
        if broken:  # nor would it where the stable version says something wrong, which no score tells apart
            found.append(Check(name, FAIL, f"it does not answer {len(broken)} of {len(asked)}: {broken[0]}"))
            seen.broke_off = True
            continue
        if suite.kind == FROZEN:
            seen.longer += [(one.tokens, other.tokens) for one, other in zip(new, old, strict=True)]
        if suite.kind != SAFETY:
            some = seen.new if suite.kind == RECENT else seen.answered
            if shows := [row for row in asked if row.group not in fitted]:
                some.setdefault(task, []).extend(shows)
        # no router makes answers right that were not
        kind = FROZEN if seen.alone and suite.kind == RECENT else suite.kind
        check = _compared(kind, name, scores(task, new, asked), scores(task, old, asked), asked, margin)
        check = replace(check, told=check.told + _cut(task, asked, most, known.tokenizer.ends))
        if suite.kind == FROZEN:  # what is new is another thing for each candidate
            check = replace(check, used=of_difference(-(check.value or 0.0), margin))
        found.append(check)
    return found


def _cut(task: str, asked: Sequence[Question], most: int, ends: Sequence[int]) -> str:
    """What is to be said where no answer of so many tokens can be the reference. Behind the token that ends an answer a
    template may write more, as a line's end."""
    said = [row.row.ids[len(row.prompt.ids) :] for row in asked] if task not in NOT_EXACT else []
    long = sum(next((at for at, token in enumerate(ids) if token in ends), len(ids)) > most for ids in said)
    return f"; {long} references have more than the {most} tokens of an answer (--freeze --most-tokens)" if long else ""


def _answers(
    model: Model, asked: Sequence[Question], most: int, guides: Guides | None
) -> tuple[list[Answer], list[str]]:
    """Greedy answers of at most so many tokens, as far as they came, and why those broke off that did."""
    sampling = Sampling(temperature=0.0, max_tokens=most)
    guided = [replace(sampling, guided=_guide(row, model.tokenizer, guides)) for row in asked]
    done = Engine(model).generate(
        [Request(row.prompt, one, depth=AUTO) for row, one in zip(asked, guided, strict=True)]
    )
    answers = [
        Answer(one.text, len(one.tokens), one.depth, len(row.prompt.ids)) for one, row in zip(done, asked, strict=True)
    ]
    ends = [one.finished for one in done if one.finished is not None]
    return answers, [end.error.message for end in ends if end.error is not None]


def _guide(row: Question, tokenizer: Tokenizer, guides: Guides | None) -> Guide | None:
    """What a service guides the answer by; nothing where it would not take the question."""
    if guides is None or row.sent is None:
        return None
    try:
        return guides(row.sent["messages"], row.sent["tools"], tokenizer, row.sent["response_format"])
    except RequestError:
        return None


def _fitted(suite: Suite, folder: Path, by_task: Mapping[str, Sequence[Question]]) -> set[int]:
    """Groups of what is new to which the candidate's router may be fitted (`cut.asked_of_both`): by these it shows nothing."""
    if suite.kind != RECENT:
        return set()
    half = suites.looked_at(folder / suite.file)
    return {row.group for rows in by_task.values() for row in rows} - half


def _router_alone(model: Model, known: Model) -> bool:
    """Whether the weights of both are the same, and their routers are not."""
    if model.router is None or known.router is None or not _equal(model.net, known.net):
        return False
    return model.router.calibration != known.router.calibration or not _equal(model.router, known.router)


def _equal(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def _costs(model: Model, known: Model, seen: _Seen) -> list[Check]:
    """The checks of the router and of speed, on what both have answered."""
    if not seen.answered and not seen.new and seen.broke_off:
        told = "it does not answer, so nothing says what its answers cost"
        return [Check(name, SKIPPED, told) for name in ("router", costs.TIME)]
    if not seen.answered and not seen.new:
        told = "no question tells what an answer costs: add a frozen suite, or more people to what is new"
        return [Check(name, INCONCLUSIVE, told, needed=costs.LEAST) for name in ("router", costs.TIME)]
    try:
        return costs.checks(model, known, seen.answered, seen.new, alone=seen.alone)
    except ShoalError as error:
        return [Check("router", FAIL, f"it does not answer: {error}")]


def _compared(
    kind: str, name: str, new: Sequence[float], old: Sequence[float], asked: Sequence[Question], margin: float
) -> Check:
    if kind == SAFETY:
        lost = sum(one < other for one, other in zip(new, old, strict=True))
        told = f"{lost} of {len(asked)} items newly failed" if lost else f"none of {len(asked)} items newly failed"
        return Check(name, FAIL if lost else PASS, told, float(lost), limit=0.0, items=len(asked))
    found = paired(new, old, [row.group for row in asked])
    mean = sum(new) / len(new)
    points = (
        f"{100 * mean:.1f} % right, {100 * found.mean:+.1f} points ({100 * found.low:+.1f} to {100 * found.high:+.1f})"
    )
    if kind == RECENT:
        status, needed = better(found, LEAST_RECENT)
        told, limit = f"{points}, must be above 0", 0.0
    else:
        status, needed = not_worse(found, margin)
        told, limit = f"{points}, must not be below {-100 * margin:+.0f}", -margin
    if status == INCONCLUSIVE:
        told += f": {found.items} items are too few" + (f", {needed:,} are needed" if needed else "")
    return Check(name, status, told, found.mean, found.low, found.high, limit, found.items, found.groups, needed)


def _lengths(longer: Sequence[tuple[int, int]]) -> list[Check]:
    """Whether answers became longer: each token costs, and a model that does not stop is broken."""
    if not longer:
        return []
    ratio = sum(new for new, _ in longer) / max(1, sum(old for _, old in longer))
    told = f"{ratio:.2f} times the stable version's, at most {MOST_LONGER:.2f}"
    return [
        Check(
            "tokens an answer",
            PASS if ratio <= MOST_LONGER else FAIL,
            told,
            ratio,
            limit=MOST_LONGER,
            items=len(longer),
            used=of_ratio(ratio, MOST_LONGER),
        )
    ]


def scores(task: str, answers: Sequence[Answer], asked: Sequence[Question]) -> list[float]:
    """0 to 1 a question: of code whether it parses, of summaries chrF, of all else whether it is the reference."""
    if task == "code":
        return [measures.parse_rate([answer], [row]).value for answer, row in zip(answers, asked, strict=True)]
    if task == "summarisation":
        metric = CHRF()
        return [metric.sentence_score(a.text, [q.reference]).score / 100 for a, q in zip(answers, asked, strict=True)]
    return [measures.exact_match([answer], [row]).value for answer, row in zip(answers, asked, strict=True)]


def lines(told: Mapping[str, Any]) -> list[str]:
    """A verdict as lines of a table, one a check."""
    width = max(len(check["name"]) for check in told["checks"])
    return [f"  {check['status']:<12}  {check['name']:<{width}}  {check['told']}" for check in told["checks"]]
