"""A device's memory between measurements."""

import torch


def free_memory(device: torch.device) -> None:
    """Gives what freed tensors have left behind back to the device."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()
