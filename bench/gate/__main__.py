"""``python -m bench.gate``: the compile gate."""

import sys

from .compile import main

sys.exit(main())
