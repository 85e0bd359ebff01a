"""The loss, step by step: as a table and as a picture."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

from gpu_agent.lora.evaluate import Validation

CSV = "loss_history.csv"
PNG = "loss_curve.png"


def write(
    folder: Path, history: Sequence[tuple[int, float, float]], validations: Mapping[int, Validation]
) -> list[Path]:
    """Write both files. `history` is step, training loss, learning rate."""
    return [
        _table(folder / CSV, history, validations),
        _picture(folder / PNG, history, validations),
    ]


def _table(
    file: Path, history: Sequence[tuple[int, float, float]], validations: Mapping[int, Validation]
) -> Path:
    with file.open("w", newline="", encoding="utf-8") as opened:
        table = csv.writer(opened)
        table.writerow(["step", "loss", "lr", "validation_loss", "validation_stderr"])
        if 0 in validations:
            table.writerow([0, "", "", validations[0].loss, validations[0].stderr])
        for step, loss, rate in history:
            seen = validations.get(step)
            table.writerow([step, loss, rate, *((seen.loss, seen.stderr) if seen else ("", ""))])
    return file


def _picture(
    file: Path, history: Sequence[tuple[int, float, float]], validations: Mapping[int, Validation]
) -> Path:
    # Figure and canvas without pyplot: no display, no global state, half the import time
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    steps, losses = [row[0] for row in history], [row[1] for row in history]
    axes.plot(steps, losses, color="0.8", linewidth=0.8, label="training, each step")
    checked = sorted(validations)
    axes.errorbar(
        checked,
        [validations[step].loss for step in checked],
        yerr=[validations[step].stderr for step in checked],
        marker="o",
        markersize=4,
        label="validation, fixed noise",
    )
    trained = [step for step in checked if step > 0]
    if trained:
        best = min(trained, key=lambda step: validations[step].loss)
        axes.axvline(best, linestyle=":", color="0.4", label=f"chosen: step {best}")
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.legend()
    figure.savefig(file)
    return file
