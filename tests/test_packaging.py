"""The wheel: what it holds, and that torch finds the backend in it without an import of ours."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
REAL_FOLDERS = {"qtts_compile": "qtts_compile", "patterns": "qtts_compile/patterns", "kernels": "qtts_compile/kernels"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    # setuptools writes beside its sources, so it works on a copy.
    source, dist = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in REAL_FOLDERS:
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(dist)]
    result = subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(source)], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    (path,) = dist.iterdir()
    return path


def test_the_wheel_holds_the_tree(wheel):
    expected = {"qtts_compile/py.typed"}
    for folder, package in REAL_FOLDERS.items():
        # A walk does not follow the links qtts_compile/patterns and qtts_compile/kernels.
        for path, _, names in os.walk(ROOT / folder):
            expected |= {str(package / Path(path, name).relative_to(ROOT / folder)) for name in names if name.endswith((".py", ".json"))}
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert names == expected


def test_the_links_lead_to_the_real_folders():
    for folder in ("patterns", "kernels"):
        link = ROOT / "qtts_compile" / folder
        assert link.is_symlink() and link.resolve() == ROOT / folder
        assert not (ROOT / folder / "__init__.py").exists()  # else `import kernels` would find ours instead of Hugging Face's


def test_the_installed_wheel_registers_the_backend_and_the_command(wheel, tmp_path):
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    code = """
import sys
import torch
assert "qtts" in torch._dynamo.list_backends()
assert "qtts_compile" not in sys.modules
torch.compile(torch.nn.Linear(2, 2), backend="qtts")
import qtts_compile
import qtts_compile.kernels.rms_norm, qtts_compile.patterns.lift.rms_norm
from importlib.metadata import entry_points, metadata
(script,) = entry_points(group="console_scripts", name="qtts")
assert script.load().__module__ == "qtts_compile.cli"
assert metadata("qtts-compile").get_all("Provides-Extra") == ["tts", "tts-hf", "bench", "test", "dev"]
assert metadata("qtts-compile")["Version"] == qtts_compile.__version__
print(qtts_compile.__file__)
"""
    environment = {**os.environ, "PYTHONPATH": str(site)}
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert Path(result.stdout.strip()).is_relative_to(site)
