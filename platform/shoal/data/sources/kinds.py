"""What a file is, by its name: text, code, an image, a table of rows or an archive; plain or compressed.

Notable: suffixes are an allow-list, so that nothing is read as text by guessing. Only a file without a suffix is looked into,
for the ``#!`` line of a script.
"""

from __future__ import annotations

import posixpath
from dataclasses import dataclass

PLAIN = frozenset({".adoc", ".markdown", ".md", ".mdx", ".org", ".rst", ".tex", ".text", ".txt"})
HTML = frozenset({".htm", ".html", ".xhtml"})
CODE = frozenset({
    ".ada", ".adb", ".ads", ".agda", ".asm", ".awk", ".bash", ".bat", ".bzl", ".c", ".cbl", ".cc", ".cfg", ".clj",
    ".cljs", ".cmake", ".cob", ".coffee", ".cpp", ".cr", ".cs", ".css", ".cu", ".cuh", ".cxx", ".d", ".dart", ".el",
    ".elm", ".erl", ".ex", ".exs", ".f", ".f03", ".f08", ".f90", ".f95", ".fish", ".for", ".fs", ".fsi", ".fsx",
    ".gd", ".glsl", ".go", ".gradle", ".graphql", ".groovy", ".h", ".hcl", ".hh", ".hpp", ".hrl", ".hs", ".hxx",
    ".idr", ".ini", ".ino", ".java", ".jl", ".js", ".jsx", ".kt", ".kts", ".lean", ".less", ".lhs", ".lisp", ".ll",
    ".lsp", ".lua", ".m", ".m4", ".metal", ".mjs", ".mk", ".ml", ".mli", ".mm", ".nim", ".nix", ".pas", ".php", ".pl",
    ".pm", ".proto", ".ps1", ".purs", ".pxd", ".py", ".pyi", ".pyx", ".r", ".rb", ".rkt", ".rs", ".s", ".sass",
    ".scala", ".scm", ".scss", ".sh", ".sml", ".sol", ".sql", ".ss", ".st", ".sv", ".svelte", ".swift", ".tcl", ".tf",
    ".thrift", ".toml", ".ts", ".tsx", ".v", ".vala", ".vb", ".vhd", ".vhdl", ".vim", ".vue", ".wat", ".wgsl",
    ".yaml", ".yml", ".zig", ".zsh",
})  # fmt: skip
CODE_NAMES = frozenset({
    "build", "build.bazel", "cmakelists.txt", "containerfile", "dockerfile", "gemfile", "gnumakefile", "jenkinsfile",
    "justfile", "makefile", "rakefile", "vagrantfile", "workspace",
})  # fmt: skip
IMAGES = frozenset({".jpeg", ".jpg", ".png", ".webp"})
PARQUET = ".parquet"
TABLES = frozenset({".jsonl", ".ndjson", PARQUET})
ARCHIVE = ".tar"
COMPRESSED = frozenset({".gz", ".zst"})


@dataclass(frozen=True)
class Kind:
    """`suffix` is the one under the compression: ``.py`` of ``a.py.gz``."""

    suffix: str
    compression: str  # ".gz", ".zst" or ""
    code: bool

    @property
    def image(self) -> bool:
        return self.suffix in IMAGES


def kind_of(name: str) -> Kind:
    """The kind of a file by its name alone."""
    name = posixpath.basename(name.lower())
    stem, suffix = posixpath.splitext(name)
    compression = suffix if suffix in COMPRESSED else ""
    if compression:
        name = stem
        suffix = posixpath.splitext(name)[1]
    elif suffix == ".tgz":
        suffix, compression = ARCHIVE, ".gz"
    return Kind(suffix.rstrip("."), compression, suffix in CODE or name in CODE_NAMES)


def is_read(name: str) -> bool:
    """Whether a member of an archive is a document by itself."""
    kind = kind_of(name)
    return kind.code or kind.image or kind.suffix in PLAIN | HTML or not kind.suffix
