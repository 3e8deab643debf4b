"""The report of a run: PNGs and one self-contained HTML page, from the run folder alone."""

from __future__ import annotations

import base64
import html
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from kiop_fast.deliver import pictures
from kiop_fast.deliver.run_data import RunData, read_run
from kiop_fast.runtime.files import atomic_write
from kiop_fast.runtime.progress import Progress
from kiop_fast.source import Source

_SALIENCY_IMAGES = 64  # synthetic images a task in the mean saliency map

_STYLE = """
:root { color-scheme: light; }
body { margin: 0; background: #f3f4f6; color: #1f2937; line-height: 1.55;
       font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1020px; margin: 0 auto; padding: 40px 20px 60px; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 6px; letter-spacing: -0.02em; }
h2 { font-size: 1.1rem; margin: 0 0 4px; }
p { margin: 0 0 14px; color: #4b5563; max-width: 75ch; }
section { background: #fff; border: 1px solid #e5e7eb; border-radius: 12px; padding: 22px 26px;
          margin: 22px 0; overflow-x: auto; }
img { max-width: 100%; display: block; margin: 6px auto 0; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th { text-align: right; font-weight: 500; color: #6b7280; font-size: .85rem; }
td { text-align: right; }
th, td { padding: 7px 10px; border-bottom: 1px solid #f3f4f6; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
td.main { font-weight: 650; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 3px 18px; margin: 0; }
dt { color: #6b7280; } dd { margin: 0; overflow-wrap: anywhere; }
.gain { color: #059669; } .loss { color: #dc2626; }
"""


@dataclass(frozen=True)
class Picture:
    """A section of the page: title, one or two sentences, a PNG."""

    title: str
    text: str
    path: Path


def write_report(
    folder: str | Path, *, target: Source | None = None, progress: Progress | None = None
) -> Path:
    """Draw every picture a run folder allows and write ``report/index.html``.

    Args:
        folder: the run; an unfinished one gives fewer pictures.
        target: model A, for Grad-CAM; without it that picture is left out.
        progress: told about every picture.

    Returns:
        Path of the page.

    Raises:
        RunError: no run folder, or matplotlib is missing.
        ArtefactError: ``target`` is not the prompt's model.
    """
    data = read_run(folder)
    wanted = list(_wanted(data, target))
    made = []
    for done, (name, title, text, draw) in enumerate(wanted):
        path = pictures.save_figure(draw(), data.path / "report" / f"{name}.png")
        made.append(Picture(title, text, path))
        if progress is not None:
            progress("report", done + 1, len(wanted))
    page = data.path / "report" / "index.html"
    atomic_write(page, _page(data, made))
    return page


_Wanted = tuple[str, str, str, Callable[[], Any]]


def _wanted(data: RunData, target: Source | None) -> Iterator[_Wanted]:
    """File name, title, text and drawing function of every picture."""
    artefact, banks = data.artefact, data.banks
    if artefact is not None:
        yield (
            "prompt", "The prompt",
            "Every coloured pixel was learned; nothing else was. Images go into the middle. "
            "Ring 1, the core, is shared by all tasks; the periphery carries the providers'.",
            partial(pictures.prompt_figure, artefact, banks),
        )  # fmt: skip
    if data.metrics:
        bounds = (data.evaluation or {}).get("tasks", {})
        text = "Dashed: the source model's own accuracy. Dotted: the untrained prompt with the " \
               "better of two data-free mappings." if bounds else ""  # fmt: skip
        yield ("curves", "How it learned", text,
               partial(pictures.curves_figure, data.metrics, bounds))  # fmt: skip
    for task in artefact.tasks if artefact is not None else ():
        if task.name not in banks:
            continue
        yield (
            f"images-{task.name}", f"Synthetic images: {task.name}",
            f"Made from the frozen {task.name} model alone, the newest {len(task.info.classes)} "
            "classes by row, newest first. No real image was used.",
            partial(pictures.images_figure, banks[task.name], task.info.classes),
        )  # fmt: skip
    for task in artefact.tasks if artefact is not None else ():
        if artefact is None or task.mapping is None:
            continue
        own = artefact.target.info.task
        yield (
            f"mapping-{task.name}", f"Which class of {own} speaks for which of {task.name}",
            f"Left a synthetic example of {task.name}, right one of the class of "
            f"{own} whose output is read for it.",
            partial(pictures.mapping_figure, artefact, task, banks),
        )  # fmt: skip
    if artefact is not None and target is not None:
        served = artefact.on(target)
        modules = [served.task(name) for name in served.names if name in banks]
        if modules:
            images = {
                m.name: banks[m.name].spread(_SALIENCY_IMAGES, len(m.classes)) for m in modules
            }
            yield (
                "gradcam", "Where the model looks",
                "Grad-CAM of the frozen model through core and periphery: bright places decide. "
                "White frames: the image and the inner rings.",
                partial(pictures.gradcam_figure, modules, images),
            )  # fmt: skip


def _page(data: RunData, made: list[Picture]) -> str:
    body = [f"<h1>{html.escape(_headline(data))}</h1>", f"<p>{html.escape(_summary(data))}</p>"]
    table = accuracy_rows(data)
    if table:
        body.append(_table_section(data, table))
    for picture in made:
        code = base64.b64encode(picture.path.read_bytes()).decode()
        body.append(
            f"<section><h2>{html.escape(picture.title)}</h2><p>{html.escape(picture.text)}</p>"
            f'<img alt="{html.escape(picture.title)}" src="data:image/png;base64,{code}"></section>'
        )
    body.append(_settings(data))
    title = html.escape(_headline(data))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{_STYLE}</style></head><body><main>\n"
        + "\n".join(body)
        + "\n</main></body></html>\n"
    )


def _headline(data: RunData) -> str:
    target = str(data.config.get("target", "")).partition("=")[0]
    names = [str(p).partition("=")[0] for p in data.config.get("providers", [])]
    if data.artefact is None:
        return f"{target} and {', '.join(names)}"
    return f"{data.artefact.target.name} learned {', '.join(names)} through a prompt"


def _summary(data: RunData) -> str:
    artefact, epochs = data.artefact, len(data.metrics)
    took = sum(record.get("seconds", 0.0) for record in data.timings)
    time = f" in {took / 60:.1f} minutes" if took else ""
    if artefact is None:
        return f"{epochs} epochs{time}; there is no prompt in this run."
    return (
        f"{artefact.cells_bytes / 1000:.1f} kB of border pixels, learned in {epochs} epochs{time}. "
        "The model's weights did not change, and training used no image of any dataset."
        if artefact.config.get("mode", "bf") == "bf"
        else f"{artefact.cells_bytes / 1000:.1f} kB of border pixels, {epochs} epochs{time}."
    )


def accuracy_rows(data: RunData) -> dict[str, dict[str, float | None]]:
    """Accuracy, floor, ceiling and oracle by task: from evaluation.json, else the last epoch."""
    if data.evaluation is not None:
        return {name: dict(facts) for name, facts in data.evaluation["tasks"].items()}
    known = [record["accuracy"] for record in data.metrics if "accuracy" in record]
    return {name: {"accuracy": value} for name, value in (known[-1] if known else {}).items()}


def _table_section(data: RunData, rows: Mapping[str, Mapping[str, float | None]]) -> str:
    policies = (data.evaluation or {}).get("policies", {})
    others = [p for p in policies if p != (data.evaluation or {}).get("batchnorm")]
    bounds = [b for b in ("floor", "ceiling", "oracle") if any(b in r for r in rows.values())]
    heads = {"floor": "untrained prompt", "ceiling": "own model", "oracle": "test-label mapping"}
    head = ["task", "accuracy", *(["gain"] if "floor" in bounds else []),
            *(heads[b] for b in bounds), *(f"policy {p}" for p in others)]  # fmt: skip
    lines = []
    for name, facts in rows.items():
        cells = [f"<td>{html.escape(name)}</td>", _cell(facts["accuracy"], "main")]
        if "floor" in bounds:
            cells.append(_gain(facts["accuracy"], facts.get("floor")))
        cells += [_cell(facts.get(bound)) for bound in bounds]
        cells += [_cell(policies[policy].get(name)) for policy in others]
        lines.append(f"<tr>{''.join(cells)}</tr>")
    kept = (data.evaluation or {}).get("batchnorm") or (
        data.artefact.batchnorm if data.artefact else "")  # fmt: skip
    note = f"On real test images, last epoch, BatchNorm policy {kept}." if kept else \
           "On real test images, last epoch."  # fmt: skip
    return (
        f"<section><h2>Accuracy</h2><p>{note}</p><table><tr>"
        + "".join(f"<th>{html.escape(h)}</th>" for h in head)
        + f"</tr>{''.join(lines)}</table></section>"
    )


def _cell(value: float | None, kind: str = "") -> str:
    text = "–" if value is None else f"{100 * value:.1f} %"
    return f'<td class="{kind}">{text}</td>'


def _gain(value: float | None, floor: float | None) -> str:
    if value is None or floor is None:
        return _cell(None)
    kind = "gain" if value >= floor else "loss"
    return f'<td class="{kind}">{100 * (value - floor):+.1f}</td>'


def _settings(data: RunData) -> str:
    pairs: dict[str, str] = {}
    for key, value in data.config.items():
        if isinstance(value, Mapping):
            text = ", ".join(f"{name} {_plain(v)}" for name, v in value.items())
            pairs[key] = text
        else:
            pairs[key] = _plain(value)
    if data.artefact is not None:
        art = data.artefact
        pairs["file"] = (
            f"{art.cells_bytes:,} bytes of cells, {art.statistics_bytes:,} of BatchNorm statistics"
        )
        pairs["target sha256"] = art.target.sha256
        pairs["versions"] = ", ".join(f"{k} {v}" for k, v in art.versions.items())
    items = "".join(f"<dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd>" for k, v in pairs.items())
    return f"<section><h2>Settings</h2><dl>{items}</dl></section>"


def _plain(value: object) -> str:
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(str, value)) + "]"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
