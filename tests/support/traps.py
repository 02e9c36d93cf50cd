"""Classes that create the file they are given, whichever way a pickle reaches them."""

import pathlib


class Trap:
    """Creates the file when it is built, filled or told its state."""

    def __new__(cls, path=None):
        if path is not None:
            pathlib.Path(path).touch()
        return object.__new__(cls)

    def __init__(self, path=None):
        pass

    def __setstate__(self, path):
        pathlib.Path(path).touch()

    append = add = __setstate__

    def __setitem__(self, path, value):
        pathlib.Path(path).touch()


class Attribute:
    """Creates the file when an attribute is set."""

    def __setattr__(self, name, path):
        pathlib.Path(path).touch()
