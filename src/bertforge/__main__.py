"""`python -m bertforge` is the command line."""

from bertforge.cli.main import main

main()
