"""The house's rules (docs of the layout: README), each with a violation planted to prove that it is held."""

import ast
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ENVIRONMENT, ROOT

PACKAGES = {"meanet": "platform/meanet", "jobs": "jobs", "serve_apps": "serve_apps", "tune_spaces": "tune_spaces"}
ALLOWED = {
    "meanet": {"meanet"},
    "tune_spaces": {"tune_spaces", "meanet"},
    "jobs": {"jobs", "meanet", "tune_spaces"},
    "serve_apps": {"serve_apps", "meanet"},
}
HOMES = {
    "ray": {
        "meanet.cluster",
        "meanet.nodes",
        "meanet.proposals",
        "meanet.streaming",
        "meanet.tuning",
        "meanet.workers",
    },
    "optuna": {"meanet.proposals"},
    "mlflow": {"meanet.tracking"},
    "boto3": {"meanet.s3"},
    "pyarrow.fs": {"meanet.storage", "meanet.s3"},
    "pynvml": {"meanet.meters"},
    "simpy": {"meanet.fleet.exact"},
    "yaml": {"meanet.profile_files"},
}
"""Inside meanet, who may import what."""
HEAVY = {"torch", "torchvision", "ray", "mlflow", "boto3"}
BOTTOM = (
    "errors",
    "config",
    "routing",
    "profiles",
    "profile_files",
    "energy",
    "meters",
    "replay",
    "edges",
    "thresholds",
    "two_gate",
)
BOTTOM += ("fronts", "bootstrap", "calibration", "policies", "class_split", "exits_columns", "breaker", "fleet.run")
BOTTOM += ("images", "preprocessing", "model_spec", "engines", "onnx_engine", "runtime", "edge_device")
WITHOUT_RAY = ("meanet.training", "meanet.evaluation", "meanet.runtime", "meanet.artifact", "meanet.trial")
WITHOUT_RAY += ("meanet.study", "meanet.study_report", "meanet.fleet.advice", "tune_spaces.joint")


def modules(root: Path) -> dict[str, ast.Module]:
    """Every module of ours by its dotted name."""
    found = {}
    for package, folder in PACKAGES.items():
        for path in sorted((root / folder).rglob("*.py")):
            parts = [package, *path.relative_to(root / folder).with_suffix("").parts]
            found[".".join(part for part in parts if part != "__init__")] = ast.parse(path.read_text())
    return found


def imports(tree: ast.AST) -> set[str]:
    """Dotted names that are imported anywhere below a node; `from a import b` gives a and a.b."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def at_import(tree: ast.Module) -> list[ast.stmt]:
    """The statements that run when a module is imported: not those of functions, nor of a main block."""
    return [node for node in tree.body if not (isinstance(node, ast.If) and "__main__" in ast.unparse(node.test))]


def imported_first(tree: ast.Module) -> set[str]:
    """What importing a module imports at once."""
    statements = [node for node in at_import(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    return imports(ast.Module(statements, []))


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def reached(name: str, trees: dict[str, ast.Module]) -> set[str]:
    """Everything that importing a module of ours leads to, through modules of ours."""
    seen: set[str] = set()
    waiting = [name]
    while waiting:
        module = waiting.pop()
        packages = {module.rpartition(".")[0]} & set(trees)
        for found in (imported_first(trees[module]) | packages) - seen:
            seen.add(found)
            if found in trees:
                waiting.append(found)
    return seen


def arrows(root: Path) -> Iterator[str]:
    """Imports that point up."""
    for name, tree in modules(root).items():
        package = name.split(".")[0]
        for found in sorted(imports(tree)):
            if found.split(".")[0] in set(PACKAGES) - ALLOWED[package]:
                yield f"{name} imports {found}"


def misplaced(name: str, found: set[str]) -> Iterator[str]:
    """Imports of one module of meanet that belong to another."""
    for library, allowed in HOMES.items():
        if name not in allowed and any(within(imported, library) for imported in found):
            yield f"{name} imports {library}, whose home is {', '.join(allowed)}"
    if any(within(imported, "meanet.cluster") for imported in found):
        yield f"{name} imports meanet.cluster, which stands on top"


def homes(root: Path) -> Iterator[str]:
    """Libraries outside their one home, and the bottom and the top of meanet."""
    trees = modules(root)
    for name in (name for name in trees if within(name, "meanet")):
        yield from misplaced(name, imports(trees[name]))
    for name in BOTTOM:
        for found in sorted(reached(f"meanet.{name}", trees)):
            if found.split(".")[0] in HEAVY:
                yield f"meanet.{name} leads to {found}, and stands at the bottom"
    for name in WITHOUT_RAY:
        for found in sorted(reached(name, trees)):
            if within(found, "ray"):
                yield f"{name} leads to {found}"


def layout(root: Path) -> Iterator[str]:
    """Files that would shadow the standard library's platform, or make tests a package."""
    for path in sorted((root / "platform").iterdir()):
        if path.is_file():
            yield f"platform/{path.name} lies directly in platform/"
    if (root / "tests" / "__init__.py").exists():
        yield "tests/__init__.py makes the tests a package"
    if (root / "tests" / "platform").exists():
        yield "tests/platform shadows the standard library"


def written_effects(root: Path) -> Iterator[str]:
    """Statements that act when a module is imported, by reading them."""
    for name, tree in modules(root).items():
        if name.endswith("__main__"):
            continue
        for node in at_import(tree):
            text = ast.unparse(node)
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                continue
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
                yield f"{name}:{node.lineno} calls {text}"
            if any(word in text for word in ("os.environ", "os.getenv", "environ[", "parse_args(", "tyro.cli(")):
                yield f"{name}:{node.lineno} reads its surroundings: {text}"


IMPORT_ALL = """
import importlib, json, os, sys
for name in (
    "torch", "torch.utils.flop_counter", "ray", "ray.train", "ray.train.torch", "ray.serve", "ray.serve.config",
    "ray.tune", "ray.tune.integration.ray_train", "ray.tune.schedulers", "ray.tune.search.optuna", "optuna",
    "ray.serve.schema", "mlflow", "mlflow.pyfunc", "mlflow.models", "mlflow.types", "sqlalchemy.exc", "fastapi",
    "starlette.formparsers", "multipart", "pyarrow.parquet", "pyarrow.fs", "pyarrow.compute", "matplotlib.figure",
    "PIL.Image", "safetensors.torch", "tyro", "httpx", "pandas", "pydantic", "onnxruntime.quantization",
    "onnxruntime.quantization.shape_inference", "torch.onnx", "simpy",
):
    importlib.import_module(name)
seen, environment = [], dict(os.environ)
WATCHED = ("os.mkdir", "os.remove", "os.rename", "socket.connect", "socket.bind", "subprocess.Popen", "os.putenv")
def hook(event, arguments):
    if event in WATCHED or (event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")):
        seen.append(f"{event} {arguments[0]!r}")
sys.addaudithook(hook)
found = {}
for name in json.loads(sys.argv[1]):
    seen.clear()
    importlib.import_module(name)
    if seen or dict(os.environ) != environment:
        found[name] = list(seen) or ["environment changed"]
print(json.dumps(found))
"""


def observed_effects(root: Path, only: list[str] | None = None) -> Iterator[str]:
    """What importing our modules does, watched by Python's own audit events."""
    names = only or [name for name in modules(root) if not name.endswith("__main__")]
    environment = ENVIRONMENT | {
        "PYTHONPATH": f"{root / 'platform'}{os.pathsep}{root}",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL, json.dumps(names)],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for name, events in json.loads(done.stdout.splitlines()[-1]).items():
        yield f"importing {name}: {events}"


CHECKS = {"arrows": arrows, "homes": homes, "layout": layout, "written": written_effects, "observed": observed_effects}


@pytest.mark.parametrize("check", CHECKS)
def test_the_house_stands(check: str) -> None:
    assert list(CHECKS[check](ROOT)) == []


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    for folder in PACKAGES.values():
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "tests").mkdir()
    return tmp_path


PLANTED = [
    ("arrows", "platform/meanet/routing.py", "from jobs import _cli\n", "meanet.routing imports jobs"),
    (
        "arrows",
        "platform/meanet/energy.py",
        "def f():\n    import tune_spaces.policies\n",
        "meanet.energy imports tune",
    ),
    ("arrows", "serve_apps/edge.py", "from jobs._run import RunFolder\n", "serve_apps.edge imports jobs._run"),
    ("arrows", "jobs/demo.py", "import serve_apps.graph\n", "jobs.demo imports serve_apps"),
    ("arrows", "tune_spaces/policies.py", "from jobs import sweep\n", "tune_spaces.policies imports jobs"),
    ("homes", "platform/meanet/artifact.py", "import ray.train\n", "meanet.artifact imports ray"),
    ("homes", "platform/meanet/report.py", "import mlflow\n", "meanet.report imports mlflow"),
    ("homes", "platform/meanet/evaluation.py", "from pyarrow import fs\n", "meanet.evaluation imports pyarrow.fs"),
    ("homes", "platform/meanet/energy.py", "import torch\n", "meanet.energy leads to torch"),
    (
        "homes",
        "platform/meanet/energy.py",
        "import yaml\n",
        "meanet.energy imports yaml, whose home",
    ),
    ("homes", "platform/meanet/meters.py", "import torch\n", "meanet.meters leads to torch"),
    ("homes", "platform/meanet/config.py", "from meanet import models\n", "meanet.config leads to torch"),
    ("homes", "platform/meanet/loop.py", "from meanet import cluster\n", "meanet.loop imports meanet.cluster"),
    ("layout", "platform/__init__.py", "", "platform/__init__.py lies directly"),
    ("layout", "platform/tool.py", "", "platform/tool.py lies directly"),
    ("layout", "tests/__init__.py", "", "tests/__init__.py"),
    ("written", "jobs/_run.py", "print('hello')\n", "jobs._run"),
    ("written", "platform/meanet/storage.py", "URL = os.environ.get('URL')\n", "meanet.storage"),
]


@pytest.mark.parametrize(("check", "path", "text", "says"), PLANTED)
def test_planted_violations_are_found(copy: Path, check: str, path: str, text: str, says: str) -> None:
    with (copy / path).open("a") as file:
        file.write(f"\n{text}")
    assert any(says in message for message in CHECKS[check](copy)), list(CHECKS[check](copy))


def test_planted_effects_are_observed(copy: Path) -> None:
    with (copy / "platform/meanet/energy.py").open("a") as file:
        file.write("\nLOG = open('left-behind.txt', 'w')\n")
    with (copy / "jobs/_run.py").open("a") as file:
        file.write("\nimport os as _os\n_os.environ['X'] = '1'\n")
    found = list(observed_effects(copy, ["meanet.energy", "jobs._run"]))
    assert any("meanet.energy" in message and "left-behind.txt" in message for message in found)
    assert any("jobs._run" in message for message in found)


def test_the_standard_librarys_platform_survives() -> None:
    code = "import platform; print(platform.system(), platform.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=True
    )
    system, path = done.stdout.split()
    assert system == os.uname().sysname
    assert not path.startswith(str(ROOT / "platform"))
