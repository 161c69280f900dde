"""`python -m agents.compare`."""

from agents.compare.command import run

run()
