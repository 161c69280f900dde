"""The learning curve of a recipe on its smoke task, as numbers and as a small SVG."""

from __future__ import annotations

from collections.abc import Sequence

from policy_opt.errors import RecipeError
from policy_opt.loop import Loop, RunSize
from policy_opt.recipe import Recipe
from policy_opt.table import TableActor, TableLearner, World

ITERATIONS, SEEDS = 40, 3
WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 420, 190, 40, 30, 12
INK, LINE, BAND = "#57606a", "#0969da", "#0969da"


def curve(recipe: Recipe, seeds: int = SEEDS, iterations: int = ITERATIONS) -> list[list[float]] | None:
    """Share of right training episodes, [seeds][iterations]; None where the recipe has no smoke task.

    The world is the one in which the tests want every recipe to learn.
    """
    if recipe.learns.startswith("none"):
        return None
    recipe = recipe.set(*recipe.smoke)
    found = []
    for seed in range(seeds):
        world = World(tasks=4, turns=2, actions=2, seed=seed)
        learner = TableLearner(world)
        size = RunSize(tasks=world.tasks, groups=4, group_size=8, seed=seed)
        loop = Loop(recipe, TableActor(world, learner), learner, size)
        found.append([loop.iterate()[1]["correct"] for _ in range(iterations)])
    return found


def drawn(points: Sequence[Sequence[float]], name: str) -> str:
    """An SVG: the mean over seeds, and a band from the lowest to the highest."""
    if not points or not points[0]:
        raise RecipeError(f"{name}: there is no curve to draw")
    columns = list(zip(*points, strict=True))
    mean = [sum(column) / len(column) for column in columns]
    low, high = [min(column) for column in columns], [max(column) for column in columns]

    def at(i: int, value: float) -> str:
        x = LEFT + (WIDTH - LEFT - 12) * i / max(len(columns) - 1, 1)
        y = TOP + (HEIGHT - TOP - BOTTOM) * (1 - value)
        return f"{x:.1f},{y:.1f}"

    band = [at(i, v) for i, v in enumerate(high)] + [at(i, low[i]) for i in reversed(range(len(low)))]
    line = [at(i, v) for i, v in enumerate(mean)]
    grid = []
    for value in (0.0, 0.5, 1.0):
        x, y = at(0, value).split(",")
        right = at(len(columns) - 1, value).split(",")[0]
        grid.append(f'<line x1="{x}" y1="{y}" x2="{right}" y2="{y}" stroke="{INK}" stroke-opacity="0.25"/>')
        grid.append(f'<text x="{LEFT - 6}" y="{float(y) + 4:.1f}" text-anchor="end">{value:g}</text>')
    words = (
        f'<text x="{LEFT}" y="{HEIGHT - 8}">0</text>'
        f'<text x="{WIDTH - 12}" y="{HEIGHT - 8}" text-anchor="end">{len(columns)} iterations</text>'
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        f'role="img" font-family="sans-serif" font-size="11" fill="{INK}">\n'
        f"<title>{name}: share of right answers, mean and range of {len(points)} seeds</title>\n"
        + "\n".join(grid)
        + f'\n<polygon points="{" ".join(band)}" fill="{BAND}" fill-opacity="0.18"/>\n'
        f'<polyline points="{" ".join(line)}" fill="none" stroke="{LINE}" stroke-width="2"/>\n{words}\n</svg>\n'
    )
