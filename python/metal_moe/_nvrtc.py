"""Where the cuda engine finds NVRTC, NVIDIA's run-time compiler: in the packages that PyTorch for CUDA depends on."""

import importlib.util
import re
from pathlib import Path


def nvrtc_library() -> str | None:
    """The newest libnvrtc among installed NVIDIA packages (nvidia-cuda-nvrtc, nvidia-cuda-nvrtc-cu12); None: none."""
    spec = importlib.util.find_spec("nvidia")
    folders = spec.submodule_search_locations if spec is not None and spec.submodule_search_locations else []
    found = [path for folder in folders for path in Path(folder).glob("*/lib/libnvrtc.so.*")]
    versions = {path: re.fullmatch(r"libnvrtc\.so\.(\d+)", path.name) for path in found}
    newest = max((path for path in found if versions[path]), key=lambda path: int(versions[path][1]), default=None)
    return None if newest is None else str(newest)
