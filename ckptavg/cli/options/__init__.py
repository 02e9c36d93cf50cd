"""Options of the command line, in named groups, and the dataclasses of their values."""
