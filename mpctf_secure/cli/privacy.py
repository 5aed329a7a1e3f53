"""`mpctf-secure privacy`: what a guarantee costs before a run, and what a site has spent."""

import functools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from mpctf_secure.cli.options import Format
from mpctf_secure.cli.text import one_line
from mpctf_secure.errors import UsageError

app = typer.Typer(no_args_is_help=True, help="Differential privacy: what a guarantee costs, and what was spent.")

_USUAL_DELTA = 1e-5
_DEMO_COORDINATES = 2_440_000


@app.command()
def plan(
    rows: Annotated[int, typer.Option(min=1, help="Rows of the smallest site.")],
    epsilon: Annotated[float | None, typer.Option(help="The guarantee that is wanted.")] = None,
    noise_multiplier: Annotated[float | None, typer.Option(help="Or the noise, whose guarantee is wanted.")] = None,
    delta: Annotated[float | None, typer.Option(help="Below 1/rows; without it 1e-5, or a tenth of 1/rows.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Of the run.")] = 4,
    batch_size: Annotated[int, typer.Option(min=1, help="Expected rows of a step of record_dpsgd.")] = 64,
    steps: Annotated[int, typer.Option(min=1, help="Of record_dpsgd in a round.")] = 8,
    participants: Annotated[int, typer.Option(min=2, max=100, help="How many updates are summed.")] = 4,
    coordinates: Annotated[int, typer.Option(min=1, help="Of the adapter.")] = _DEMO_COORDINATES,
    output: Annotated[Format, typer.Option("--format", help="json: for programs.")] = Format.TEXT,
) -> None:
    """Show the noise that a guarantee takes, or the guarantee of a noise, for records and for whole participants.

    Example: mpctf-secure privacy plan --rows 5000 --rounds 10 --epsilon 8
    """
    from mpctf_secure.config.privacy import LEAST_NOISE, MOST_NOISE  # noqa: PLC0415 - --help must not wait for these
    from mpctf_secure.privacy.accountant import Release, check_delta, noise_for  # noqa: PLC0415
    from mpctf_secure.privacy.records import sampling_rate  # noqa: PLC0415

    if (epsilon is None) == (noise_multiplier is None):
        raise UsageError("name --epsilon or --noise-multiplier", hint="one of the two")
    delta = min(_USUAL_DELTA, 0.1 / rows) if delta is None else delta
    check_delta("delta", delta, rows)
    units = {
        "record": Release(1.0, sampling_rate(batch_size, rows), rounds * steps),
        "participant": Release(1.0, steps=rounds),
    }
    if noise_multiplier is not None:
        _checked("--noise-multiplier", noise_multiplier, LEAST_NOISE, MOST_NOISE)
    found = []
    for unit, release in units.items():
        of_noise = functools.partial(_price, release, delta)
        noise = noise_multiplier or noise_for(_checked("--epsilon", epsilon or 0.0, 1e-3, 1e9), of_noise)
        spent = of_noise(noise)
        found.append(
            {
                "unit": unit,
                "noise_multiplier": noise,
                "epsilon": spent.epsilon,
                "delta": delta,
                "accountant": spent.accountant,
                "sampling_rate": release.sampling_rate,
                "releases": release.steps,
                "warnings": _warnings(unit, noise, spent.is_meaningless, participants, coordinates, batch_size),
            }
        )
    if output is Format.JSON:
        typer.echo(json.dumps(found, indent=2))
        return
    for entry in found:
        _show(entry)


@app.command()
def report(
    site_file: Annotated[Path, typer.Argument(metavar="SITE.yaml", help="The site file.")],
    delta: Annotated[float | None, typer.Option(help="Without it that of policy.budget, or 1e-5.")] = None,
    output: Annotated[Format, typer.Option("--format", help="json: for programs.")] = Format.TEXT,
) -> None:
    """Show what this site's ledger says was spent of each data set, on which runs, and what it means.

    Example: mpctf-secure privacy report site.yaml
    """
    from mpctf_secure.cli.join import load_site  # noqa: PLC0415 - as above
    from mpctf_secure.participant.spending import spending  # noqa: PLC0415

    site = load_site(site_file)
    budget = site.policy.budget
    usual = budget.delta if budget else _USUAL_DELTA
    chosen = usual if delta is None else _checked("--delta", delta, 1e-15, 0.5)
    found = spending(site.keys, chosen, budget, site.data_set)
    if output is Format.JSON:
        typer.echo(json.dumps(found, indent=2))
        return
    if not found:
        typer.echo(f"{site.keys}: nothing was ever charged")
    for entry in found:
        typer.echo(one_line(f"data set {entry['data_set']}"))
        for line in entry["statements"]:
            typer.echo(one_line(f"  {line}"))
        for run in entry["runs"]:
            typer.echo(one_line(f"  run {run['run']}: {run['releases']} rounds, {_noise_of(run)}"))


def _noise_of(run: dict[str, Any]) -> str:
    parts = []
    if run["noise_multiplier"]:
        parts.append(f"noise multiplier {run['noise_multiplier']:g} on updates, against the {run['against']}")
    if records := run["records"]:
        parts.append(
            f"{records['noise_multiplier']:g} on records in each of {records['steps']} steps a round, sampled at a "
            f"rate of {records['sampling_rate']:.3g}"
        )
    return "; ".join(parts) or "no noise"


def _price(release: Any, delta: float, noise: float) -> Any:
    from mpctf_secure.privacy.accountant import cost_of_integers  # noqa: PLC0415 - as above

    return cost_of_integers([replace(release, noise_multiplier=noise)], delta)


def _checked(name: str, value: float, least: float, most: float) -> float:
    if not least <= value <= most:
        raise UsageError(
            f"{name}: {value} is outside [{least:g}, {most:g}]", hint="such as 8 for epsilon, 1.1 for noise"
        )
    return value


def _warnings(unit: str, noise: float, meaningless: bool, participants: int, coordinates: int, batch: int) -> list[str]:
    """What the noise does to the guarantee and to learning."""
    summed, what = (participants, "updates") if unit == "participant" else (batch, "records")
    ratio = noise * math.sqrt(coordinates) / summed
    warnings = ["NO MEANINGFUL GUARANTEE"] if meaningless else []
    if ratio > 1:
        warnings.append(
            f"the noise is {ratio:.3g} times as long as the clipped mean of {summed} {what}; "
            "fewer coordinates (r, freeze_a) or more of them help"
        )
    return warnings


def _show(entry: dict[str, Any]) -> None:
    sampled = f", each of a sample with rate {entry['sampling_rate']:.3g}" if entry["sampling_rate"] < 1 else ""
    how = f"{entry['accountant']}; {entry['releases']} releases{sampled}"
    guarantee = f"epsilon {entry['epsilon']:.4g} at delta {entry['delta']:.3g} ({how})"
    typer.echo(one_line(f"{entry['unit']:11}  noise multiplier {entry['noise_multiplier']:.4g}: {guarantee}"))
    for warning in entry["warnings"]:
        typer.echo(f"             {warning}")
