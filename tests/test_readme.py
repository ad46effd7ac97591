"""The README says what is there: every file in its tree, every command one that exists."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from golf_ray.cli.app import command

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PACKAGES = ("golf_ray", "trainers", "evaluators", "search_spaces")


def test_the_tree_names_every_file_with_a_phrase() -> None:
    tree = README.split("## The tree")[1].split("```")[1]
    path: list[str] = []
    named = set()
    for line in tree.strip().splitlines():
        match = re.match(r"( *)(\S+) +(\S.*)", line)
        assert match is not None, f"no phrase: {line}"
        depth, name = len(match[1]) // 2, match[2]
        path[depth:] = [name.rstrip("/")]
        if name.endswith(".py"):
            named.add("/".join(path))
    found = {
        str(file.relative_to(ROOT))
        for package in PACKAGES
        for file in (ROOT / package).rglob("*.py")
        if file.name != "__init__.py"
    }
    assert named == found


def test_every_example_is_a_verb_with_options_that_it_has() -> None:
    lines = [
        line for block in README.split("```bash")[1:] for line in block.split("```")[0].splitlines()
    ]
    examples = [line.split("#")[0] for line in lines if "golf-ray" in line]
    assert len(examples) > 12
    for example in examples:
        # What follows two dashes is a command of its own, to be run elsewhere.
        for part in example.split("golf-ray ", 1)[1].split(">")[0].split(" -- "):
            words = shlex.split(part)
            verb = command()
            while getattr(verb, "commands", None):
                verb = verb.commands[words.pop(0)]
            known = {name for parameter in verb.params for name in parameter.opts}
            assert {word for word in words if word.startswith("--")} <= known, example


def test_its_pictures_are_there() -> None:
    pictures = re.findall(r"!\[[^]]+\]\(([^)]+)\)", README)
    assert pictures
    for picture in pictures:
        assert (ROOT / picture).is_file(), picture
