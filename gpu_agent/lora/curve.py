"""The loss, step by step: as a table and as a picture."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

from gpu_agent.lora import choose
from gpu_agent.lora.choose import Validation

CSV = "loss_history.csv"
PNG = "loss_curve.png"

#: Step, training loss, learning rate and gradient norm.
Row = tuple[int, float, float, float]


def write(
    folder: Path, history: Sequence[Row], validations: Mapping[int, Validation]
) -> list[Path]:
    """Write both files. What depends on the machine and its mood is not in them."""
    return [
        _table(folder / CSV, history, validations),
        _picture(folder / PNG, history, validations),
    ]


def _table(file: Path, history: Sequence[Row], validations: Mapping[int, Validation]) -> Path:
    levels = [level for level, _, _ in validations[0].levels] if 0 in validations else []
    with file.open("w", newline="", encoding="utf-8") as opened:
        table = csv.writer(opened)
        seen = ["validation_loss", "validation_stderr"]
        for level in levels:
            seen += [f"validation_loss_at_{level:.3f}", f"validation_stderr_at_{level:.3f}"]
        table.writerow(["step", "loss", "lr", "gradient_norm", *seen])
        if 0 in validations:
            table.writerow([0, "", "", "", *_seen(validations[0])])
        for row in history:
            found = validations.get(row[0])
            table.writerow([*row, *(_seen(found) if found else [""] * len(seen))])
    return file


def _seen(validation: Validation) -> list[float]:
    told = [validation.loss, validation.stderr]
    for _, loss, stderr in validation.levels:
        told += [loss, stderr]
    return told


def _picture(file: Path, history: Sequence[Row], validations: Mapping[int, Validation]) -> Path:
    # Figure and canvas without pyplot: no display, no global state, half the import time
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    steps, losses = [row[0] for row in history], [row[1] for row in history]
    axes.plot(steps, losses, color="0.88", linewidth=0.8, label="training, each step")
    axes.plot(steps, _smoothed(losses), color="0.45", label="training, mean of the steps around")
    checked = sorted(validations)
    axes.errorbar(
        checked,
        [validations[step].loss for step in checked],
        yerr=[validations[step].stderr for step in checked],
        color="C0",
        capsize=3,
        marker="o",
        markersize=4,
        label="validation, fixed noise, ± standard error",
    )
    best = choose.best_step(validations)
    if best is not None:
        label = f"chosen: step {best}, {validations[best].loss:.4g}"
        axes.axvline(best, linestyle=":", color="C3", label=label)
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.legend()
    figure.savefig(file)
    return file


def _smoothed(losses: Sequence[float]) -> list[float]:
    """Means over a tenth of the training, as much before a step as after it."""
    reach = max(1, len(losses) // 20)
    around = [losses[max(0, at - reach) : at + reach + 1] for at in range(len(losses))]
    return [sum(some) / len(some) for some in around]
