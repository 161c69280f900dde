"""Data only: what the tasks say, and run configurations with the numbers they are expected to reach."""

from pathlib import Path


def folder(name: str) -> Path:
    """The folder of one environment's data."""
    return Path(__file__).resolve().parent / name
