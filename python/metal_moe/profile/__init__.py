"""Where the time of a block of code goes: by kernel, with the bytes it moves and the fraction of the memory's speed.

The function `profile` is what `metal_moe.profile` is; the package itself runs as `python -m metal_moe.profile`.
"""

from ._profile import KernelProfile, Profile, profile

__all__ = ["KernelProfile", "Profile", "profile"]
