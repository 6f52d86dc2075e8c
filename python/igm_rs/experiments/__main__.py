"""The command ``python -m igm_rs.experiments``, which is ``igm-rs``."""

from __future__ import annotations

import sys

from .command import main

if __name__ == "__main__":
    sys.exit(main())
