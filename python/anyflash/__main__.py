"""``python -m anyflash``: see :mod:`anyflash.cli`."""

import sys

from anyflash.cli import main

if __name__ == "__main__":
    sys.exit(main())
