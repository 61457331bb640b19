"""python train.py method=randlora model=clip task=cifar10: the console script `randlora`, from a clone."""

import sys

from randlora.cli import main

if __name__ == "__main__":
    sys.exit(main())
