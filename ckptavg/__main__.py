"""``python -m ckptavg``."""

from ckptavg.cli import main

main(prog_name="ckptavg")
