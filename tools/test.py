"""`python tools/test.py -opt FILE` is `basicsr test -opt FILE`."""

import sys

from basicsr_quant.cli import main

if __name__ == '__main__':
    sys.exit(main(['test', *sys.argv[1:]]))
