"""`python -m cldf_fast`: the same as the command `cldf-fast`."""

from cldf_fast.cli import main

main()
