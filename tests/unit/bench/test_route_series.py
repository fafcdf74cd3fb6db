"""Series of known, hidden difficulty, and what `shoal bench route --series` makes of a model that is trained on them."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from shoal.bench.route_series import AFTER, KINDS, LINES, LINKS, drawn, prompts, run, series
from shoal.bench.route_tasks import VOCAB, WORDS, rows
from shoal.bench.route_train import LENGTH, config_of
from shoal.model.net import Net

NAMED = {number: word for word, number in WORDS.items()}


def steps(program: list[str], name: str) -> tuple[str, int]:
    """The digit that `name` leads to, and over how many assignments."""
    table, count = dict(word.split("=") for word in program), 0
    while name in table:
        name, count = table[name], count + 1
    return name, count


@pytest.mark.parametrize("control", [False, True])
def test_values_are_what_the_program_says_and_kinds_what_its_lines_need(control: bool) -> None:
    tokens, targets, shares = drawn(np.random.default_rng(1), 200, control)
    assert tokens.shape == targets.shape and tokens.shape[1] <= LENGTH and tokens.max() < VOCAB
    hard: dict[float, list[bool]] = {}
    for row, taught, share in zip(tokens, targets, shares.tolist(), strict=True):
        words = [NAMED[int(token)] for token in row]
        program, said = words[1 : words.index(">")], words[words.index(">") + 1 :]
        assert len(said) == 2 * LINES and words[0] == "V"
        for place, line in enumerate(program):  # nothing is read before it is set
            value, count = steps(program[: place + 1], line[0])
            assert value in "012" and 1 <= count <= LINKS and NAMED[int(taught[1 + place])] == value
        for line, value in zip(said[::2], said[1::2], strict=True):
            found, count = steps(program, line[2])
            assert found == value and line[0] not in {word[0] for word in program}
            hard.setdefault(share, []).append(count > 1)
        at = words.index(">")
        assert (taught[at:-1] == row[at + 1 :]).all() and taught[0] == taught[-1] == -1
    for share, some in hard.items():
        assert np.mean(some) == pytest.approx(share, abs=0.03)
    assert set(hard) == ({np.mean([*KINDS.values()])} if control else {*KINDS.values()})


def test_training_rows_are_the_series_with_what_is_taught() -> None:
    tokens, targets, _ = drawn(np.random.default_rng(2), 5)
    made = rows(series(np.random.default_rng(2), 5))
    assert (made[0] == tokens).all() and (made[1] == targets).all()


def test_a_prompt_is_the_program_and_its_answer_all_lines_with_their_values() -> None:
    found, _ = prompts(Net(config_of("test")).init_(0).eval(), np.random.default_rng(3), 6, control=False)
    tokens, _, _ = drawn(np.random.default_rng(3), 6)
    assert found.lengths.tolist() == [tokens.shape[1] - 2 * LINES] * 6
    assert found.rest is not None and found.answers.tolist() == [2 * LINES] * 6 and found.rest.after == AFTER
    assert torch.equal(found.groups, torch.arange(6))


@pytest.mark.drill  # as of the other families: test_route
def test_the_benchmark_from_training_to_its_line_of_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    how = {"shape": "test", "seeds": 1, "seed": 4, "steps": 2, "minutes": None, "keep": tmp_path, "fit": 40, "test": 20}
    run(Console(), **how)  # type: ignore[arg-type]
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    (one,) = said["runs"]
    assert (one["seed"], one["updates"], said["after"]) == (4, 2, AFTER)
    for name, kinds in (("series", {*KINDS}), ("control", {"control"})):
        assert set(one[name]["gaps"]) == kinds and isinstance(one[name]["used"], bool)
    assert [path.suffix for path in tmp_path.iterdir()] == [".safetensors"]
