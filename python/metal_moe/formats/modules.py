"""What a checkpoint's config.json says of its modules."""

from __future__ import annotations

from . import checks

# What `mx.quantize` takes where nothing else is said: group size and bits by mode.
DEFAULTS = {"affine": (64, 4), "mxfp4": (32, 4), "mxfp8": (32, 8), "nvfp4": (16, 4)}


def mlx_quantization(config: dict, module: str) -> dict:
    """Group size, bits and mode of a module: its own entry in config.json, or the model's.

    What an entry does not say is what MLX takes by default for the mode; an own one inherits nothing.
    """
    whole = config.get("quantization") or config.get("quantization_config")
    if not isinstance(whole, dict):
        raise ValueError("config.json has no quantization: group_size and bits of MLX's tensors are not known")
    own = whole.get(module)
    chosen = own if isinstance(own, dict) else whole
    mode = chosen.get("mode") or "affine"
    if not isinstance(mode, str) or mode not in DEFAULTS:
        raise ValueError(
            f"config.json: quantization of {module}: mode is {mode!r}; it must be one of {', '.join(DEFAULTS)}"
        )
    result = {"mode": mode}
    for key, default in zip(("group_size", "bits"), DEFAULTS[mode], strict=True):
        result[key] = default if chosen.get(key) is None else chosen[key]
        checks.integer(f"config.json: quantization of {module}", key, result[key])
    return result
