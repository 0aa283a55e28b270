"""python -m apcnet: the same as `apcnet`; what torchrun starts."""

from apcnet.cli import main

main()
