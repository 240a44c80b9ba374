"""A checkpoint's tensors by name: one safetensors file, or a folder of them with or without an index."""

from __future__ import annotations

import json
import os
import re
from contextlib import ExitStack
from pathlib import Path

from torch import Tensor

from .safetensors_file import SafetensorsFile, open_safetensors

INDEX = "model.safetensors.index.json"

# An index names every tensor: 10 MB for the largest models. Above these a file is something else.
MAX_INDEX_BYTES = 1 << 27
MAX_CONFIG_BYTES = 1 << 24
_SHARD = re.compile(r"(?P<name>.*)-(?P<number>[0-9]{5})-of-(?P<count>[0-9]{5})\.safetensors")


class Checkpoint:
    """Tensors of a checkpoint. Files are opened when one of their tensors is asked for, and stay mapped.

    Example:
        with Checkpoint("Qwen3-30B-A3B-4bit") as checkpoint:
            checkpoint.get("model.layers.0.mlp.gate.weight")
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)
        self._stack = ExitStack()
        self._files: dict[str, SafetensorsFile] = {}
        self._where: dict[str, str] = {}
        self.folder = self.path if self.path.is_dir() else self.path.parent
        if not self.path.exists():
            raise ValueError(f"{self.path}: there is no such file or folder")
        if self.path.is_dir() and (self.folder / INDEX).exists():
            self._where = _weight_map(self.folder / INDEX)
        else:
            names = (
                sorted(p.name for p in self.folder.glob("*.safetensors")) if self.path.is_dir() else [self.path.name]
            )
            if not names:
                raise ValueError(f"{self.path}: the folder has neither {INDEX} nor a safetensors file")
            if self.path.is_dir():
                _check_shards(self.folder, names)
            for file in names:
                for name in self._open(file).names():
                    if name in self._where:
                        raise ValueError(f"{self.path}: {name} stands in {self._where[name]} and in {file}")
                    self._where[name] = file
        config = self.folder / "config.json"
        self.config: dict = read_json(config, MAX_CONFIG_BYTES) if self.path.is_dir() and config.exists() else {}

    def names(self) -> list[str]:
        return list(self._where)

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def get(self, name: str) -> Tensor:
        """A tensor; on the CPU it maps the file."""
        return self._file_of(name).get(name)

    def where(self, name: str) -> str:
        """The file that holds a tensor, for messages."""
        if name not in self._where:
            raise ValueError(f"{self.path}: there is no tensor {name}")
        return str(self.folder / self._where[name])

    def _file_of(self, name: str) -> SafetensorsFile:
        self.where(name)
        file = self._open(self._where[name])
        if name not in file.tensors:
            raise ValueError(
                f"{self.path}: {INDEX} says that {name} stands in {self._where[name]}, which has no such tensor"
            )
        return file

    def _open(self, name: str) -> SafetensorsFile:
        if name not in self._files:
            self._files[name] = self._stack.enter_context(open_safetensors(self.folder / name))
        return self._files[name]

    def close(self) -> None:
        self._stack.close()
        self._files.clear()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_json(path: Path, limit: int) -> dict:
    """A file that holds one JSON object, of at most `limit` bytes."""
    try:
        if not path.is_file():
            raise ValueError("not a regular file")
        if path.stat().st_size > limit:
            raise ValueError(f"larger than {limit} bytes")
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"{path}: not a valid JSON file: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: holds a {type(value).__name__}; it must be an object")
    return value


def _check_shards(folder: Path, names: list[str]) -> None:
    """Where no index tells, names do: a checkpoint without one of its files must not pass for a smaller model."""
    for shard in filter(None, map(_SHARD.fullmatch, names)):
        for number in range(1, min(int(shard["count"]), len(names) + 1) + 1):
            other = f"{shard['name']}-{number:05}-of-{shard['count']}.safetensors"
            if other not in names:
                raise ValueError(f"{folder}: {other} is missing; {shard[0]} is there")


def _weight_map(path: Path) -> dict[str, str]:
    """Tensor name -> file, each a plain name of a file beside the index: an index cannot name a file elsewhere."""
    weight_map = read_json(path, MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ValueError(f"{path}: weight_map is a {type(weight_map).__name__}; it must be an object of file names")
    for name, file in weight_map.items():
        if not isinstance(file, str):
            raise ValueError(f"{path}: the file of {name} is a {type(file).__name__}; it must be a string")
        plain = file.isprintable() and file not in ("", ".", "..") and not set(file) & set("/\\:")
        if not plain or not file.endswith(".safetensors"):
            raise ValueError(
                f"{path}: the file of {name} is {file!r}; it must be the name of a .safetensors file beside it"
            )
    return weight_map
