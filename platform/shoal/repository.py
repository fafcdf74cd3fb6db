"""What lies in the repository beside the package: `benchmarks/` and `recipes/`, which use Shoal as anybody would."""

from __future__ import annotations

import sys
from pathlib import Path

from shoal.errors import UsageError

ROOT = Path(__file__).resolve().parents[2]


def find(folder: str) -> bool:
    """Make `folder` importable as a package. False where Shoal is installed without its repository."""
    found = (ROOT / folder / "__init__.py").is_file()
    if found and str(ROOT) not in sys.path:
        sys.path.append(str(ROOT))
    return found


def need(folder: str) -> None:
    """As `find`. Raises UsageError where it is not there."""
    if not find(folder):
        do = "clone the repository and install Shoal from it: pip install -e ."
        raise UsageError(f"the folder {folder}/", got="Shoal without its repository", do=do)
