"""The HTML report of a run: `collect` reads the run folder, `render` makes one self-contained file of it."""
