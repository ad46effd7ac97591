"""The layers of the code: imports go one way, and `import golf_ray` is light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OWN = {"golf_ray", "trainers", "evaluators", "search_spaces"}
CONTRACTS = {
    f"golf_ray.{name}"
    for name in (
        "config", "errors", "fields", "fingerprint", "metric", "presets", "provenance", "records",
        "sections", "stats", "upstream",
    )
}  # fmt: skip
MATHEMATICS = {
    f"golf_ray.{name}"
    for name in ("model", "kernels", "optim", "data", "quantization", "adaptation")
}
STAGES = {"trainers", "evaluators"}
MATH_LIBRARIES = {
    "torch", "triton", "numpy", "sentencepiece", "brotli", "pyarrow", "huggingface_hub", "fsspec"
}  # fmt: skip
WRAPS_RAY = {
    "trainers.ray_channel", "trainers.ray_train", "trainers.ray_watch", "trainers.ray_worker",
    "evaluators.pool",
}  # fmt: skip


def modules() -> dict[str, Path]:
    """All modules of the packages by dotted name."""
    found = {}
    for package in sorted(OWN):
        for path in sorted((ROOT / package).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = path
    return found


def imports(path: Path) -> set[str]:
    """Dotted names of what a module imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            names.add(node.module)
            if node.module in ("golf_ray", *OWN):
                names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def within(name: str, layers: set[str]) -> bool:
    return any(name == layer or name.startswith(f"{layer}.") for layer in layers)


def allowed(module: str) -> set[str] | None:
    """What a module may import beside the standard library; None for everything."""
    if within(module, CONTRACTS):
        return CONTRACTS
    if within(module, MATHEMATICS):
        return CONTRACTS | MATHEMATICS | MATH_LIBRARIES
    if within(module, {"search_spaces"}):
        return CONTRACTS | {"search_spaces", "optuna"}
    if within(module, STAGES):
        more = {"ray", "golf_ray.cluster", "psutil"} if within(module, WRAPS_RAY) else set()
        if module == "trainers.claims":
            # A claim is a process's.
            more = {"psutil"}
        return CONTRACTS | MATHEMATICS | STAGES | MATH_LIBRARIES | more
    return None


@pytest.mark.parametrize("module", sorted(modules()))
def test_imports_go_one_way(module: str) -> None:
    may = allowed(module)
    if may is None:
        return
    for name in imports(modules()[module]):
        if name == "golf_ray" or name.split(".")[0] in sys.stdlib_module_names:
            continue
        assert within(name, may), f"{module} imports {name}"


def test_import_golf_ray_is_light() -> None:
    program = (
        "import sys, golf_ray, golf_ray.cli\n"
        "heavy = {'torch', 'ray', 'numpy', 'pandas', 'optuna', 'pyarrow'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_no_module_reads_the_environment_as_configuration() -> None:
    for module, path in modules().items():
        if within(module, CONTRACTS | MATHEMATICS):
            assert "os.environ" not in path.read_text(), module


def test_files_stay_readable() -> None:
    lengths = {name: len(path.read_text().splitlines()) for name, path in modules().items()}
    assert not {name: n for name, n in lengths.items() if n > 600}
