"""The commands that README and docs show."""

import re
import shlex
from typing import NamedTuple

from tests.conftest import REPO

ENTRIES = {
    "cache": "pipeline",
    "store_cli": "pipeline",
    "train": "trainer",
    "evaluate": "evals",
    "scaling": "evals",
    "circuit": "evals",
    "interpret": "evals",
    "explore": "evals",
    "export": "trainer",
    "import_coder": "trainer",
}
"""Entry point -> folder, in the order in which one follows from another."""
INSTALLED = {"store": "store_cli", "import": "import_coder"}
PAGES = {path.name: path.read_text() for path in (REPO / "README.md", *sorted((REPO / "docs").rglob("*.md")))}
_PROGRAM = r"(?:python|torchrun [^`\n]*?) (?:pipeline|trainer|evals)/(\w+)\.py|skipcoder-(\w+)"
_COMMAND = rf"({_PROGRAM}) ([^`\n]+?)\s*(?:#.*)?(?=[`\n])"


class Command(NamedTuple):
    """One line of a page."""

    page: str
    program: str
    entry: str
    arguments: str

    @property
    def words(self) -> list[str]:
        """The arguments, as the shell splits them."""
        return shlex.split(self.arguments)

    def __str__(self) -> str:
        return f"{self.program} {self.arguments}"


def commands() -> list[Command]:
    """The commands of all pages, each once."""
    found: dict[str, Command] = {}
    for page, text in PAGES.items():
        joined = re.sub(r"\s*\\\n\s*", " ", text)
        for program, script, installed, arguments in re.findall(_COMMAND, joined):
            command = Command(page, program, script or INSTALLED.get(installed, installed), arguments)
            found.setdefault(str(command), command)
    return list(found.values())
