"""What a checkpoint's config.json says of its modules."""

from __future__ import annotations

from . import checks


def mlx_quantization(config: dict, module: str) -> dict:
    """Group size, bits and mode of a module: its own entry in config.json, or the model's."""
    whole = config.get("quantization") or config.get("quantization_config")
    if not isinstance(whole, dict):
        raise ValueError("config.json has no quantization: group_size and bits of MLX's tensors are not known")
    own = whole.get(module)
    chosen = {**whole, **own} if isinstance(own, dict) else whole
    mode = chosen.get("mode", "affine")
    result = {"group_size": chosen.get("group_size"), "bits": chosen.get("bits"), "mode": mode}
    for key in ("group_size", "bits"):
        checks.integer(f"config.json: quantization of {module}", key, result[key])
    if not isinstance(mode, str):
        raise ValueError(f"config.json: quantization of {module}: mode is {mode!r}; it must be a string")
    return result
