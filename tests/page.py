"""The page in numbers: how long and how dense code lines are, file by file.

    python -m tests.page                 # this project
    python -m tests.page ../nanoGPT      # another checkout, to compare
    python -m tests.page --imports       # what each command loads, and how long its --help takes

A code line is a line that is neither blank nor only a comment; docstrings count. Tokens are
Python's own, without line ends and indentation. Prints characters and tokens a code line, and the
share of lines over 100 columns, of blank lines and of lines with a comment. A mark for a tool, such
as `# fmt: skip` or `# noqa`, explains nothing and does not count as a comment.
"""

import io
import pathlib
import re
import resource
import subprocess
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


HEAVY = ("torch", "av", "PIL", "h5py", "scipy", "sklearn", "matplotlib", "decord", "triton")

# prints which modules of ours, and which of HEAVY, the import of a command loads
LOADED = """
import importlib, sys
importlib.import_module(sys.argv[1])
files = {name: getattr(module, "__file__", None) or "" for name, module in sys.modules.items()}
ours = [n for n, file in files.items() if file.startswith(sys.argv[2]) and ".venv" not in file]
print(len(ours) - 1, *(name for name in sys.argv[3:] if name in files))
"""


def print_imports():
    """A row for each command: modules of ours, CPU seconds of --help, large libraries."""
    root = pathlib.Path(__file__).parent.parent
    print(f"{'command':16} modules of ours  --help, CPU s  large libraries")
    for path in sorted(root.glob("*.py")):
        if "argparse" not in path.read_text(encoding="utf-8"):
            continue
        command = [sys.executable, "-c", LOADED, path.stem, str(root), *HEAVY]
        loaded = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
        count, *large = loaded.stdout.split()

        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, path, "--help"], cwd=root, capture_output=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        print(f"{path.name:16} {count:>15}  {seconds:13.2f}  {', '.join(large)}")


def print_pages(root):
    """A row for each file of at least 40 lines."""
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


if __name__ == "__main__":
    if "--imports" in sys.argv:
        print_imports()
    else:
        print_pages(pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else "."))
