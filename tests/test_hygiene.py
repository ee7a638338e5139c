"""What keeps the repository small and honest: budgets, flags that do something, commands that
exist, copies that stay equal."""

import ast
import functools
import glob
import os
import re
import shlex
import subprocess

import pytest

from tests.harness import ROOT

FOLDERS = ("", "files", "evaluation", "prepare", "bench", "kernels", "examples")
SOURCES = sorted(
    os.path.relpath(p, ROOT) for d in FOLDERS for p in glob.glob(os.path.join(ROOT, d, "*.py"))
)

TESTS = sorted(os.path.relpath(p, ROOT) for p in glob.glob(os.path.join(ROOT, "tests", "*.py")))
DOCS = sorted(os.path.relpath(p, ROOT) for p in glob.glob(os.path.join(ROOT, "docs", "*.md")))


def read(path):
    with open(os.path.join(ROOT, path), encoding="utf-8") as f:
        return f.read()


def tracked():
    """Files that git would commit; all of them where there is no git."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if found.returncode == 0:
        return [p for p in found.stdout.splitlines() if os.path.exists(os.path.join(ROOT, p))]
    return [
        *SOURCES,
        "README.md",
        "Makefile",
        *(os.path.relpath(p, ROOT) for p in glob.glob(os.path.join(ROOT, "tests", "*.py"))),
    ]


def text_files():
    for path in tracked():
        try:
            yield path, read(path)
        except UnicodeDecodeError:
            # a fixture
            pass


# flags that several programs share, by the function that declares them
SHARED_FLAGS = "evaluation/flags.py"


def all_flags_of(path):
    """`flags_of` a script, with the shared flags that it adds."""
    adds = re.search(r"\bplanner_flags\(", read(path))
    return flags_of(path) | (flags_of(SHARED_FLAGS) if adds else {})


def flags_of(path):
    """Flags declared in a file: {dest: (all spellings, call node)}."""
    out = {}
    for node in ast.walk(ast.parse(read(path))):
        name = getattr(
            getattr(node, "func", None), "attr", getattr(getattr(node, "func", None), "id", None)
        )
        if isinstance(node, ast.Call) and name in ("add_argument", "flag") and node.args:
            spellings = [a.value for a in node.args if isinstance(a, ast.Constant)]
            given = [k.value.value for k in node.keywords if k.arg == "dest"]
            first = next((s for s in spellings if s.startswith("--")), spellings[0])
            actions = [ast.unparse(k.value) for k in node.keywords if k.arg == "action"]
            if actions and actions[0] in ("switch", "argparse.BooleanOptionalAction"):
                spellings += ["--no-" + s[2:] for s in spellings]
            out[(given or [first.lstrip("-")])[0].replace("-", "_")] = (spellings, node)
    return out


SCRIPTS = [p for p in SOURCES if flags_of(p)]


@pytest.mark.parametrize("path", SCRIPTS)
def test_every_flag_is_read_and_explained(path):
    """Bug: a flag that nothing reads (upstream has YAML keys like that), or one that --help does
    not explain."""
    tree = ast.parse(read(path))
    declared = flags_of(path)
    inside = {id(n) for _, call in declared.values() for n in ast.walk(call)}
    read_here = {
        n.attr
        for n in ast.walk(tree)
        if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name) and n.value.id == "args"
    }

    # flags that programs share may be read by each of them
    if path == SHARED_FLAGS:
        programs = [p for p in SCRIPTS if "planner_flags(" in read(p)]
        read_here |= set(re.findall(r"\bargs\.(\w+)", "".join(map(read, programs))))

    # for k in ("encode", "fps", ...)
    if re.search(r"getattr\(args, \w+\)", read(path)):
        loops = [
            n
            for n in ast.walk(tree)
            if isinstance(n, ast.comprehension | ast.For) and isinstance(n.iter, ast.Tuple)
        ]
        read_here |= {
            c.value
            for n in loops
            for c in n.iter.elts
            if isinstance(c, ast.Constant) and id(c) not in inside
        }
    assert sorted(declared.keys() - read_here) == []

    helped = {
        k
        for k, (_, call) in declared.items()
        for w in call.keywords
        if w.arg == "help" and ast.unparse(w.value) != "''"
    }
    assert sorted(declared.keys() - helped) == []

    dashes = [
        s
        for spellings, _ in declared.values()
        for s in spellings
        if "-" in s.removeprefix("--no-").lstrip("-")
    ]

    # underscores
    assert dashes == []


@pytest.mark.parametrize("path", [p for p in SCRIPTS if p != SHARED_FLAGS])
def test_no_abbreviated_flags(path):
    """Bug: --val is taken for --val_data today and for something else when a flag is added."""
    parsers = [
        n
        for n in ast.walk(ast.parse(read(path)))
        if isinstance(n, ast.Call) and ast.unparse(n.func) == "argparse.ArgumentParser"
    ]
    assert parsers
    assert all(
        any(k.arg == "allow_abbrev" and k.value.value is False for k in n.keywords) for n in parsers
    )


# packages and modules with programs of their own: python -m bench.plan
RUN_WITH_M = ("prepare", "bench", "examples", "tests", "data", "droid", "evaluation")


def commands(text):
    """Shell commands that start one of our programs, in code blocks and inline code: (script, its
    arguments)."""
    text = text.replace("\\\\\n", " ").replace("\\\n", " ")
    for code in re.findall(r"```.*?```|`[^`]+`|^ {4}\S.*$", text, flags=re.S | re.M):
        for line in code.strip("`").splitlines():
            if not re.search(r"\b(python3?|torchrun|\$\(PY\))(\s|$)", line):
                continue
            line = re.sub(r"(^|\s)#.*", "", line)
            try:
                parts = shlex.split(line)
            except ValueError:  # prose with an apostrophe
                continue
            for i, word in enumerate(parts):
                if word == "-m" and i + 1 < len(parts) and parts[i + 1].split(".")[0] in RUN_WITH_M:
                    yield parts[i + 1].replace(".", "/") + ".py", parts[i + 2 :]
                elif re.fullmatch(r"[\w/]+\.py", word):
                    yield word, parts[i + 1 :]


@pytest.mark.parametrize("path", ["README.md", *DOCS, *SCRIPTS])
def test_commands_name_real_scripts_and_flags(path):
    """Bug: a command in the README or in a docstring that argparse refuses, or a script that was
    renamed."""
    if not os.path.exists(os.path.join(ROOT, path)):
        pytest.skip(f"no {path}")
    text = (
        read(path)
        if path.endswith(".md")
        else ast.get_docstring(ast.parse(read(path)), clean=False) or ""
    )
    found = list(commands(text))
    if path == "README.md":
        assert len(found) >= 5

    for script, words in found:
        assert os.path.exists(os.path.join(ROOT, script)), f"{path} runs {script}"
        # what follows -- is for another script
        if "--" in words:
            words = words[: words.index("--")]
        known = {s for spellings, _ in all_flags_of(script).values() for s in spellings} | {
            "--help"
        }
        unknown = [w for w in words if w.startswith("--") and w.split("=")[0] not in known]
        assert not unknown, f"{path} runs {script} with {unknown}"


def test_flags_named_in_prose_exist():
    """Bug: the README or an error message sends people to a flag that is called otherwise."""
    studies = [p for p in tracked() if re.fullmatch(r"tests/(?!test_)\w+\.py", p)]
    known = set()
    for path in [*SCRIPTS, *studies]:
        known |= {s for spellings, _ in flags_of(path).values() for s in spellings}
    known |= {
        "--help",
        "--nnodes",
        "--nproc_per_node",
        "--rdzv_backend",
        "--rdzv_endpoint",
        "--nodes",
        "--signal",
        "--ntasks-per-node",
    }
    known |= {"--max_restarts"}
    if os.path.exists(os.path.join(ROOT, "README.md")):
        inline = [
            w
            for code in re.findall(r"`(--[^`]+)`", read("README.md"))
            for w in re.findall(r"(?<![\w-])--[a-z][\w-]*", code)
        ]
        assert sorted(set(inline) - known) == []

    for path in SOURCES:
        messages = [n for n in ast.walk(ast.parse(read(path))) if isinstance(n, ast.Raise)]
        named = [w for n in messages for w in re.findall(r"(?<![\w{-])--[a-z]\w+", ast.unparse(n))]
        assert sorted(set(named) - known) == [], path
    if os.path.exists(os.path.join(ROOT, "Makefile")):
        recipe = "\n".join(
            line
            for line in read("Makefile").splitlines()
            if not re.search(r"-m (pip|ruff|venv|pytest)", line)
        )
        assert sorted(set(re.findall(r"(?<![\w-])--[a-z]\w+", recipe)) - known) == []


def test_locked_copies_are_equal():
    """Bug: blocks that are copied on purpose drift apart (in cleanrl a false help text lives in 37
    files)."""
    blocks = {}
    for path in (p for p in SOURCES if re.fullmatch(r"train_\w+\.py", p)):
        lines = read(path).splitlines()
        heads = [i for i, line in enumerate(lines) if "(same in every train_*.py)" in line]
        assert heads, f"{path} has no block that is the same in every train_*.py"
        for i in heads:
            rulers = [j for j in range(i + 1, len(lines)) if lines[j].lstrip().startswith("# --- ")]
            blocks.setdefault(lines[i].strip(), []).append(
                (path, "\n".join(lines[i : rulers[0] if rulers else None]).rstrip())
            )
    for head, copies in blocks.items():
        assert len({text for _, text in copies}) == 1, (
            f"{head} differs among {[path for path, _ in copies]}"
        )


def is_text(node):
    return isinstance(node, ast.JoinedStr) or (
        isinstance(node, ast.Constant) and isinstance(node.value, str)
    )


def has_star(node):
    return any(isinstance(part, ast.Starred) for part in getattr(node, "elts", []))


def folded(tree):
    """Folded passages of a file (STYLE, the page): [(line, what)]."""
    found = []
    for node in ast.walk(tree):
        inside = [n for n in ast.walk(node) if n is not node]
        note = functools.partial(
            lambda line, what: found.append((line, what)),
            node.lineno if hasattr(node, "lineno") else 0,
        )
        if isinstance(node, ast.Call):
            arguments = [*node.args, *(k.value for k in node.keywords)]
            if any(isinstance(n, ast.NamedExpr) for a in arguments for n in ast.walk(a)):
                note("a walrus in the arguments of a call")
        if isinstance(node, ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp):
            if any(isinstance(n, ast.NamedExpr) for n in inside):
                note("a walrus in a comprehension")
        if isinstance(node, ast.IfExp) and any(isinstance(n, ast.IfExp) for n in inside):
            note("a conditional expression in another")
        if isinstance(node, ast.If) and isinstance(node.test, ast.IfExp):
            note("a conditional expression as the test of an if")
        if isinstance(node, ast.Assign) and not isinstance(node.value, ast.Call):
            tuples = [t for t in node.targets if isinstance(t, ast.Tuple)]
            if any(len(t.elts) > 2 for t in tuples):
                note("an assignment of more than two values")
            if tuples and has_star(node.value):
                note("a starred list into several targets")
        if isinstance(node, ast.Subscript) and has_star(node.value):
            note("a starred list that is indexed")
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
            boolean = (ast.Compare, ast.BoolOp)
            sides = ((node.left, node.right), (node.right, node.left))
            if any(is_text(a) and isinstance(b, boolean) for a, b in sides):
                note("a string times a boolean")
        if isinstance(node, ast.Expr):
            if isinstance(node.value, ast.Lambda | ast.Tuple | ast.List | ast.IfExp):
                note("an expression as a statement")
    return sorted(set(found))


@pytest.mark.parametrize("path", [*SOURCES, *TESTS])
def test_no_folding(path):
    """Bug: statements folded together to save lines, until nobody reads them."""
    assert folded(ast.parse(read(path))) == []


def imported(path):
    """Names of the modules that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(read(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", TESTS)
def test_tests_import_no_tests(path):
    """Bug: a test that is moved or deleted takes others along; the fixtures of one file act in
    another. What several tests need is in tests/harness.py and tests/conftest.py."""
    for name in imported(path):
        last = name.rpartition(".")[2] if name.startswith("tests.") else name.partition(".")[0]
        assert not last.startswith("test_"), f"{path} imports the test {name}"
        assert last != "conftest", (
            f"{path} imports conftest; tests/harness.py has what is no fixture"
        )


# what a file may import, by its folder or name: imports point down
COMMANDS = {
    p[:-3]
    for p in SOURCES
    if os.sep not in p
    and p not in ("model.py", "data.py", "droid.py", "weights.py", "checkpoint.py")
}
LIBRARIES = {"model", "data", "droid", "weights", "checkpoint"}


def layer_of(path):
    """0 kernels and files, 1 libraries of the root, 2 evaluation, 3 commands, prepare, bench."""
    top = path.split("/")[0]
    if top in ("kernels", "files"):
        return 0
    if top.removesuffix(".py") in LIBRARIES:
        return 1
    return 2 if top == "evaluation" else 3


@pytest.mark.parametrize("path", SOURCES)
def test_imports_point_down(path):
    """Bug: a script cannot be copied without the script that it imports; a file format that needs
    the model."""
    for node in ast.walk(ast.parse(read(path))):
        names = []
        if isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        if isinstance(node, ast.ImportFrom):
            names = [node.module]
        for name in names:
            top = name.split(".")[0]
            if top not in COMMANDS | LIBRARIES | {
                "kernels",
                "files",
                "evaluation",
                "prepare",
                "bench",
            }:
                continue
            assert top not in COMMANDS, f"{path} imports the command {top}"
            assert top != "tests", f"{path} imports a test"
            assert layer_of(name.replace(".", "/")) <= layer_of(path), f"{path} imports {name}"
            if top in ("prepare", "bench"):
                assert path.startswith(("prepare/", "bench/")), f"{path} imports {name}"


@pytest.mark.parametrize("path", SOURCES)
def test_no_blind_excepts_and_no_kwargs(path):
    """Bug: an exception that hides what went wrong; a misspelt option that **kwargs swallow."""
    tree = ast.parse(read(path))
    lines = read(path).splitlines()
    handlers = [n for n in ast.walk(tree) if isinstance(n, ast.ExceptHandler)]
    blind = [
        n.lineno
        for n in handlers
        if n.type is None or re.search(r"\b(Base)?Exception\b", ast.unparse(n.type))
    ]

    # two readers raise half a dozen types, and it raises again; a fuzzer looks for all of them;
    # storage libraries raise what they like
    if path in ("weights.py", "tests/fuzz.py", "files/disk.py", "files/mirror.py"):
        assert len(blind) <= 1 and all("#" in lines[i - 1] for i in blind)
        blind = []
    assert blind == []
    assert [n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.args.kwarg] == []


def test_no_machine_paths_and_no_emoji():
    """Bug: a path that exists on one machine only; pictures that terminals and diffs garble."""
    folders = "|".join(("work", "home", "root", "Users", "scratch"))
    for path, text in text_files():
        found = re.findall(rf"(?<![\w.~/}}])/(?:{folders})/[\w.-]+", text)
        assert not found, f"{path}: {found}"
        emoji = [
            c for c in text if ord(c) >= 0x1F000 or 0x2600 <= ord(c) <= 0x27BF or ord(c) == 0xFE0F
        ]
        assert not emoji, f"{path}: {emoji}"


def test_the_row_without_avx512_runs_all_that_compare_bits():
    """Bug: a promise of bits that holds on one instruction set only, unseen because its file is not
    among those that make test-all runs as an AVX2 processor would."""
    makefile = read("Makefile").replace("\\\n", " ")
    rows = [line for line in makefile.splitlines() if "$(AVX2)" in line]
    assert [line.split()[-1] for line in rows] == ["$(BITS)", "$(KERNELS)"]
    listed = re.findall(
        r"tests/test_\w+\.py", "".join(re.findall(r"(?m)^(?:BITS|KERNELS) =.*", makefile))
    )
    missing = []
    for path in glob.glob(os.path.join(ROOT, "tests", "test_*.py")):
        name = os.path.relpath(path, ROOT)
        if name != "tests/test_hygiene.py" and "torch.equal(" in read(name) and name not in listed:
            missing.append(name)
    assert not missing, f"add to BITS in the Makefile: {', '.join(missing)}"
