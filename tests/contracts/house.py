"""What `make house` prints: how large the repository is, beside what it may be at most.

A number above its bound is an error only where `BOUNDS` says ``enforced``. The bounds are where the repository goes; each is
enforced from the commit on that reaches it.
"""

import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import grimp

ROOT = Path(__file__).parents[2]
CODE = {".py", ".js", ".css", ".html", ".jinja"}


class Bound(NamedTuple):
    name: str
    at_most: int
    enforced: bool = False


BOUNDS = [
    Bound("product lines", 55_000),
    Bound("product files", 280),
    Bound("test lines", 55_000),
    Bound("page lines", 6_500, enforced=True),
    Bound("decisions", 40, enforced=True),
    Bound("modules over 400 lines", 0),
    Bound("files in import circles", 0),
]


def lines(paths: Iterable[Path]) -> int:
    return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in paths)


def files(folders: Iterable[str], suffixes: set[str]) -> Iterator[Path]:
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in suffixes and path.is_file() and "egg-info" not in str(path):
                yield path


def circles(imports: dict[str, set[str]]) -> list[set[str]]:
    """The groups of modules that import each other, by any way round. `imports`: of each module, which ones it imports."""

    def reached(module: str) -> set[str]:
        seen: set[str] = set()
        waiting = [module]
        while waiting:
            for other in imports.get(waiting.pop(), set()) - seen:
                seen.add(other)
                waiting.append(other)
        return seen

    reach = {module: reached(module) for module in imports}
    in_one = {
        frozenset({m for m in reach[module] if module in reach[m]}) for module in imports if module in reach[module]
    }
    return [set(group) for group in in_one]


def import_circles() -> list[set[str]]:
    """Of the package `shoal`, imports inside functions included."""
    graph = grimp.build_graph("shoal", cache_dir=None)
    return circles({module: set(graph.find_modules_directly_imported_by(module)) for module in graph.modules})


def measured() -> dict[str, int]:
    product = list(files(["platform", "ui", "jobs"], CODE))
    python = [path for path in product if path.suffix == ".py"]
    pages = [
        p for p in files(["docs"], {".md"}) if not {"decisions", "reference"} & set(p.relative_to(ROOT / "docs").parts)
    ]
    return {
        "product lines": lines(product),
        "product files": sum(1 for path in python if path.is_relative_to(ROOT / "platform")),
        "test lines": lines(files(["tests"], {".py"})),
        "page lines": lines([*pages, ROOT / "README.md"]),
        "decisions": sum(1 for _ in (ROOT / "docs" / "decisions").glob("[0-9]*.md")),
        "modules over 400 lines": sum(lines([path]) > 400 for path in python),
        "files in import circles": sum(map(len, import_circles())),
    }


def main() -> int:
    numbers = measured()
    failed = False
    print(f"{'':26}{'now':>9}{'at most':>10}")
    for bound in BOUNDS:
        over = numbers[bound.name] > bound.at_most
        failed |= over and bound.enforced
        mark = "" if not over else "  TOO MUCH" if bound.enforced else "  not yet"
        print(f"{bound.name:26}{numbers[bound.name]:>9,}{bound.at_most:>10,}{mark}")
    print(json.dumps(numbers))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
