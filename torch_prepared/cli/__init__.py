"""The command line: one file per command, each of which calls one function with one config."""
