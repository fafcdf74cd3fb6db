"""What a chat page says to a recipe's model is what that was taught: each is held against the rows that are learned from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from recipes.code.exercises import exercises
from recipes.code.words import TRAIN as CODE_TRAIN
from recipes.customer_service.conversations import conversations
from recipes.law.questions import questions
from recipes.medicine.cases import WORDS, cases
from recipes.named import named, names
from recipes.own import Own, begun
from recipes.run import _write_policy
from recipes.splits import TRAIN
from shoal.api.policy import Policy
from ui.assistants import ASSISTANTS

LEARNED = {  # some of what each learns from; of the customers those of whom nothing is known
    "code": lambda: exercises(CODE_TRAIN, CODE_TRAIN, 40),
    "customer-service": lambda: (
        row for one in conversations(TRAIN, TRAIN, 40) if "Orders:" not in str(row := one.row())
    ),
    "law": lambda: questions(TRAIN, TRAIN, 40),
    "medicine": lambda: (row for row in cases(TRAIN, TRAIN, 40) if row["form"] == WORDS),
}


def said_before(row: dict[str, object]) -> str:
    """The system's words, as a page sends them; nothing where there are none."""
    messages = row["messages"]
    assert isinstance(messages, list)
    return str(messages[0]["content"]) if messages[0]["role"] == "system" else ""


@pytest.mark.parametrize("name", names())
def test_a_page_says_what_the_model_was_taught(name: str) -> None:
    page = named(name).policy().page
    assert page is not None and page.path in {one.place.path for one in ASSISTANTS}
    learned = {said_before(row) for row in LEARNED[name]()}
    assert learned == {page.system}


@pytest.mark.parametrize("name", names())
def test_the_policy_of_a_run_has_the_words_and_is_read_back(name: str, tmp_path: Path) -> None:
    _write_policy(named(name), tmp_path, [{"workload": "some", "pick": "shallow"}])
    read = Policy.load(tmp_path / "policy.yaml")
    assert read.page == named(name).policy().page and read.workloads["some"] == "shallow"
    assert yaml.safe_load((tmp_path / "policy.yaml").read_text("utf-8"))["page"]["path"] == name


def test_the_first_chat_page_says_what_stands_before_a_user_s_own_rows(tmp_path: Path) -> None:
    turns = [
        [*([{"role": "system", "content": "You are a clerk."}] if n % 3 else []), {"role": "user", "content": f"What is {n}?"},
         {"role": "assistant", "content": "It is."}]
        for n in range(300)
    ]  # fmt: skip
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"messages": one}) + "\n" for one in turns), "utf-8")
    begun(tmp_path / "rows.jsonl", tmp_path / "own")
    page = Own(tmp_path / "own").policy().page
    assert page is not None and (page.path, page.system) == ("", "You are a clerk.")


def test_each_report_has_the_article_s_example() -> None:
    article = {
        "customer-service": "When does my order arrive?",
        "code": "Write quicksort in Python and explain.",
        "medicine": "I have had a fever, a cough and weakness for three days.",
    }
    for name, text in article.items():
        assert text in [str(messages[-1]["content"]) for messages in named(name).examples()]
