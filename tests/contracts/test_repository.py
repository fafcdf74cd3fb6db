"""What a reader of the repository relies on: layout, no secrets, and documentation that says what is there."""

import ast
import functools
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import shoal
from shoal.stages import STAGES
from tests.contracts.commands import Option, commands

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
JOBS = sorted((ROOT / "jobs").glob("*.py"))
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "AGENTS.md",
    ROOT / "CHANGELOG.md",
    ROOT / "examples" / "README.md",
    *ROOT.glob("docs/**/*.md"),
]
YAML = sorted([*ROOT.glob("clusters/*.yaml"), *ROOT.glob("serve_configs/*.yaml")])
COMMANDS = commands()


@functools.cache
def tracked() -> list[Path]:
    """Files under version control that are text; all files, where there is no git."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False).stdout
    names = [name for name in listed.split("\0") if name]
    paths = [ROOT / name for name in names] or [p for p in ROOT.rglob("*") if ".venv" not in p.parts]
    return [p for p in paths if p.is_file() and p.suffix not in (".png", ".jpg") and b"\0" not in p.read_bytes()[:4096]]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


# --- layout ---------------------------------------------------------------------------------------------------------


def test_platform_is_no_package(tmp_path: Path) -> None:
    """The check that runs before Python does, here and where it must fail."""
    script = tmp_path / "tests" / "contracts" / "no_init.sh"
    script.parent.mkdir(parents=True)
    (tmp_path / "platform").mkdir()
    shutil.copy(HERE / "no_init.sh", script)
    assert subprocess.run(["sh", HERE / "no_init.sh"], check=False).returncode == 0
    assert subprocess.run(["sh", script], check=False).returncode == 0
    (tmp_path / "platform" / "__init__.py").touch()
    failed = subprocess.run(["sh", script], capture_output=True, text=True, check=False)
    assert failed.returncode == 1 and len(failed.stderr.splitlines()) == 1


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)
def test_jobs_are_thin(path: Path) -> None:
    """A docstring, and one line."""
    text = path.read_text()
    assert len(text.removeprefix('"""').partition('"""')[2].strip().splitlines()) <= 6


@pytest.mark.parametrize("path", YAML, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_config_file_starts_with_when_to_use_it_and_what_it_costs(path: Path) -> None:
    heads = [line[2:].partition(":")[0] for line in path.read_text().splitlines() if re.match(r"# [A-Z]\w+:", line)]
    assert heads[:3] == ["When", "Cost", "Use"]


def test_the_version_is_one() -> None:
    """It stands in `shoal/__init__.py` alone, from which a wheel has it; the changelog is closed under it, and open above."""
    told = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "version" not in told["project"] and "version" in told["project"]["dynamic"]
    assert told["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "shoal.__version__"}
    heads = re.findall(r"^## \[(.+?)\](?: - (\d{4}-\d{2}-\d{2}))?$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert heads[0] == ("Unreleased", "")
    assert heads[1][0] == shoal.__version__ and heads[1][1]


def test_the_licence_is_the_one_that_is_named() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text and "Version 2.0, January 2004" in text and "END OF TERMS AND CONDITIONS" in text


DECISIONS = sorted(ROOT.glob("docs/decisions/*.md"))


def test_a_decision_is_short_and_says_its_price() -> None:
    assert [path.name[:5] for path in DECISIONS] == [f"{n:04}-" for n in range(1, len(DECISIONS) + 1)]
    for path in DECISIONS:
        text = path.read_text()
        assert text.startswith(f"# {path.name[:4]}: ") and len(text.splitlines()) <= 35, path.name
        assert re.search(r"^\d{4}-\d{2}-\d{2}$", text, re.MULTILINE), path.name
        assert all(f"**{head}.**" in text for head in ("Decision", "Why", "What it costs")), path.name


def test_the_changelog_is_short() -> None:
    assert len((ROOT / "CHANGELOG.md").read_text().splitlines()) <= 200


def test_every_decision_that_a_file_names_is_there() -> None:
    known = {path.name[:4] for path in DECISIONS}
    named = [
        (path, n) for path, text in texts() for n in re.findall(r"\bdecisions?\W{1,8}(0\d{3})\b", text, re.IGNORECASE)
    ]
    assert len(named) > 80
    assert {f"{name_of(path)}: {number}" for path, number in named if number not in known} == set()


# --- what must not be there -----------------------------------------------------------------------------------------

FORBIDDEN = {
    "a path of one machine": r"(?<![\w./~$-])/(?:work|root|Users|home/(?!ray\b))/?\w",
    "a temporary path": r"(?<![\w.])/tmp/\w",
    "an AWS key": r"\bAKIA[0-9A-Z]{16}\b",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY",
    "a token": r"\b(?:hf|ghp|gho|glpat|xox[bp])[_-][A-Za-z0-9]{20,}|\bsk-[A-Za-z0-9]{20,}",
}
PICKLED = {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
# a word without which a module has nothing of what the test looks for
UNSAFE = re.compile("|".join([*PICKLED, r"torch\s*\.\s*(load|save)\b", "weights_only"]))


@functools.cache
def texts() -> list[tuple[Path, str]]:
    return [(path, path.read_text(encoding="utf-8")) for path in tracked() if path != Path(__file__)]


@pytest.mark.parametrize("what", FORBIDDEN)
def test_no_file_holds(what: str) -> None:
    found = [
        f"{name_of(path)}:{text.count(chr(10), 0, match.start()) + 1}: {match[0][:100]}"
        for path, text in texts()
        for match in re.finditer(FORBIDDEN[what], text)
    ]
    assert found == []


def test_the_patterns_find_what_they_are_for() -> None:
    cases = {
        "a path of one machine": ["cd /ro" + "ot/x", "'/ho" + "me/ann/x'", "/Us" + "ers/ann"],
        "a temporary path": ["open('/t" + "mp/x')"],
        "an AWS key": ["key = AKIA" + "A1B2" * 4],
        "a private key": ["-----BEGIN RSA " + "PRIVATE KEY-----"],
        "a token": ["hf_" + "a1" * 12, "sk-" + "a1" * 12],
    }
    for what, lines in cases.items():
        assert all(re.search(FORBIDDEN[what], line) for line in lines), what
    assert not re.search(FORBIDDEN["a path of one machine"], "COPY . /home/ray/shoal")


def test_nothing_is_pickled() -> None:
    found = []
    for folder in ("platform", "jobs", "ui"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            text = path.read_text()
            if not UNSAFE.search(text):
                continue  # to take all modules apart takes seconds
            for node in ast.walk(ast.parse(text)):
                names: list[str] = []
                if isinstance(node, ast.Import):
                    names = [alias.name for alias in node.names]
                elif isinstance(node, ast.ImportFrom):
                    names = [node.module or ""]
                used = {name.partition(".")[0] for name in names} & PICKLED
                if used or (isinstance(node, ast.Attribute) and ast.unparse(node) in ("torch.load", "torch.save")):
                    found.append(f"{name_of(path)}:{node.lineno}")
                if isinstance(node, ast.keyword) and node.arg in ("allow_pickle", "weights_only"):
                    found.append(f"{name_of(path)}:{node.value.lineno}")
    assert found == []


# --- documentation --------------------------------------------------------------------------------------------------


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a page in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def lines(text: str) -> Iterator[list[str]]:
    """The commands of a shell block as words; continued lines joined, comments left out, ``a && b`` taken apart."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while "&&" in words:
            at = words.index("&&")
            yield words[:at]
            words = words[at + 1 :]
        if words:
            yield words


def check_shoal(words: list[str]) -> None:
    """That ``shoal WORDS`` is a command with these options, the required ones among them."""
    name = next((n for n in (" ".join(words[:2]), words[0]) if n in COMMANDS), None)
    assert name, f"there is no shoal {words[0]}"
    options: list[Option] = COMMANDS[name]
    given = [word.partition("=")[0] for word in words if word.startswith("--")]
    known = {each for option in options for each in option.names}
    assert set(given) <= known, f"shoal {name}: {sorted(set(given) - known)}"
    lacking = [
        o.names[0] for o in options if o.required and o.names[0].startswith("-") and not set(o.names) & set(given)
    ]
    assert not lacking, f"shoal {name} lacks {lacking}"


def check_job(words: list[str]) -> None:
    """That ``python jobs/X.py OPTIONS`` is a job, and `shoal X` a command with these options, the required ones among them."""
    assert (ROOT / words[0]).is_file(), words[0]
    check_shoal([Path(words[0]).stem, *words[1:]])


def check(words: list[str]) -> None:
    if words[0] == "make":
        targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
        assert {w for w in words[1:] if "=" not in w} <= targets, words
    elif words[0] == "shoal":
        check_shoal(words[1:])
    elif words[0] == "ray" and "--" in words:
        check(words[words.index("--") + 1 :])
    elif words[0] == "python" and words[1].startswith("jobs/"):
        check_job(words[1:])
    elif words[0] == "python" and words[1].startswith("examples/"):
        assert (ROOT / words[1]).is_file(), words[1]


def test_every_command_of_a_page_exists() -> None:
    wrong = list[str]()
    for page in PAGES:
        for words in (words for block in blocks(page, "sh") for words in lines(block)):
            try:
                check(words)
            except AssertionError as error:
                wrong.append(f"{name_of(page)}: {shlex.join(words)}: {error}")
    assert wrong == []


def test_every_option_of_a_command_in_a_sentence_exists() -> None:
    """Of those in backquotes, which may leave out what the page has said."""
    for page in PAGES:
        for text in re.findall(r"`(shoal [a-z][^`]*)`", page.read_text()):
            words = shlex.split(text)
            name = next((n for n in (" ".join(words[1:3]), words[1]) if n in COMMANDS), None)
            if name is None:  # a group, such as `shoal release`
                assert any(known.startswith(f"{words[1]} ") for known in COMMANDS), f"{name_of(page)}: {text}"
                continue
            known = {each for option in COMMANDS[name] for each in option.names} | {"--help"}
            given = {word.partition("=")[0] for word in words if word.startswith("--")}
            assert given <= known, f"{name_of(page)}: {text}"


def test_a_command_that_does_not_exist_is_found() -> None:
    for line in ("make brew", "shoal pretrian", "shoal chat --modell x", "shoal pretrain --steps 1", "python jobs/x.py",
                 "python examples/x.py",
                 "ray job submit -- python jobs/pretrain.py --stepz 1"):  # fmt: skip
        with pytest.raises(AssertionError):
            check(shlex.split(line))


@pytest.mark.parametrize("path", [*JOBS, *YAML], ids=name_of)
def test_the_commands_at_the_top_of_a_file_exist(path: Path) -> None:
    """Those of a job's docstring, and of the comment of a YAML file."""
    text = path.read_text()
    if path.suffix == ".py":
        text = ast.get_docstring(ast.parse(text)) or ""
    else:
        text = "\n".join(re.sub(r"^#( Use:)?", "", line) for line in text.splitlines() if line.startswith("#"))
    found = 0
    for line in text.replace("\\\n", " ").splitlines():
        match = re.search(r"(?:^|\s)((?:shoal|python jobs/|ray job submit )\S*.*)", line.strip())
        if match and "`" not in line:
            check(shlex.split(match[1], comments=True))
            found += 1
    assert found or "serve deploy" in text or "local_ray" in text


def test_every_link_of_a_page_leads_somewhere() -> None:
    targets = [(page, target) for page in PAGES for target in re.findall(r"\]\(([^)#\s]+)", page.read_text())]
    lost = [(name_of(page), to) for page, to in targets if not (to.startswith("http") or (page.parent / to).exists())]
    assert len(targets) > 80 and lost == []


def test_every_file_that_a_page_names_is_there() -> None:
    """Words in backquotes that look like a path of this repository or of the package."""
    package = ROOT / "platform" / "shoal"
    places = [ROOT, package, *(place for place in package.iterdir() if place.is_dir())]
    lost = list[str]()
    for page in PAGES:
        for word in re.findall(r"`([\w./-]+/[\w./-]*|\w+\.(?:py|yaml|toml))`", page.read_text()):
            if word.startswith(("runs/", "/", "DIR/", "RUN/")) or word == "platform/__init__.py":
                continue
            if not any((place / word).exists() for place in (*places, page.parent)):
                lost.append(f"{name_of(page)}: {word}")
    assert lost == []


def test_every_file_of_readmes_tree_is_there() -> None:
    (tree,) = [block for block in blocks(ROOT / "README.md", "text") if block.startswith("platform/")]
    above = ROOT
    for line in tree.splitlines():
        names, _, said = line.strip().partition("  ")
        folder = ROOT if not line.startswith(" ") else above
        for name in names.split():
            assert (folder / name).exists(), f"{name} in {folder}"
        if not line.startswith(" "):
            above = ROOT / names
            for name in re.findall(r"\b[\w-]+\.yaml|\w+/(?= |$)", said):
                assert (above / name).exists(), f"{name} in {above}"


def run_job(path: Path, words: list[str], monkeypatch: pytest.MonkeyPatch) -> int | str | None:
    """Exit code of a job that ends while it reads its options."""
    monkeypatch.setattr(sys, "argv", [name_of(path), *words])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(path), run_name="__main__")
    return end.value.code


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)
def test_a_job_explains_itself(path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_job(path, ["--help"], monkeypatch) == 0
    said = capsys.readouterr().out
    assert f"python {name_of(path)} --" in said, "a command line to copy"
    assert all(name in said for option in COMMANDS[path.stem] for name in option.names), "the command's options"


def test_every_stage_is_a_command_and_a_job() -> None:
    """Both at once, from one declaration: a script hands its arguments to the command of its name."""
    names = {stage.__name__.lower() for stage in STAGES}
    assert {path.stem for path in JOBS} == names <= set(COMMANDS)


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)
def test_a_job_that_is_wrongly_called_exits_with_2(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_job(path, ["--stepz", "1"], monkeypatch) == 2
