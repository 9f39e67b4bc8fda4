"""Measures how the project's Python prose reads.

python scripts/prose.py                 every tracked Python file, one row per folder and a total
python scripts/prose.py raysae/stream   the files below these paths, one row each

It counts sentence lengths, semicolons, and trailing comments that only continue a name. It is a report, not a gate. The
exit code is 0 whatever it finds.
"""

from __future__ import annotations

import ast
import io
import re
import statistics
import subprocess
import sys
import tokenize
from dataclasses import dataclass, field
from pathlib import Path

TARGETS = (
    "aims: median sentence of docstrings at most 11 words, at most 4 semicolons per 1,000 words, "
    "at most 5 % dangling comments"
)
DANGLING = re.compile(
    r"(of|for|in|into|to|by|with|without|from|at|on|as|per|than|that|which|who|whose|whom|where|when|while|so|but|and"
    r"|or|be|not|nor|if|until)\b"
)
# A sentence also ends at a paragraph, an item of a list, and an argument.
SENTENCE_END = re.compile(r"(?<=[.!?])\s+|:\n|\n\s*\n|\n\s*(?=[-*]|\w+: )")
WORD = re.compile(r"[^\W_][\w'’-]*")
LONG = 20  # A sentence with more words is long


@dataclass
class Prose:
    """What was counted in some files."""

    sentences: list[int] = field(default_factory=list)  # Words of each sentence of a docstring
    words: int = 0  # Words in docstrings and comments
    semicolons: int = 0
    trailing: int = 0  # Comments behind code
    dangling: int = 0  # Trailing comments that begin in the middle of a sentence

    def __add__(self, other: Prose) -> Prose:
        return Prose(*(mine + theirs for mine, theirs in zip(vars(self).values(), vars(other).values(), strict=True)))

    def row(self, name: str) -> str:
        median = statistics.median(self.sentences) if self.sentences else 0
        long = sum(length > LONG for length in self.sentences) / max(1, len(self.sentences))
        semicolons, dangling = 1000 * self.semicolons / max(1, self.words), self.dangling / max(1, self.trailing)
        return f"{name:<44} {median:>8.1f} {long:>8.0%} {semicolons:>12.1f} {dangling:>10.0%} {self.words:>8}"


def measure(source: str) -> Prose:
    """The prose of one module."""
    prose = Prose()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and (
            text := ast.get_docstring(node)
        ):
            _count(prose, text)
            prose.sentences += [len(words) for part in SENTENCE_END.split(text) if len(words := WORD.findall(part)) > 1]
    lines = source.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT:
            continue
        text = token.string.lstrip("# ")
        if re.match(r"(noqa|fmt:|type:|!)", text):
            continue
        _count(prose, text)
        if lines[token.start[0] - 1][: token.start[1]].strip():
            prose.trailing += 1
            prose.dangling += bool(DANGLING.match(text.lstrip("… ")))
    return prose


def _count(prose: Prose, text: str) -> None:
    prose.words += len(WORD.findall(text))
    prose.semicolons += text.count(";")


def main(paths: list[str]) -> None:
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "--", *paths], capture_output=True, text=True, check=True
    )
    files = [Path(line) for line in listed.stdout.splitlines() if line.endswith(".py") and Path(line).exists()]
    rows: dict[str, Prose] = {}
    for file in files:
        name = str(file) if paths else str(file.parent)
        rows[name] = rows.get(name, Prose()) + measure(file.read_text(encoding="utf-8"))
    print(f"{'':<44} {'sentence':>8} {f'> {LONG}':>8} {'; per 1,000':>12} {'dangling':>10} {'words':>8}")
    for name, prose in sorted(rows.items()):
        print(prose.row(name))
    print(sum(rows.values(), Prose()).row("all"))
    print(TARGETS)


if __name__ == "__main__":
    main(sys.argv[1:])
