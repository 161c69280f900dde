"""Recipes against each other at equal budget: train each with every seed, play the same tasks, print intervals.

    command.py     the command line                      statistics.py  intervals over seeds and tasks, IQM
    cells.py       one recipe with one seed              canvas.py      drawing, as SVG and as PNG
    queue.py       cells on all cores, shown live        picture.py     the picture of a comparison
    summary.py     finished cells -> plain data          page.py        the HTML page around it
"""
