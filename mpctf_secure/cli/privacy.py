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

_DEMO_COORDINATES = 2_440_000


@app.command()
def plan(
    rows: Annotated[int, typer.Option(min=1, help="Rows of the smallest site.")],
    epsilon: Annotated[float | None, typer.Option(help="The guarantee that is wanted.")] = None,
    noise_multiplier: Annotated[float | None, typer.Option(help="Or the noise, whose guarantee is wanted.")] = None,
    delta: Annotated[float | None, typer.Option(help="Below 1/rows; without it 1e-5, or a tenth of 1/rows.")] = None,
    rounds: Annotated[int, typer.Option(min=1, max=10_000, help="Of the run.")] = 4,
    batch_size: Annotated[int, typer.Option(min=1, help="Expected rows of a step of record_dpsgd.")] = 64,
    steps: Annotated[int, typer.Option(min=1, max=10_000, help="Of record_dpsgd in a round.")] = 8,
    participants: Annotated[int, typer.Option(min=2, max=100, help="How many updates are summed.")] = 4,
    coordinates: Annotated[int, typer.Option(min=1, help="Of the adapter.")] = _DEMO_COORDINATES,
    output: Annotated[Format, typer.Option("--format", help="json: for programs.")] = Format.TEXT,
) -> None:
    """Show the noise that a guarantee takes, or the guarantee of a noise, for records and for whole participants.

    Example: mpctf-secure privacy plan --rows 5000 --rounds 10 --epsilon 8
    """
    from mpctf_secure.config.privacy import LEAST_NOISE, MOST_NOISE  # noqa: PLC0415 - --help must not wait
    from mpctf_secure.privacy.accountant import Release, check_delta, noise_for  # noqa: PLC0415
    from mpctf_secure.privacy.records import sampling_rate  # noqa: PLC0415
    from mpctf_secure.privacy.spending import usual_delta  # noqa: PLC0415

    if (epsilon is None) == (noise_multiplier is None):
        raise UsageError("name --epsilon or --noise-multiplier", hint="one of the two")
    delta = usual_delta(rows) if delta is None else delta
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
        noise = noise_multiplier or noise_for("--epsilon", _checked("--epsilon", epsilon or 0.0, 0.02, 1e9), of_noise)
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
                "warnings": _warnings(
                    unit, noise, spent.is_meaningless, participants, coordinates, min(batch_size, rows)
                ),
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
    delta: Annotated[float | None, typer.Option(help="Without it that of policy.budget, or 1e-5 or less.")] = None,
    output: Annotated[Format, typer.Option("--format", help="json: for programs.")] = Format.TEXT,
) -> None:
    """Show what this site's ledger says was spent of each data set, on which runs, and what it means.

    Example: mpctf-secure privacy report site.yaml
    """
    from mpctf_secure.cli.join import load_site  # noqa: PLC0415 - as above
    from mpctf_secure.privacy.spending import spending  # noqa: PLC0415

    site = load_site(site_file)
    found = spending(site.keys, delta, site.policy.budget, site.data_set)
    if output is Format.JSON:
        typer.echo(json.dumps(found, indent=2))
        return
    if not found:
        typer.echo(f"{site.keys}: nothing was ever charged")
    for entry in found:
        _show_spending(entry)


def _show_spending(entry: dict[str, Any]) -> None:
    adjacency = {spent["unit"]: spent["adjacency"] for spent in entry["spent"]}
    versions = ", ".join(f"{name} {version}" for name, version in entry["versions"].items())
    lines = [
        *entry["statements"],
        *(f"run {run['run']}: {run['releases']} rounds, {_noise_of(run)}" for run in entry["runs"]),
        *(f"compared: {text}" for text in adjacency.values()),
        f"noise: {entry['noise']}",
        *(f"not covered: {text}" for text in entry["not_covered"]),
        f"computed with {versions}",
    ]
    typer.echo(one_line(f"data set {entry['data_set']}, {entry['rows']} rows"))
    for line in lines:
        typer.echo(one_line(f"  {line}"))


def _noise_of(run: dict[str, Any]) -> str:
    parts = []
    if run["noise_multiplier"]:
        others = f" and {run['colluders']} of the participants" if run["colluders"] else ""
        parts.append(f"noise multiplier {run['noise_multiplier']:g} on updates, against the {run['against']}{others}")
    if dpsgd := run["dpsgd"]:
        parts.append(
            f"{dpsgd['noise_multiplier']:g} on records in each of {dpsgd['steps']} steps a round, sampled at a rate "
            f"of {dpsgd['sampling_rate']:.3g}"
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
    from mpctf_secure.config.privacy import MOST_NOISE  # noqa: PLC0415 - as above
    from mpctf_secure.privacy.accountant import NO_GUARANTEE  # noqa: PLC0415

    summed, what = (participants, "updates") if unit == "participant" else (batch, "records")
    ratio = noise * math.sqrt(coordinates) / summed
    warnings = [NO_GUARANTEE] if meaningless else []
    if unit == "participant" and noise > MOST_NOISE:
        warnings.append(f"a run takes a noise multiplier of {MOST_NOISE:g} at the most; fewer rounds help")
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
