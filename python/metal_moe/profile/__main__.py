"""`python -m metal_moe.profile`: the same as `metal-moe profile`."""

import sys

from ..cli import main

sys.exit(main(["profile", *sys.argv[1:]]))
