"""Figures of a run: the prompt, synthetic images, curves, the mapping, Grad-CAM."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kiop_fast.deliver.gradcam import gradcam, region_shares, ring_start
from kiop_fast.deliver.run_data import BankImages
from kiop_fast.errors import RunError
from kiop_fast.prompt import Prompt
from kiop_fast.prompt.artefact import Artefact, ArtefactTask
from kiop_fast.prompt.served import PromptedTask
from kiop_fast.runtime.files import atomic_write

Pixels = npt.NDArray[np.float64]

INK, SOFT, LINE, GROUND = "#1f2937", "#6b7280", "#d1d5db", "#f3f4f6"
COLOURS = ("#2563eb", "#ea580c", "#059669", "#9333ea", "#dc2626", "#0891b2")
DPI = 144


def new_figure(width: float, height: float) -> Any:
    """An empty figure, inches; no global state of matplotlib is touched."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise RunError("pictures need matplotlib", got="it is not installed",
                       expected="matplotlib 3.9 or newer",
                       fix="pip install 'matplotlib>=3.9'") from None  # fmt: skip
    return Figure(figsize=(width, height), dpi=DPI, layout="constrained", facecolor="white")


def save_figure(figure: Any, path: Path) -> Path:
    """Write a figure as PNG, atomically."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor="white")
    atomic_write(path, buffer.getvalue())
    return path


def to_pixels(image: Tensor) -> Pixels:
    """(C, s, s) uint8 or [0, 1] → (s, s, 3) in [0, 1]."""
    scaled = image.float() / 255 if image.dtype == torch.uint8 else image.float()
    return scaled.expand(3, -1, -1).permute(1, 2, 0).clamp(0, 1).cpu().double().numpy()


def _show(axis: Any, pixels: Pixels, title: str = "", colour: str = INK, size: float = 9) -> None:
    axis.imshow(pixels, interpolation="nearest", vmin=0, vmax=1)
    axis.set_xticks([])
    axis.set_yticks([])
    for spine in axis.spines.values():
        spine.set_color(LINE)
        spine.set_linewidth(0.6)
    if title:
        axis.set_title(title, fontsize=size, color=colour, pad=4, linespacing=1.4)


def ring_pixels(prompt: Prompt, k: int) -> Pixels:
    """Ring ``k`` (from 1) alone, (S_k, S_k, 4); transparent where it has no cells."""
    sides = (prompt.side, *prompt.rings)
    inner, outer = sides[k - 1], sides[k]
    left = (outer - inner + 1) // 2
    pixels = np.ones((outer, outer, 4))
    pixels[..., :3] = to_pixels(prompt.squares()[k - 1].sigmoid())
    pixels[left : left + inner, left : left + inner, 3] = 0
    return pixels


def canvas_pixels(prompt: Prompt, depth: int, image: Tensor) -> Pixels:
    """An image (C, s, s) in its border, (S, S, 3); border cells as stored, image in [0, 1]."""
    canvas = to_pixels(prompt.picture(depth))
    start = ring_start(prompt.side, prompt.canvas_side(depth), prompt.rings)
    canvas[start : start + prompt.side, start : start + prompt.side] = to_pixels(image)
    return canvas


def ring_name(k: int, rings: int) -> str:
    """The paper's names: ring 1 is the core, the rest the periphery."""
    if rings == 1:
        return "the only ring"
    return "core" if k == 1 else "periphery" if rings == 2 else f"periphery {k - 1}"


def prompt_figure(artefact: Artefact, banks: Mapping[str, BankImages]) -> Any:
    """Each ring alone, then the canvas of each task with a synthetic example."""
    prompt, rings = artefact.prompt(), len(artefact.rings)
    shown = [task for task in artefact.tasks if task.name in banks]
    figure = new_figure(2.3 * (rings + len(shown)), 2.62)
    axes = figure.subplots(1, rings + len(shown), squeeze=False)[0]
    for k in range(1, rings + 1):
        axes[k - 1].set_facecolor(GROUND)
        title = f"{ring_name(k, rings)}\n{artefact.rings[k - 1]} × {artefact.rings[k - 1]}, " \
                f"{artefact.cells[k - 1].numel():,} cells"  # fmt: skip
        _show(axes[k - 1], ring_pixels(prompt, k), title)
    for axis, task, colour in zip(axes[rings:], shown, _colours(artefact), strict=False):
        image = banks[task.name].images[-1]
        title = f"what A sees for {task.name}\n{task.depth} ring{'s' * (task.depth > 1)}"
        _show(axis, canvas_pixels(prompt, task.depth, image), title, colour)
    return figure


def _colours(artefact: Artefact) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(len(artefact.tasks))]


def images_figure(bank: BankImages, classes: Sequence[str]) -> Any:
    """Synthetic images by class: a row a class, in as many columns of rows as fit a page."""
    columns = 1 if len(classes) <= 10 else 2 if len(classes) <= 40 else 4
    each = {1: 14, 2: 7, 4: 4}[columns]
    rows = math.ceil(len(classes) / columns)
    side = bank.images.shape[-1]
    cell = side + max(1, side // 16)
    figure = new_figure(8.4, 8.4 / (columns * (each + 2)) * rows + 0.1)
    for column, axis in enumerate(figure.subplots(1, columns, squeeze=False)[0]):
        page = np.ones((rows * cell, each * cell, 3))
        for row, label in enumerate(range(column * rows, min((column + 1) * rows, len(classes)))):
            for i, image in enumerate(bank.examples(label, each)):
                page[row * cell : row * cell + side, i * cell : i * cell + side] = to_pixels(image)
            axis.text(-0.25 * cell, (row + 0.45) * cell, _short(classes[label], 14), ha="right",
                      va="center", fontsize=9 if columns < 4 else 6, color=INK)  # fmt: skip
        axis.imshow(page, interpolation="nearest")
        axis.axis("off")
    return figure


def _short(name: str, length: int) -> str:
    return name if len(name) <= length else name[: length - 1] + "…"


def mapping_figure(artefact: Artefact, task: ArtefactTask, banks: Mapping[str, BankImages]) -> Any:
    """Which class of A speaks for each class of a provider, with synthetic examples of both."""
    assert task.mapping is not None
    names, columns = artefact.target.info.classes, min(5, len(task.info.classes))
    rows = math.ceil(len(task.info.classes) / columns)
    figure = new_figure(1.75 * columns, 0.8 * rows)
    own = next((t.name for t in artefact.tasks if t.mapping is None), "")
    side = artefact.side
    for place, axis in enumerate(figure.subplots(rows, columns, squeeze=False).flat):
        axis.axis("off")
        if place >= len(task.info.classes):
            continue
        partner = int(task.mapping[place])
        page = np.ones((side, round(3.4 * side), 3))
        for bank, label, left in ((task.name, place, 0), (own, partner, round(1.8 * side))):
            found = banks[bank].examples(label, 1) if bank in banks else torch.empty(0)
            page[:, left : left + side] = to_pixels(found[0]) if len(found) else 0.95
        axis.imshow(page, interpolation="nearest")
        axis.annotate("", (1.72 * side, side / 2), (1.02 * side, side / 2),
                      arrowprops={"arrowstyle": "->", "color": SOFT, "lw": 1.2})  # fmt: skip
        for text, x in ((task.info.classes[place], 0.5), (names[partner], 2.3)):
            axis.text(x * side, 1.08 * side, _short(text, 12), ha="center", va="top", fontsize=9,
                      color=INK)  # fmt: skip
    return figure


def curves_figure(metrics: Sequence[Mapping[str, Any]], tasks: Mapping[str, Any]) -> Any:
    """Accuracy, transfer loss, agreement with the teacher and synthesis loss by epoch."""
    panels = {
        "accuracy on test data": ("accuracy", ""),
        "agreement with the teacher": ("agreement", ""),
        "transfer loss": ("loss", ".kl"),
        "synthesis loss": ("loss", ".total"),
    }
    found = {title: series(metrics, *where) for title, where in panels.items()}
    found = {title: lines for title, lines in found.items() if lines}
    names = list(dict.fromkeys(name for lines in found.values() for name in lines))
    figure = new_figure(2.9 * max(len(found), 1), 2.8)
    for axis, (title, lines) in zip(
        figure.subplots(1, max(len(found), 1), squeeze=False)[0], found.items(), strict=False
    ):
        for name, (epochs, values) in lines.items():
            colour = COLOURS[names.index(name) % len(COLOURS)]
            axis.plot(epochs, values, color=colour, lw=1.6, marker="o", ms=3, label=name)
            facts = tasks.get(name, {}) if title.startswith("accuracy") else {}
            for bound, dash in (("ceiling", (4, 2)), ("floor", (1, 2))):
                if facts.get(bound) is not None:
                    axis.axhline(facts[bound], color=colour, lw=0.9, dashes=dash, alpha=0.7)
        _dress(axis, title, share=not title.endswith("loss"))
    if found:
        handles = figure.axes[0].get_lines()
        handles = [line for line in handles if line.get_label() in names]
        figure.legend(handles=handles, loc="outside lower center", ncols=6, frameon=False,
                      fontsize=9, labelcolor=INK)  # fmt: skip
    return figure


def series(
    metrics: Sequence[Mapping[str, Any]], group: str, ending: str
) -> dict[str, tuple[list[int], list[float]]]:
    """Epochs and values by task, of the entries of ``group`` whose name has that ending."""
    lines: dict[str, tuple[list[int], list[float]]] = {}
    for record in metrics:
        for name, value in record.get(group, {}).items():
            if name.endswith(ending):
                epochs, values = lines.setdefault(name.removesuffix(ending), ([], []))
                epochs.append(record["epoch"])
                values.append(value)
    return lines


def _dress(axis: Any, title: str, *, share: bool) -> None:
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    axis.set_title(title, fontsize=10, color=INK, loc="left")
    axis.set_xlabel("epoch", fontsize=8, color=SOFT)
    axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    if share:
        axis.set_ylim(0, 1)
        axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    else:
        axis.set_ylim(bottom=min(0, axis.get_ylim()[0]))
    axis.tick_params(labelsize=8, colors=SOFT, length=0)
    axis.grid(axis="y", color=GROUND, lw=1)
    axis.set_axisbelow(True)
    for spine in ("top", "right", "left"):
        axis.spines[spine].set_visible(False)
    axis.spines["bottom"].set_color(LINE)


def gradcam_figure(modules: Sequence[PromptedTask], images: Mapping[str, Tensor]) -> Any:
    """A row a task: examples under their saliency, the mean map, and shares of the regions.

    Args:
        modules: served tasks.
        images: (N, C, s, s) uint8 by task; the first five are shown, all enter the mean.
    """
    figure = new_figure(9.2, 1.5 * len(modules) + 0.1)
    grid = figure.subplots(len(modules), 7, squeeze=False, width_ratios=[1] * 6 + [1.5])
    for row, (axes, module) in enumerate(zip(grid, modules, strict=True)):
        given, prompt = images[module.name], module.prompt
        maps = gradcam(module, given).cpu()
        with torch.no_grad():
            device = next(module.model.parameters()).device
            decided = module(given.to(device)).argmax(dim=1).tolist()
        for i, axis in enumerate(axes[:5]):
            if i >= len(given):
                axis.axis("off")
                continue
            _show(axis, canvas_pixels(prompt, module.depth, given[i]) * 0.85,
                  f"reads “{_short(module.classes[decided[i]], 10)}”", SOFT, 8)  # fmt: skip
            heat = maps[i].numpy()
            axis.imshow(heat, cmap="inferno", alpha=0.25 + 0.5 * heat, vmin=0, vmax=1)
        mean = maps.mean(dim=0).numpy()
        axes[5].imshow(mean / max(mean.max(), 1e-12), cmap="inferno", vmin=0, vmax=1)
        _outline(axes[5], prompt, module.depth)
        axes[5].set_title(f"mean of {len(maps)}", fontsize=8, color=SOFT, pad=4)
        axes[0].set_ylabel(f"{module.name}\n{module.depth} ring{'s' * (module.depth > 1)}",
                           fontsize=9, color=COLOURS[row % len(COLOURS)])  # fmt: skip
        _shares(axes[6], maps, prompt, module.depth)
    return figure


def _outline(axis: Any, prompt: Prompt, depth: int) -> None:
    from matplotlib.patches import Rectangle

    canvas = prompt.canvas_side(depth)
    for size in (prompt.side, *prompt.rings[: depth - 1]):
        start = ring_start(size, canvas, prompt.rings) - 0.5
        axis.add_patch(Rectangle((start, start), size, size, fill=False, ec="white", lw=0.8))
    axis.set_xticks([])
    axis.set_yticks([])


def _shares(axis: Any, maps: Tensor, prompt: Prompt, depth: int) -> None:
    shares = region_shares(maps, prompt.side, prompt.rings)
    names = ["image", *(ring_name(k, len(prompt.rings)) for k in range(1, depth + 1))]
    axis.barh(names, shares, color=[LINE, *COLOURS][: len(names)], height=0.6)
    for y, share in enumerate(shares):
        axis.text(share + 0.02, y, f"{share:.0%}", va="center", fontsize=8, color=INK)
    axis.set_xlim(0, 1.15)
    axis.set_ylim(max(len(prompt.rings), 3) + 0.5, -0.5)
    axis.set_xticks([])
    axis.tick_params(labelsize=8, colors=INK, length=0)
    axis.set_title("share of saliency", fontsize=8, color=SOFT, pad=4)
    for spine in axis.spines.values():
        spine.set_visible(False)
