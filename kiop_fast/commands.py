"""What the commands of the command line do, apart from parsing and printing."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kiop_fast.config import LoadingConfig, PretrainConfig, RunConfig
from kiop_fast.config_io import from_dict, load_toml, merge, override, parse_overrides
from kiop_fast.errors import ConfigError, KiopError, SourceError
from kiop_fast.presets import preset
from kiop_fast.runtime.progress import Progress, make_progress

if TYPE_CHECKING:
    from kiop_fast.pipeline import RunResult
    from kiop_fast.prompt.artefact import Artefact, ArtefactTask
    from kiop_fast.prompt.served import ServedPrompt
    from kiop_fast.source import Source
    from kiop_fast.sources import Sources


def train_config(
    name: str | None, file: Path | None, flags: Mapping[str, Any], overrides: Sequence[str],
    *, resume: Path | None = None,
) -> RunConfig:  # fmt: skip
    """Settings of a run: preset, then config file, then flags, then ``key=value``.

    Args:
        name: of the preset; by default the file's, else ``demo``.
        file: TOML.
        flags: nested settings; those that are None or empty were not given.
        overrides: ``storing.lr=0.5``.
        resume: a run to continue; its own settings are the file, unless one is given.
    """
    if resume is not None and name is None and file is None:
        file = resume / "config.toml" if (resume / "config.toml").exists() else None
    values = load_toml(file) if file is not None else {}
    given = {key: value for key, value in flags.items() if value not in (None, [], ())}
    changes = merge(merge(values, given), parse_overrides(overrides))
    base = preset(name or values.get("preset") or "demo")
    return override(base, {**changes, "preset": base.preset})


def pretrain_config(
    data: str, flags: Mapping[str, Any], overrides: Sequence[str]
) -> PretrainConfig:
    """Settings of a source's training: the built-in task's recipe, flags, ``key=value``."""
    from kiop_fast.pretrain import RECIPES

    given = {key: value for key, value in flags.items() if value is not None}
    values = {**RECIPES.get(data, {}), "data": data, **given}
    return from_dict(PretrainConfig, merge(values, parse_overrides(overrides)))


def default_out(config: RunConfig) -> Path:
    """``runs/<preset>-<target>-<providers>-s<seed>``, without paths of weights."""
    specs = [spec.partition("=")[0] for spec in (config.target, *config.providers)]
    name = "-".join([config.preset, *filter(None, specs), f"s{config.seed}"])
    return Path("runs") / re.sub(r"[^\w@.+-]+", "-", name)


def parse_seeds(text: str) -> list[int]:
    """``0,1,2`` as numbers."""
    try:
        seeds = [int(part) for part in text.split(",")]
    except ValueError:
        seeds = []
    if not seeds or min(seeds) < 0 or len(set(seeds)) != len(seeds):
        raise ConfigError("--seeds is not understood", got=text, expected="for example 0,1,2")
    return seeds


@dataclass(frozen=True)
class Finished:
    """A trained run with its evaluation (None where switched off, or no prompt) and report."""

    seed: int
    result: RunResult
    evaluation: dict[str, Any] | None
    report: Path

    def facts(self) -> dict[str, Any]:
        """JSON-able."""
        artefact = self.result.artefact
        return {
            "seed": self.seed,
            "out": str(self.result.out),
            "artefact": None if artefact is None else str(artefact),
            "report": str(self.report),
            "seconds": round(self.result.seconds, 3),
            "accuracy": self.result.accuracy,
            "profile": self.result.profile,
            "evaluation": self.evaluation,
        }


def train_and_report(
    config: RunConfig, out: Path, *, resume: bool, progress: Progress, profile: bool = False
) -> Finished:
    """Train; then evaluate (unless ``evaluation.every`` is 0) and draw the report."""
    from kiop_fast import pipeline
    from kiop_fast.deliver.report import write_report

    result = pipeline.train(config, out, resume=resume, progress=progress, profile=profile)
    evaluation, target = None, None
    if result.artefact is not None:
        artefact, sources = open_prompt(result.artefact, config=config, progress=progress)
        target = sources.target
        if config.evaluation.every:
            batch, loader = config.evaluation.batch, config.loading.loader
            evaluation = evaluate_run(artefact, sources, out, batch, loader)
    page = write_report(out, target=target, progress=progress)
    return Finished(config.seed, result, evaluation, page)


def train_seeds(
    config: RunConfig,
    seeds: Sequence[int],
    out: Path | None,
    *,
    resume: bool,
    quiet: bool,
    profile: bool = False,
) -> list[Finished]:
    """One run a seed: into ``out``, or below it where there are several."""
    finished = []
    for seed in seeds:
        one = replace(config, seed=seed)
        folder = out or default_out(one)
        if out is not None and len(seeds) > 1:
            folder = out / f"seed-{seed}"
        with make_progress(quiet=quiet) as progress:
            finished.append(
                train_and_report(one, folder, resume=resume, progress=progress, profile=profile)
            )
    return finished


def open_prompt(
    path: Path, *, config: RunConfig | None = None, target: str | None = None,
    providers: Sequence[str] | None = None, device: str | None = None,
    progress: Progress | None = None,
) -> tuple[Artefact, Sources]:  # fmt: skip
    """A prompt file with its models.

    Args:
        path: the file, or its run folder.
        config: of its run; by default as recorded in the file.
        target, providers, device: other than the config's.
    """
    from kiop_fast.prompt.artefact import load_prompt
    from kiop_fast.runtime.device import choose_device
    from kiop_fast.sources import load_sources

    artefact = load_prompt(path)
    config = config or replace(from_dict(RunConfig, artefact.config), device="auto")
    config = replace(
        config,
        target=target or config.target,
        providers=config.providers if providers is None else tuple(providers),
    )
    chosen = choose_device(device or config.device)
    return artefact, load_sources(config, artefact.rings, chosen, progress)


def serve(path: Path, *, target: str | None, device: str | None) -> ServedPrompt:
    """A prompt file on its target model."""
    artefact, sources = open_prompt(path, target=target, providers=(), device=device)
    return artefact.on(sources.target)


def evaluate_run(
    artefact: Artefact, sources: Sources, folder: Path, batch: int, loader: str | None = None
) -> dict[str, Any]:
    """Evaluate, with the banks of the run ``folder``; keep the result there if it is a run.

    Args:
        loader: of test images (auto); other settings of loading are those of the run.
    """
    from kiop_fast.deliver.evaluate import evaluate
    from kiop_fast.deliver.run_data import read_banks
    from kiop_fast.runtime.files import atomic_write

    banks = {name: bank.images for name, bank in read_banks(folder).items()}
    mapped = [task.name for task in artefact.tasks if task.mapping is not None]
    ours = mapped[len(mapped) - len(sources.providers) :]  # an extended prompt has older ones
    providers = dict(zip(ours, sources.providers, strict=False))
    for name, provider in providers.items():
        _check_job(artefact.task(name), provider)
    recorded = from_dict(LoadingConfig, artefact.config.get("loading", {}))
    loading = replace(recorded, loader=loader or "auto")
    found = evaluate(artefact, sources.target, providers, batch=batch, banks=banks, loading=loading)
    if (folder / "config.toml").exists():
        try:
            atomic_write(folder / "evaluation.json", json.dumps(found, indent=1) + "\n")
        except OSError as error:
            print(f"not kept in the run folder: {error}", file=sys.stderr)
    return found


def _check_job(task: ArtefactTask, provider: Source) -> None:
    """Raise SourceError where a provider was not trained for the task it is to be measured on."""
    ours, theirs = task.info, provider.info
    other = theirs.name != ours.name and theirs.classes != ours.classes  # a folder may have moved
    if other or len(theirs.classes) != len(ours.classes):
        raise SourceError(
            f"{provider.name} does not do task {task.name!r}",
            got=f"{len(theirs.classes)} classes of {theirs.name!r}",
            expected=f"{len(ours.classes)} classes of {ours.name!r}",
            fix="give --provider once for each provider of the run, in their order",
        )


def report(folder: Path, *, target: str | None, device: str | None, progress: Progress) -> Path:
    """Draw a run's report; without its target model, everything but Grad-CAM."""
    from kiop_fast.deliver.report import write_report

    model = None
    if (folder / "prompt.safetensors").exists():
        try:
            model = open_prompt(folder, target=target, providers=(), device=device)[1].target
        except SourceError as error:
            print(f"without Grad-CAM: {error}", file=sys.stderr)
    return write_report(folder, target=model, progress=progress)


def examine(
    name: str | None, file: Path | None, flags: Mapping[str, Any], overrides: Sequence[str],
    out: Path,
) -> tuple[list[dict[str, str]], bool]:  # fmt: skip
    """The doctor's findings, and whether one of them has to be mended.

    Args:
        name, file, flags, overrides: as :func:`train_config`; with none, the machine alone.
        out: where runs are written.
    """
    from kiop_fast.doctor import Check, as_finding, failed, machine_checks, plan_checks
    from kiop_fast.runtime.device import choose_device

    given = [value for key, value in flags.items() if key != "device" and value]
    checks: list[Check] = []
    device = choose_device(flags.get("device") or "auto")
    checks += machine_checks(device, out)
    if name or file or given or overrides:
        try:
            config = train_config(name, file, flags, overrides)
        except KiopError as error:
            checks.append(Check("settings", "FAIL", *as_finding(error)))
        else:
            checks += plan_checks(config, choose_device(config.device))
    return [asdict(check) for check in checks], failed(checks)


def presets_text(name: str | None) -> str:
    """All settings of a preset as TOML, or what each preset sets."""
    import tomli_w

    from kiop_fast.config_io import dump_toml
    from kiop_fast.presets import PRESETS

    if name is not None:
        return dump_toml(preset(name))
    parts = [f"# preset {name}\n{tomli_w.dumps(values)}" for name, values in PRESETS.items()]
    return "\n".join(parts) + "\n# all settings of one: kiop-fast presets NAME\n"
