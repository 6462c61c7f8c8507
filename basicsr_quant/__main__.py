"""``python -m basicsr_quant`` is the ``basicsr`` command."""

import sys

from .cli import main

if __name__ == '__main__':
    sys.exit(main())
