"""What programs may do: compute, import what is harmless, print, fail; and what is said where there is no sandbox."""

from __future__ import annotations

import math
import os
import sys
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.errors import ResourceError, UsageError
from shoal.sandbox import Call, kernel, refused, run, written
from shoal.sandbox.inside import CODECS, MODULES
from shoal.sandbox.process import ENDED, FAILED

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the sandbox is Linux's")
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2) | st.sampled_from([0.0, 1.0, -1.0, 0.5]) | st.text("ab'", max_size=2),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.lists(inner, max_size=2).map(tuple)
        | st.dictionaries(st.text("ab", max_size=1), inner)
    ),
    max_leaves=4,
)  # fmt: skip


def same(one: object, other: object) -> bool:
    """Equal, and of the same types all the way down: the definition of what `written` tells apart."""
    if type(one) is not type(other):
        return False
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return set(one) == set(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, float) and isinstance(other, float):
        return one == other and math.copysign(1, one) == math.copysign(1, other)
    return one == other


@given(PLAIN, PLAIN)
@settings(max_examples=400, deadline=None)
def test_two_values_are_written_alike_only_if_they_are_the_same(one: object, other: object) -> None:
    assert (written(one) == written(other)) == same(one, other)


def test_order_is_no_part_of_a_dict_or_a_set_and_of_what_is_not_plain_only_the_type_is_told() -> None:
    assert written({"a": 1, "b": 2}) == written({"b": 2, "a": 1}) and written({3, 1}) == written({1, 3})
    assert written(object()) == "<object>" and written((1,)) != written([1]) != written({1})


@linux
def test_functions_are_called_in_order_and_what_they_print_is_kept() -> None:
    ran = run(
        "seen = []\ndef f(x, y=1):\n    print('f', x)\n    seen.append(x)\n    return seen\ndef g():\n    return seen[9]",
        [Call("f", [1, 2]), Call("f", ["é"]), Call("g"), Call("h"), Call("f", [None])],
    )
    assert ran.values == ("[1]", "[1, 'é']", None, None, "[1, 'é', None]")
    assert (ran.how, ran.code, ran.out, ran.err) == (ENDED, 0, "f 1\nf é\nf None\n", "")


@linux
def test_an_error_is_told_with_the_program_s_line_and_nothing_of_ours() -> None:
    ran = run("x = 1\ny = x / 0\n")
    assert ran.how == FAILED and ran.code == 1
    assert 'File "<program>", line 2' in ran.err and "y = x / 0" in ran.err and "inside.py" not in ran.err
    assert run("if:").err.splitlines()[-1].startswith("SyntaxError")
    assert run("import sys\nsys.exit(3)").code == 3
    ran = run("import sys\nsys.exit('no such list')")
    assert (ran.how, ran.code, ran.err) == (FAILED, 1, "no such list\n")
    assert run("input()").err.splitlines()[-1].startswith("EOFError")


@linux
@pytest.mark.parametrize("end", ["sys.stdout.close()", "sys.stdout = None"])
def test_who_closes_what_it_prints_to_has_ended_well(end: str) -> None:
    ran = run(f"import sys\nprint(1)\n{end}\ndef f():\n    return 2", [Call("f")])
    assert (ran.how, ran.out, ran.err, ran.values) == (ENDED, "1\n", "", ("2",))


@linux
def test_an_error_whose_text_is_another_error_ends_no_other_call() -> None:
    """The calls behind it were never made, and a traceback of ours was shown."""
    error = "class E(Exception):\n    def __str__(self):\n        raise ValueError\n"
    ran = run(f"{error}def f():\n    raise E\ndef g():\n    return 1", [Call("f"), Call("g")])
    assert (ran.how, ran.err, ran.values) == (ENDED, "", (None, "1"))
    ran = run(f"{error}raise SystemExit(E())")
    assert (ran.how, ran.code, ran.err) == (FAILED, 1, "")


@linux
def test_harmless_modules_and_codecs_work() -> None:
    """All of them in one program, after which nothing can be read from the disk."""
    lines = [f"import {name}" for name in MODULES]
    lines += [f"assert 'x'.encode({codec.replace('_', '-')!r})" for codec in CODECS]
    lines += [
        "print(random.random() < 1, time.time() > 0, datetime.datetime.now().year > 2000, len(secrets.token_hex(4)))"
    ]
    ran = run("\n".join(lines))
    assert (ran.err, ran.out) == ("", "True True True 8\n")


@linux
def test_many_at_once_do_not_mix_and_leave_no_process_and_no_descriptor() -> None:
    run("")
    me = psutil.Process()
    before = me.num_fds()
    with ThreadPoolExecutor(4) as pool:
        ran = list(pool.map(lambda n: run(f"print({n})\ndef f():\n    return {n}", [Call("f")]), range(12)))
    assert [(one.out, one.values) for one in ran] == [(f"{n}\n", (str(n),)) for n in range(12)]
    assert me.num_fds() <= before
    assert not [child for child in me.children() if "-I" in child.cmdline()]


@linux
def test_a_program_that_is_too_long_is_refused_and_a_long_one_is_read() -> None:
    with pytest.raises(UsageError, match="program's length"):
        run("x" * 100_001)
    assert run("# " + "é" * 99_000 + "\nprint(1)").out == "1\n"


def test_where_there_is_no_such_kernel_nothing_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "unsupported", lambda: "Darwin arm64")
    with pytest.raises(ResourceError, match=r"not run without a sandbox: got 'Darwin arm64'; allowed: Linux") as error:
        run("print(1)")
    assert "\n" not in error.value.message


@linux
@pytest.mark.parametrize("where", ["shoal.sandbox.process.os.pipe", "shoal.sandbox.process.subprocess.Popen"])
def test_where_no_process_can_be_started_that_is_what_is_said(monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """Of a machine that has a sandbox, and no descriptor left."""

    def full(*_: object, **__: object) -> None:
        raise OSError(24, "Too many open files")

    before = psutil.Process().num_fds()
    with monkeypatch.context() as patch:
        patch.setattr(where, full)
        with pytest.raises(
            ResourceError, match=r"no process could be started for a program: got .*Too many open files"
        ):
            run("print(1)")
    assert psutil.Process().num_fds() == before


@linux
@pytest.mark.parametrize(
    ("steps", "said"), [(b"", "Invalid argument"), (bytes([6, 0, 0, 0, 0, 0, 0xFF, 0x7F]), "does not keep to it")]
)
def test_a_filter_that_does_not_hold_runs_nothing(monkeypatch: pytest.MonkeyPatch, steps: bytes, said: str) -> None:
    """One that the kernel refuses, and one that lets everything through."""
    monkeypatch.setattr(kernel, "filter_of", lambda machine: steps)
    with pytest.raises(ResourceError, match=said) as error:
        run(f"import os\nos.write(1, b'ran')\nos.kill({os.getpid()}, 0)")
    assert "\n" not in error.value.message


@linux
def test_here_it_works() -> None:
    assert refused() == ""
