"""`python -m metal_moe`: the `metal-moe` command."""

import sys

from .cli import main

sys.exit(main())
