"""How the sweeps and runs below a folder stand, as `randlora status`: python scripts/status.py RUNS [--watch 10]"""

import sys
from functools import partial

from randlora.errors import exit_code
from randlora.sweeps.status import main

if __name__ == "__main__":
    sys.exit(exit_code(partial(main, sys.argv[1:])))
