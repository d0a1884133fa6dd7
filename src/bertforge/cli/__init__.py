"""The command line: each command parses its arguments, calls one library function and prints what it wrote."""
