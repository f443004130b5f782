"""``python -m eutectic``, and so ``torchrun -m eutectic``."""

from eutectic.cli import main

main()
