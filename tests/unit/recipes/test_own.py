"""A recipe of a user's rows or documents: what is asked is of groups that nothing else has; a slip is refused in a line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from recipes import own, report
from recipes.named import named
from recipes.own import ASKED, LEARN, SETTINGS, Own, begun, keywords, overlap
from recipes.recipe import DEV, SUITES
from shoal import cli
from shoal.data.chats.rows import group_of
from shoal.errors import ConfigError, DataError, UsageError

PARTS = (LEARN, DEV, ASKED)


def chat(asked: str, answer: str, **more: Any) -> dict[str, Any]:
    return {
        "messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}], **more,
    }  # fmt: skip


def file_of(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Each of 200 questions is asked twice."""
    some = [chat(f"What is {n}?", f"It is {n}, {again}.", task="count") for n in range(200) for again in range(2)]
    return file_of(tmp_path / "rows.jsonl", some)


def read(folder: Path) -> dict[str, list[dict[str, Any]]]:
    return {name: [json.loads(line) for line in (folder / name).read_text("utf-8").splitlines()] for name in PARTS}


def test_rows_that_ask_the_same_are_on_one_side(rows: Path, tmp_path: Path) -> None:
    found = begun(rows, tmp_path / "own")
    parts = read(tmp_path / "own")
    assert (
        sum(found[Path(part).stem] for part in PARTS) == sum(map(len, parts.values())) == 400 and not found["left_out"]
    )
    asked = [{row["messages"][0]["content"] for row in some} for some in parts.values()]
    assert all(asked) and sum(map(len, asked)) == len(set.union(*asked)) == 200
    assert len(parts[LEARN]) > 250


def test_the_same_rows_are_split_the_same_in_any_order(rows: Path, tmp_path: Path) -> None:
    begun(rows, tmp_path / "one")
    turned = tmp_path / "turned.jsonl"
    turned.write_text("\n".join(reversed(rows.read_text("utf-8").splitlines())), "utf-8")
    begun(turned, tmp_path / "two")
    one, two = (
        {name: sorted(map(json.dumps, some)) for name, some in read(tmp_path / f).items()} for f in ("one", "two")
    )
    assert one == two


def test_documents_are_groups(tmp_path: Path) -> None:
    for n in range(100):
        (tmp_path / "docs").mkdir(exist_ok=True)
        (tmp_path / "docs" / f"d{n}.md").write_text(f"First {n}. Then it goes on.\n\n# Head\n\n一 {n}。二。", "utf-8")
    begun(tmp_path / "docs", tmp_path / "own")
    parts = read(tmp_path / "own")
    groups = [{row["group"] for row in some} for some in parts.values()]
    assert sum(map(len, groups)) == len(set.union(*groups)) == 100
    first = [row["messages"] for some in parts.values() for row in some if row["group"] == "d3.md"]
    assert [message["content"] for message in first[0]] == ["d3: First 3.", "Then it goes on."]


def test_files_and_paragraphs_of_documents_that_are_not_used_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (docs := tmp_path / "docs").mkdir()
    for n in range(100):
        (docs / f"d{n}.md").write_text(f"First {n}. Then it goes on.\n\n# Head\n\n\n", "utf-8")
    for name in ("a.csv", "b.csv", "c"):
        (docs / name).write_text("x,y\n")
    found = begun(docs, tmp_path / "own")
    apart = {"suffix .csv is not read": 2, "suffix (none) is not read": 1, "paragraph of one sentence": 100}
    assert found["left_out"] == apart and sum(found[Path(part).stem] for part in PARTS) == 100
    assert cli.main(["recipe", "new", "--from", str(docs), "--out", str(tmp_path / "two")]) == 0
    assert "left out: 2, suffix .csv is not read" in capsys.readouterr().err


TURN = {"role": "assistant", "content": None, "tool_calls": [
    {"id": "a", "type": "function", "function": {"name": "look", "arguments": "{}"}},
]}  # fmt: skip


@pytest.mark.parametrize(
    "behind",
    [
        [{"role": "system", "content": "Be brief."}], [{"role": "user", "content": "Thanks."}],
        [TURN, {"role": "tool", "tool_call_id": "a", "content": [{"type": "text", "text": "two"}]}],
    ],
)  # fmt: skip
def test_a_chat_with_an_answer_is_used_whatever_comes_behind_it(behind: list[Any], tmp_path: Path) -> None:
    some = [chat(f"What is {n}?", f"It is {n}.") for n in range(200)]
    for row in some:
        row["messages"] += behind
        for message in row["messages"][:2]:
            message["content"] = [{"type": "text", "text": message["content"]}]
    found = begun(file_of(tmp_path / "rows.jsonl", some), tmp_path / "own")
    parts = read(tmp_path / "own")
    assert sum(map(len, parts.values())) == 200 and not found["left_out"]
    ends = {row["messages"][-1]["role"] for part in parts.values() for row in part}
    assert ends == {"assistant"}


def test_augmented_rows_are_never_asked(tmp_path: Path) -> None:
    some = [chat(f"What is {n}?", "It is.", augmented="typo" if n % 2 else None) for n in range(400)]
    found = begun(file_of(tmp_path / "rows.jsonl", some), tmp_path / "own")
    parts = read(tmp_path / "own")
    assert found["left_out"] and not [row for name in (DEV, ASKED) for row in parts[name] if row.get("augmented")]
    assert [row for row in parts[LEARN] if row.get("augmented")]


def test_a_changed_copy_of_what_is_asked_is_not_learned_from(tmp_path: Path) -> None:
    """As `shoal augment` writes it: behind its row, in other words, with the same answer."""
    some = [
        row
        for n in range(200)
        for row in (chat(f"What is {n}?", f"It is {n}."), chat(f"Waht is {n}?", f"It is {n}.", augmented="typos"))
    ]
    begun(file_of(tmp_path / "rows.jsonl", some), tmp_path / "own")
    said = [{row["messages"][-1]["content"] for row in part} for part in read(tmp_path / "own").values()]
    assert all(said) and sum(map(len, said)) == len(set.union(*said)) == 200


def test_a_paragraph_of_two_documents_is_on_one_side_and_so_is_a_question_in_capitals(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    for n in range(200):
        own = f"First {n}. Then it goes on {n}."
        (tmp_path / "docs" / f"d{n}.md").write_text(f"{own}\n\nThis is {n % 7} of us. It may be copied.", "utf-8")
    begun(tmp_path / "docs", tmp_path / "own")
    asked = [{row["messages"][0]["content"].partition(": ")[2] for row in p} for p in read(tmp_path / "own").values()]
    assert all(asked) and sum(map(len, asked)) == len(set.union(*asked)) == 207
    some = [chat(text, "It is.") for n in range(200) for text in (f"What is {n}?", f"WHAT  is {n}?")]
    begun(file_of(tmp_path / "rows.jsonl", some), tmp_path / "rows")
    asked = [{row["messages"][0]["content"].lower() for row in p} for p in read(tmp_path / "rows").values()]
    plain = [{" ".join(text.split()) for text in some} for some in asked]
    assert sum(map(len, plain)) == len(set.union(*plain))


@pytest.mark.parametrize(
    "other", ["Ｗｈａｔ　ｉｓ {n}？", "What is {n}", "what is {n} ?", "What is {n}?!", "ＷＨＡＴ IS {n}。"]
)
def test_a_question_in_wide_letters_or_with_another_end_is_on_one_side(tmp_path: Path, other: str) -> None:
    some = [chat(text.format(n=n), f"It is {n}.") for n in range(200) for text in ("What is {n}?", other)]
    begun(file_of(tmp_path / "rows.jsonl", some), tmp_path / "own")
    numbers = [{row["messages"][-1]["content"] for row in part} for part in read(tmp_path / "own").values()]
    assert all(numbers) and sum(map(len, numbers)) == len(set.union(*numbers)) == 200


def test_a_folder_is_there_whole_or_not_at_all(rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of one could be neither run nor begun again."""
    real = own.write_rows

    def breaks(path: Path, some: Any) -> None:
        if path.name == ASKED:
            raise KeyboardInterrupt
        real(path, some)

    monkeypatch.setattr(own, "write_rows", breaks)
    with pytest.raises(KeyboardInterrupt):
        begun(rows, tmp_path / "own")
    assert not (tmp_path / "own").exists() and not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    monkeypatch.setattr(own, "write_rows", real)
    assert begun(rows, tmp_path / "own")["learn"] and (tmp_path / "own" / SETTINGS).is_file()


def test_other_forms_are_read(tmp_path: Path) -> None:
    some = [{"instruction": f"What is {n}?", "output": "It is."} for n in range(200)]
    begun(file_of(tmp_path / "rows.jsonl", some), tmp_path / "own")
    assert read(tmp_path / "own")[ASKED][0]["messages"][-1] == {"role": "assistant", "content": "It is."}


def test_the_folder_is_a_recipe(rows: Path, tmp_path: Path) -> None:
    begun(rows, tmp_path / "My data")
    recipe = named(str(tmp_path / "My data"))
    assert isinstance(recipe, Own) and recipe.name == "my-data" and recipe.preset.model.train_length == 256
    recipe.write(tmp_path / "run", 0)
    assert (tmp_path / "run" / SUITES / ASKED).is_file() and (tmp_path / "run" / LEARN).is_file()
    asked = read(tmp_path / "My data")[ASKED]
    right = [row["messages"][-1]["content"] for row in asked]
    found = {name: figure.value for name, figure in recipe.score(asked, right).items()}
    assert set(found) == set(recipe.measures) and set(found.values()) == {1.0}
    assert recipe.score(asked, [""] * len(asked))["answered"].value == 0.0
    assert set(recipe.rivals(tmp_path / "run")) == {"majority", "keyword rule", "nearest"}
    assert {recipe.workload(row) for row in asked} == {"count"}


def test_keywords_go_by_the_rarest_word() -> None:
    learned = [chat("the cat sits", "cat"), chat("the dog sits", "dog"), chat("the dog runs", "dog")]
    answers = keywords(learned)([chat("a cat and the dog", "")["messages"][:1], chat("nothing", "")["messages"][:1]])
    assert answers == ["cat", "dog"]


@pytest.mark.parametrize(
    ("said", "right", "value"),
    [
        ("a b", "a b", 1.0), ("a", "a b c", 0.5), ("x", "a", 0.0), ("A, b!", "b a", 1.0), ("", "", 0.0),
        ("你好", "你", 2 / 3),
    ],
)  # fmt: skip
def test_overlap_is_f1_of_words(said: str, right: str, value: float) -> None:
    assert overlap(said, right) == pytest.approx(value)


def test_what_cannot_be_used_is_refused(rows: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="got 20; allowed: 60 or more"):
        begun(file_of(tmp_path / "few.jsonl", [chat(f"{n}", "x") for n in range(20)]), tmp_path / "own")
    with pytest.raises(DataError, match=r"odd.jsonl.*line 2"):
        begun(file_of(tmp_path / "odd.jsonl", [chat("a", "b"), {"x": 1}]), tmp_path / "own")
    with pytest.raises(DataError, match="no chat with an answer"):
        begun(file_of(tmp_path / "text.jsonl", [{"text": "x"}]), tmp_path / "own")
    with pytest.raises(UsageError, match="--from"):
        begun(tmp_path / "none", tmp_path / "own")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no documents"):
        begun(tmp_path / "empty", tmp_path / "own")
    assert not (tmp_path / "own").exists()
    begun(rows, tmp_path / "own")
    with pytest.raises(UsageError, match="not there yet"):
        begun(rows, tmp_path / "own")
    (tmp_path / "own" / SETTINGS).write_text("name: x\n", "utf-8")
    with pytest.raises(ConfigError, match="missing key"):
        named(str(tmp_path / "own"))


def test_the_command_begins_one_and_refuses_half_of_it(
    rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "own"
    assert cli.main(["recipe", "new", "--from", str(rows), "--out", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["learn"] > 250 and (out / SETTINGS).is_file()
    assert cli.main(["recipe", "new", "--out", str(tmp_path / "x")]) == 2
    assert cli.main(["recipe", "law", "--from", str(rows), "--out", str(tmp_path / "x")]) == 2
    of_a_run = ["--minutes", "5", "--model", "m"]
    assert cli.main(["recipe", "new", "--from", str(rows), "--out", str(tmp_path / "x"), *of_a_run]) == 2
    assert "--minutes, --model" in capsys.readouterr().err, "they were taken, and did nothing"
    assert not (tmp_path / "x").exists()


def test_what_asks_the_same_is_on_one_side_whatever_its_group_is_called(tmp_path: Path) -> None:
    some = [chat(f"What is {n % 300}?", f"It is {n}.", group=f"g{n}") for n in range(400)]
    found = begun(file_of(tmp_path / "rows.jsonl", some), tmp_path / "own")
    asked = [{row["messages"][0]["content"] for row in part} for part in read(tmp_path / "own").values()]
    assert sum(map(len, asked)) == len(set.union(*asked)) and found["left_out"]
    backwards = begun(file_of(tmp_path / "back.jsonl", some[::-1]), tmp_path / "back")
    assert backwards == found


def test_a_group_of_number_0_is_a_group(tmp_path: Path) -> None:
    some = [chat(f"What is {n}?", "x", group=n // 4) for n in range(400)]
    begun(file_of(tmp_path / "rows.jsonl", some), tmp_path / "own")
    assert sorted(row["group"] for part in read(tmp_path / "own").values() for row in part).count("0") == 4


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"messages": ' + "[" * 100_000, "line 1"),
        ('{"messages": [{"role": "user", "content": "\\ud800"}, {"role": "assistant", "content": "x"}]}', "no Unicode"),
        (json.dumps({**chat("a", "b"), "task": "\ud800"}), "no Unicode"),
        (json.dumps(chat("a", " ")), "no chat with an answer"),
        (json.dumps({"messages": [{"role": "user", "content": [
            {"type": "text", "text": "What?"}, {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}},
        ]}, {"role": "assistant", "content": "A cat."}]}), "no text"),
        (json.dumps({"messages": {"role": "user"}}), "line 1"), (json.dumps({"messages": [1, 2]}), "line 1"),
        (json.dumps({"messages": [{"role": "user", "content": 5}, {"role": "assistant", "content": [None]}]}), "line 1"),
        ("[]", "line 1"), ("null", "line 1"), ("\xff", "line 1"), ('{"messages": [], "group": 1e999}', "line 1"),
    ],
)  # fmt: skip
def test_a_hostile_row_is_refused_with_its_line(tmp_path: Path, line: str, said: str) -> None:
    (tmp_path / "rows.jsonl").write_bytes(line.encode("latin-1") + b"\n")
    with pytest.raises(DataError, match=said):
        begun(tmp_path / "rows.jsonl", tmp_path / "own")
    assert not (tmp_path / "own").exists()


@pytest.mark.parametrize(
    ("key", "value"), [("most_tokens", 0), ("most_tokens", 256), ("row_tokens", 7), ("name", "a/b"), ("name", " ")]
)
def test_settings_that_no_model_has_are_refused(rows: Path, tmp_path: Path, key: str, value: Any) -> None:
    begun(rows, tmp_path / "own")
    path = tmp_path / "own" / SETTINGS
    lines = [line for line in path.read_text("utf-8").splitlines() if not line.startswith(f"{key}:")]
    path.write_text("\n".join([*lines, f"{key}: {json.dumps(value)}"]), "utf-8")
    with pytest.raises(ConfigError, match=key):
        named(str(tmp_path / "own"))


def test_names_of_a_user_s_are_no_markup_of_the_report(rows: Path, tmp_path: Path) -> None:
    begun(rows, tmp_path / "own")
    told: dict[str, Any] = {
        "weak": ["[/x] is weak."], "notes": [], "suites": {}, "depths": [], "costs": {}, "examples": [], "samples": [],
        "workloads": [
            {"workload": "[/x] a|b\nc", "rows": 1, "depths": {"full": 1.0}, "pick": "full", "auto_layers": 1},
        ],
    }  # fmt: skip
    console = Console(width=200, record=True)
    report.show(named(str(tmp_path / "own")), told, console)
    assert "[/x] is weak." in console.export_text()
    assert "| [/x] a\\|b c | 1 |" in report.markdown(named(str(tmp_path / "own")), told)


def test_a_group_is_what_the_rows_say(tmp_path: Path) -> None:
    some = [chat(f"What is {n}?", "x", group=f"g{n // 4}") for n in range(400)]
    begun(file_of(tmp_path / "rows.jsonl", some), tmp_path / "own")
    for name, part in read(tmp_path / "own").items():
        assert all(group_of(row) % 10 in {LEARN: range(8), DEV: (8,), ASKED: (9,)}[name] for row in part)
