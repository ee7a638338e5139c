"""The page in numbers: how long and how dense code lines are, file by file.

    python -m tests.page                 # this project
    python -m tests.page ../nanoGPT      # another checkout, to compare

A code line is a line that is neither blank nor only a comment; docstrings count. Tokens are
Python's own, without line ends and indentation. Prints characters and tokens a code line, and the
share of lines over 100 columns, of blank lines and of lines with a comment. A mark for a tool, such
as `# fmt: skip` or `# noqa`, explains nothing and does not count as a comment.
"""

import io
import pathlib
import re
import sys
import tokenize

LAYOUT = {
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.COMMENT,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}

# comments that only tools read
MARK = re.compile(r"#\s*(fmt|ruff|type|mypy|pragma|isort|pylint):|#\s*noqa\b", re.IGNORECASE)


def measure(text):
    """Source -> (characters and tokens a code line, share of lines over 100 columns, blank, with a
    comment)."""
    lines = text.splitlines()
    code = [line for line in lines if line.strip() and not line.strip().startswith("#")]
    tokens = list(tokenize.generate_tokens(io.StringIO(text).readline))
    words = [t for t in tokens if t.type not in LAYOUT]
    comments = [t for t in tokens if t.type == tokenize.COMMENT]
    commented = {t.start[0] for t in comments if not MARK.match(t.string)}
    return (
        sum(len(line) for line in code) / len(code),
        len(words) / len(code),
        sum(len(line) > 100 for line in lines) / len(lines),
        sum(not line.strip() for line in lines) / len(lines),
        len(commented) / len(lines),
    )


if __name__ == "__main__":
    root = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else ".")
    print(f"{'file':28} lines  characters  tokens  >100  blank  comment")
    for path in sorted(root.rglob("*.py")):
        name = str(path.relative_to(root))
        hidden = any(part.startswith(".") for part in path.relative_to(root).parts)
        if hidden or name.startswith("tests/"):
            continue
        text = path.read_text(encoding="utf-8")
        if len(text.splitlines()) < 40:
            continue
        characters, tokens, wide, blank, commented = measure(text)
        print(
            f"{name:28} {len(text.splitlines()):5}  {characters:10.1f}  {tokens:6.1f}"
            f"  {wide:4.0%}  {blank:5.0%}  {commented:7.0%}"
        )
