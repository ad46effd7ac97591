"""Where results come from: the commit of a package's folder, and that nothing of it can fail."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

import golf_ray
from golf_ray.provenance import commit_of, processor_name, provenance


def git(folder: Path, *arguments: str) -> str:
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    done = subprocess.run(
        ["git", *who, "-C", str(folder), *arguments], check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A tracked package in a checkout."""
    folder = tmp_path / "checkout" / "package"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    git(folder.parent, "init", "-q")
    git(folder.parent, "add", ".")
    git(folder.parent, "commit", "-q", "-m", "x")
    return folder


def test_the_commit_and_whether_files_are_changed(package: Path) -> None:
    commit = git(package, "rev-parse", "HEAD")[:12]
    assert commit_of(package) == commit
    (package.parent / "untracked").write_text("x")
    assert commit_of(package) == commit
    (package / "__init__.py").write_text("x = 1\n")
    assert commit_of(package) == commit + "+"


def test_what_is_installed_below_a_checkout_is_not_of_it(package: Path) -> None:
    installed = package.parent / "venv" / "other"
    installed.mkdir(parents=True)
    (installed / "__init__.py").write_text("")
    assert commit_of(installed) is None


def test_no_checkout_no_git_no_commit(
    tmp_path: Path, package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "__init__.py").write_text("")
    assert commit_of(tmp_path) is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert commit_of(package) is None


def test_everything_is_said_in_one_line_each() -> None:
    found = provenance()
    assert found["golf_ray_version"] == golf_ray.__version__ and found is provenance()
    assert found["torch_version"] and found["ray_version"] and found["host"]
    assert processor_name() and "\n" not in processor_name()
