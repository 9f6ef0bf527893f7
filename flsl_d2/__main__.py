"""``python -m flsl_d2 COMMAND``: the command ``flsl-d2``."""

import sys

from flsl_d2_cli import main

if __name__ == "__main__":
    sys.exit(main())
