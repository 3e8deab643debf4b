"""The command line: each command parses, builds a config and makes one call."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument, Option

from kiop_fast.command_group import Commands

app = typer.Typer(
    cls=Commands, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    help="The knowledge of several trained models in one small image border, without their data.",
)  # fmt: skip

Overrides = Annotated[list[str] | None, Argument(help="settings, e.g. storing.lr=0.5")]
Prompt = Annotated[Path, Argument(help="prompt.safetensors, or its run folder")]
Target = Annotated[str | None, Option(help=r"model A: \[SCHEME:]NAME\[@DATA]\[=PATH]")]
Providers = Annotated[list[str] | None, Option("--provider", help="model B; repeatable")]
Device = Annotated[str | None, Option(help="auto, cpu, cuda, cuda:N")]
Loader = Annotated[str | None, Option(help="real images: auto, dali, torch")]
Quiet = Annotated[bool, Option("--quiet", "-q", help="no progress bars")]
Json = Annotated[bool, Option("--json", help="print JSON instead of a table")]


@app.command()
def train(
    overrides: Overrides = None,
    preset: Annotated[str | None, Option(help="where settings start from (demo)")] = None,
    config: Annotated[Path | None, Option(help="settings in a TOML file")] = None,
    target: Target = None,
    provider: Providers = None,
    mode: Annotated[str | None, Option(help="bf, b, t, vanilla")] = None,
    engine: Annotated[str | None, Option(help="fast, reference")] = None,
    seed: Annotated[int | None, Option()] = None,
    seeds: Annotated[str | None, Option(help="repeat, e.g. 0,1,2; mean ± std")] = None,
    epochs: Annotated[int | None, Option()] = None,
    side: Annotated[int | None, Option(help="image side, pixels")] = None,
    threads: Annotated[int | None, Option(help="CPU threads")] = None,
    device: Device = None,
    precision: Annotated[str | None, Option(help="fp32, bf16x3, tf32, bf16")] = None,
    graphs: Annotated[bool | None, Option(help="capture steps as CUDA graphs")] = None,
    loader: Loader = None,
    out: Annotated[
        Path | None, Option(help="run folder (runs/PRESET-TARGET-PROVIDER-sSEED)")
    ] = None,
    resume: Annotated[bool, Option("--resume", help="continue the run in the folder")] = False,
    profile: Annotated[bool, Option("--profile", help="where the time of a step goes")] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Learn a prompt; with no argument, the demo: a letters model learns to read digits."""
    from kiop_fast import commands as do

    flags = {"target": target, "providers": provider, "mode": mode, "engine": engine, "seed": seed,
             "epochs": epochs, "side": side, "threads": threads, "device": device,
             "loading": {"loader": loader} if loader else None, "precision": precision,
             "graphs": graphs}  # fmt: skip
    chosen = do.train_config(preset, config, flags, overrides or [], resume=out if resume else None)
    numbers = do.parse_seeds(seeds) if seeds else [chosen.seed]
    finished = do.train_seeds(chosen, numbers, out, resume=resume, quiet=quiet or as_json,
                              profile=profile)  # fmt: skip
    _show_runs(finished, as_json)


def _show_runs(finished: list[Any], as_json: bool) -> None:
    from kiop_fast.deliver import console

    if as_json:
        typer.echo(json.dumps([run.facts() for run in finished]))
        return
    for run in finished:
        if run.evaluation is not None:
            _print(console.accuracy_table(run.evaluation))
        elif run.result.accuracy:
            _print(console.plain_table(run.result.accuracy))
        for period, rows in run.result.profile.items():
            _print(console.profile_table(period, rows))
        for name, path in (("prompt", run.result.artefact), ("report", run.report)):
            if path is not None:
                typer.echo(f"{name}  {path}")
    if len(finished) > 1:
        _print(console.seeds_table({run.seed: run.result.accuracy for run in finished}))


def _print(table: Any) -> None:
    from rich.console import Console

    Console().print(table)


@app.command()
def pretrain(
    overrides: Overrides = None,
    data: Annotated[str, Option(help="dataset")] = "letters",
    arch: Annotated[str | None, Option(help="architecture (resnet8)")] = None,
    side: Annotated[int | None, Option(help="image side, pixels (16)")] = None,
    seed: Annotated[int | None, Option()] = None,
    epochs: Annotated[int | None, Option()] = None,
    device: Device = None,
    loader: Loader = None,
    out: Annotated[Path | None, Option(help="file to write (the cache)")] = None,
    quiet: Quiet = False,
) -> None:
    """Train and save one source model on data that is there."""
    from kiop_fast import commands as do
    from kiop_fast.pretrain import pretrain as run
    from kiop_fast.runtime.progress import make_progress

    flags = {"arch": arch, "side": side, "seed": seed, "epochs": epochs, "device": device,
             "loading": {"loader": loader} if loader else None}  # fmt: skip
    with make_progress(quiet=quiet) as progress:
        path = run(do.pretrain_config(data, flags, overrides or []), out, progress)
    typer.echo(path)


@app.command()
def evaluate(
    prompt: Prompt,
    target: Target = None,
    provider: Providers = None,
    batch: Annotated[int, Option(min=1, help="images a forward pass")] = 256,
    device: Device = None,
    loader: Loader = None,
    as_json: Json = False,
) -> None:
    """Accuracy of a prompt on its tasks' test data, between floor and ceiling."""
    from kiop_fast import commands as do
    from kiop_fast.deliver.console import accuracy_table

    artefact, sources = do.open_prompt(
        prompt, target=target, providers=provider or None, device=device
    )
    folder = prompt if prompt.is_dir() else prompt.parent
    found = do.evaluate_run(artefact, sources, folder, batch, loader)
    typer.echo(json.dumps(found)) if as_json else _print(accuracy_table(found))


@app.command()
def predict(
    prompt: Prompt,
    files: Annotated[list[Path], Argument(help="image files")],
    task: Annotated[str | None, Option(help="one task instead of all")] = None,
    top: Annotated[int, Option(min=1, help="classes a file")] = 3,
    invert: Annotated[bool, Option("--invert", help="swap dark and light")] = False,
    target: Target = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Class and probability for image files, by every task."""
    from dataclasses import asdict

    from kiop_fast import commands as do
    from kiop_fast.deliver.console import predictions_table
    from kiop_fast.deliver.predict import predict as run

    served = do.serve(prompt, target=target, device=device)
    said = run(served, files, task=task, top=top, invert=invert)
    plain = json.dumps([asdict(one) for one in said], default=str)
    typer.echo(plain) if as_json else _print(predictions_table(said))


@app.command()
def report(
    folder: Annotated[Path, Argument(help="a run folder")],
    target: Target = None,
    device: Device = None,
    quiet: Quiet = False,
) -> None:
    """Draw a run: prompt, synthetic images, curves, mapping, Grad-CAM, one HTML page."""
    from kiop_fast import commands as do
    from kiop_fast.runtime.progress import make_progress

    with make_progress(quiet=quiet) as progress:
        page = do.report(folder, target=target, device=device, progress=progress)
    typer.echo(page)


@app.command()
def info(prompt: Prompt) -> None:
    """What is inside a prompt file."""
    from kiop_fast.deliver.console import info_table
    from kiop_fast.prompt.artefact import load_prompt

    _print(info_table(load_prompt(prompt)))


@app.command(context_settings={"allow_extra_args": True, "allow_interspersed_args": False})
def upstream(
    context: typer.Context,
    script: Annotated[str, Argument(help="KiOP_BF, KiOP_B or KiOP_triple, then its flags")],
) -> None:
    """The authors' scripts by their own flags: same files in, same log lines and .pth out."""
    from kiop_fast.dropin.command import run_upstream
    from kiop_fast.runtime.progress import make_progress

    with make_progress() as progress:
        run_upstream(script, context.args, progress)


@app.command("import-upstream")
def import_upstream(
    checkpoint: Annotated[Path, Argument(help="a .pth of the authors' scripts")],
    target: Annotated[str, Option(help=r"model A: \[SCHEME:]NAME@DATA=PATH")],
    provider: Annotated[list[str], Option("--provider", help="data of model B; repeatable")],
    mapping: Annotated[list[str] | None, Option(help="A's classes: 4,0,… or a file")] = None,
    script: Annotated[str | None, Option(help="script whose draws give the mapping")] = None,
    seed: Annotated[int, Option(help="its --seed")] = 0,
    backbones: Annotated[str, Option(help="its --backbone_t,_s,_l")] = "ResNet18",
    batch_size: Annotated[int, Option(help="its --batch_size")] = 64,
    verify: Annotated[bool, Option(help="compare with the recorded accuracy")] = True,
    out: Annotated[Path, Option(help="prompt file to write")] = Path("prompt.safetensors"),
) -> None:
    """Make a prompt file of a .pth; the label mapping is given or drawn again."""
    from kiop_fast.dropin import converting as do

    do.import_upstream(checkpoint, out, target, provider, mapping, script, seed, backbones,
                       verify=verify, batch=batch_size)  # fmt: skip
    typer.echo(out)


@app.command("export-upstream")
def export_upstream(
    prompt: Prompt,
    target: Target = None,
    out: Annotated[Path, Option(help=".pth to write")] = Path("prompt.pth"),
) -> None:
    """Make a .pth for the authors' scripts of a prompt file."""
    from kiop_fast.dropin import converting as do

    do.export_upstream(prompt, out, target)
    typer.echo(out)


@app.command()
def doctor(
    overrides: Overrides = None,
    preset: Annotated[str | None, Option(help="look at a run of this preset, too")] = None,
    config: Annotated[Path | None, Option(help="look at a run of these settings, too")] = None,
    target: Target = None,
    provider: Providers = None,
    device: Device = None,
    out: Annotated[Path, Option(help="where runs are written")] = Path("runs"),
    as_json: Json = False,
) -> None:
    """What works on this machine, and whether a run would; exit code 1 if something fails."""
    from kiop_fast import commands as do
    from kiop_fast.deliver.console import checks_table

    flags = {"target": target, "providers": provider, "device": device}
    found, bad = do.examine(preset, config, flags, overrides or [], out)
    typer.echo(json.dumps(found)) if as_json else _print(checks_table(found))
    raise typer.Exit(1 if bad else 0)


@app.command()
def presets(
    name: Annotated[str | None, Argument(help="all settings of one preset")] = None,
) -> None:
    """The presets and their values, as TOML."""
    from kiop_fast.commands import presets_text

    typer.echo(presets_text(name), nl=False)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def bench(
    context: typer.Context,
    record: Annotated[
        bool, Option("--record", help="append to benchmarks/results/ of the checkout")
    ] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Time every engine, each result checked first; other options go to pytest.

    For example --scale small|paper, --engines reference,fast, --upstream PATH, -k prompt_step.
    """
    from kiop_fast.bench import bench_table, compared, run_benchmarks

    rows = compared(run_benchmarks(context.args, record=record, quiet=quiet or as_json))
    typer.echo(json.dumps([r.facts() for r in rows])) if as_json else _print(bench_table(rows))


def main() -> None:
    """Entry point of ``kiop-fast``."""
    app()


if __name__ == "__main__":
    main()
