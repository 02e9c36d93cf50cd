"""The strings of ``--model``, ``--data`` and their arguments → objects."""
