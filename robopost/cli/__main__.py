# SPDX-License-Identifier: Apache-2.0
"""`python -m robopost.cli`: the command line, also as torchrun starts it (`torchrun ... -m robopost.cli train ...`)."""

import sys

from robopost.cli import main

if __name__ == "__main__":
    sys.exit(main())
