"""A folder that a long command fills, and that appears under its name when it is complete."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from ..formats.checkpoint import MAX_INDEX_BYTES, read_json
from ..formats.whole_file import write_json

STATE = "unfinished.json"


class OutputFolder:
    """Until then its files stand in a folder of that name and ".unfinished", from which the same command goes on.

    Args:
        path: a new folder, or an empty one: nothing is ever overwritten.
        options: what the files depend on: those of other options are not gone on from.
    """

    def __init__(self, path: Path, options: Mapping[str, object]) -> None:
        self.path = path.resolve()
        self.unfinished = self.path.with_name(self.path.name + ".unfinished")
        self.steps: list[dict] = []
        """What `add` was given, by earlier runs too."""
        self._options = json.loads(json.dumps(options, default=str))
        if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise ValueError(f"--output: {self.path} is there already; name a new folder")
        if self.unfinished.exists():
            self._go_on()

    def _go_on(self) -> None:
        state = read_json(self.unfinished / STATE, MAX_INDEX_BYTES)
        if not isinstance(state.get("options"), dict) or not isinstance(state.get("steps"), list):
            raise ValueError(f"--output: {self.unfinished / STATE} is not what an unfinished run leaves")
        for name in sorted({*self._options, *state["options"]}):
            was, given = state["options"].get(name), self._options.get(name)
            if was != given:
                raise ValueError(
                    f"--output: {self.unfinished} is of a run whose {name} was {json.dumps(was)}, not "
                    f"{json.dumps(given)}; delete it, or name another folder"
                )
        self.steps = state["steps"]

    def file(self, name: str) -> Path:
        """Where a file of the folder is to be written."""
        self.unfinished.mkdir(parents=True, exist_ok=True)
        return self.unfinished / name

    def add(self, step: dict) -> None:
        """What stands on the disk now is not done again."""
        self.steps.append(step)
        write_json(self.file(STATE), {"options": self._options, "steps": self.steps})

    def finish(self) -> None:
        """Gives the folder its name."""
        if self.path.exists():
            self.path.rmdir()
        os.replace(self.unfinished, self.path)
        (self.path / STATE).unlink()

    def discard_if_empty(self) -> None:
        """Removes the folder of a run that failed before its first step was done."""
        if not self.steps:
            shutil.rmtree(self.unfinished, ignore_errors=True)
