"""The rules of docs/architecture.md that a reader would otherwise have to trust."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "casp_pl"

# Each floor imports only itself and the floors before it.
FLOORS = (
    "errors",
    "processes",
    "memory",
    "stopping",
    "kernels",
    "linalg",
    "layers",
    "quantizers",
    "allocation",
    "console",
    "models",
    "checkpoint",
    "export",
    "data",
    "evaluation",
    "modules",
    "callbacks",
    "harness",
    "pipeline",
    "cli",
    "__main__",
)
LIGHT = ("errors", "processes", "memory", "stopping", "kernels", "linalg", "layers", "quantizers", "allocation")
HEAVY = {"lightning", "lightning_utilities", "transformers", "datasets", "torchmetrics", "tensorboard", "matplotlib"}
LAZY = {"casp_pl/models/processors.py"}  # derives a class from one of transformers; imported where it is needed
MOST_LINES, MOST_FUNCTION_LINES = 400, 60
SOURCES = sorted(path for top in ("casp_pl", "scripts", "tests", "benchmarks") for path in (ROOT / top).rglob("*.py"))
MODULES = sorted(PACKAGE.rglob("*.py"))


def name(path):
    return path.relative_to(ROOT).as_posix()


def floor_of(dotted):
    """`casp_pl.layers.base` -> `layers`; the package itself -> None."""
    parts = dotted.split(".")
    return parts[1] if len(parts) > 1 else None


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(node, path):
    """Absolute dotted names that an import statement reaches for."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    base = node.module or ""
    if node.level:
        package = module_name(path).split(".") if path.name == "__init__.py" else module_name(path).split(".")[:-1]
        base = ".".join([*package[: len(package) - node.level + 1], *([base] if base else [])])
    return [f"{base}.{alias.name}" for alias in node.names] if base == "casp_pl" else [base]


def imports(path):
    return [
        (target, node.lineno)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for target in imported(node, path)
    ]


def runs_at_import(nodes):
    """The statements that run when the module is imported: no function bodies, nothing only for type checkers."""
    for node in nodes:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            yield from runs_at_import(node.orelse)
            continue
        yield node
        for part in ("body", "orelse", "finalbody", "handlers"):
            yield from runs_at_import(getattr(node, part, []))


def test_every_file_has_a_floor():
    known = {*FLOORS, "__init__"}
    assert [name(path) for path in MODULES if path.relative_to(PACKAGE).parts[0].removesuffix(".py") not in known] == []


def test_imports_look_down():
    up = []
    for path in MODULES:
        if path == PACKAGE / "__init__.py":
            continue
        own = FLOORS.index(path.relative_to(PACKAGE).parts[0].removesuffix(".py"))
        for target, line in imports(path):
            if target.startswith("casp_pl.") and floor_of(target) in FLOORS[own + 1 :]:
                up.append(f"{name(path)}:{line}: {target}")
    assert up == []


@pytest.mark.parametrize("floor", [*LIGHT, "models"])
def test_lower_floors_stay_light(floor):
    files = [PACKAGE / f"{floor}.py"] if (PACKAGE / f"{floor}.py").exists() else sorted((PACKAGE / floor).rglob("*.py"))
    assert files
    heavy = [
        f"{name(path)}:{node.lineno}: {target}"
        for path in files
        if name(path) not in LAZY
        for node in runs_at_import(ast.parse(path.read_text(encoding="utf-8")).body)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for target in imported(node, path)
        if target.split(".")[0] in HEAVY
    ]
    assert heavy == []


def test_lower_floors_load_torch_only():
    """Beyond transformers, which the package itself has to import (checkpoint/registration.py)."""
    modules = [floor for floor in LIGHT if (PACKAGE / floor).exists() or (PACKAGE / f"{floor}.py").exists()]
    code = "import sys\n" + "".join(f"import casp_pl.{floor}\n" for floor in modules) + "print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert set(done.stdout.split()) & (HEAVY - {"transformers"}) == set()


def test_files_and_functions_are_short():
    long = []
    for path in SOURCES:
        text = path.read_text(encoding="utf-8")
        if len(text.splitlines()) > MOST_LINES:
            long.append(f"{name(path)}: {len(text.splitlines())} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = node.end_lineno - node.lineno + 1
                if lines > MOST_FUNCTION_LINES:
                    long.append(f"{name(path)}:{node.lineno}: {node.name} has {lines} lines")
    assert long == []


def test_no_drawers_for_odds_and_ends():
    assert [name(path) for path in MODULES if path.stem in {"utils", "helpers", "misc", "common"}] == []


def test_public_names_are_listed():
    wrong = []
    for path in MODULES:
        if path.name == "__main__.py":
            continue
        body = ast.parse(path.read_text(encoding="utf-8")).body
        listed = [ast.literal_eval(node.value) for node in body if isinstance(node, ast.Assign) and targets_all(node)]
        defined = {node.name for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        unlisted = {item for item in defined if not item.startswith("_")} - {item for names in listed for item in names}
        wrong += [f"{name(path)}: {item}" for item in sorted(unlisted)]
    assert wrong == [], "public, but not in __all__"


def targets_all(node):
    return any(isinstance(target, ast.Name) and target.id == "__all__" for target in node.targets)


def test_committed_text_is_ascii_and_names_no_machine():
    """Files of the repository hold no absolute paths of the machine they were written on."""
    folders = "|".join(("work", "root", "home", "tmp", "opt"))
    machine = re.compile(rf"(?<![\w.~/<])/({folders})/\w")
    kinds = {".py", ".md", ".yaml", ".yml", ".toml", ".txt", ".json", ".cpp", ".cfg"}
    tops = [
        path for path in ROOT.iterdir() if path.name in {"casp_pl", "configs", "docs", "scripts", "tests", "benchmarks"}
    ]
    files = [path for top in tops for path in top.rglob("*") if path.suffix in kinds and path.is_file()]
    files += [path for path in ROOT.iterdir() if path.is_file() and (path.suffix in kinds or path.name == "Makefile")]
    wrong = []
    for path in files:
        text = path.read_text(encoding="utf-8")
        if not text.isascii():
            wrong.append(f"{name(path)}: not ASCII")
        wrong += [f"{name(path)}: {match.group()}" for match in machine.finditer(text)]
    assert wrong == []
