"""`python tools/train.py -opt FILE` is `basicsr train -opt FILE`."""

import sys

from basicsr_quant.cli import main

if __name__ == '__main__':
    sys.exit(main(['train', *sys.argv[1:]]))
