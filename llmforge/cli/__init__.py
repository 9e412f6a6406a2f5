"""The command line: one command, one file, each a thin caller of the Python names."""
