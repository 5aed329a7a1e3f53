"""privacy.md of a run's folder: what the run promises whom, for people who were not there."""

from typing import Any

_ROWS = {
    "epsilon": "epsilon",
    "epsilon_at_most": "epsilon, at most",
    "delta": "delta",
    "unit": "what is protected",
    "adjacency": "compared with",
    "against": "against",
    "noise": "noise",
    "noise_multiplier": "noise multiplier, at least",
    "noise_multiplier_of_sums": "noise multiplier of each sum",
    "clip_norm": "clip norm",
    "releases": "releases",
    "accountant": "accountant",
}
_CHECK = (
    "Every site has its own ledger of what left it: `mpctf-secure privacy report site.yaml` there says what was spent "
    "of its data, in this run and all others, and with how much noise. It counts the least noise that a sum may have, "
    "this page the noise of those who survived."
)
_TERMS = (
    "The terms, which all sites have accepted by their hash, are in `config.yaml`; rounds and survivors in "
    "`report.json`."
)
_NO_TERMS = "Not all sites have accepted the terms."


def render(report: dict[str, Any]) -> str:
    """Markdown, from the content of report.json."""
    found, done = report["privacy"], [one for one in report["rounds"] if not one["void"]]
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    parts = [
        f"# Privacy of run {report['run_id']}",
        f"{len(report['participants'])} participants, {len(report['rounds'])} rounds, of which {len(done)} have a sum. "
        f"Ended: {report['exit']['reason']}. Contract: {report['contract_hash'] or 'none'}.",
        *_section("A participant's whole contribution", found),
        *(_section("Each record", found["records"]) if found["records"] else []),
        "## How to check",
        f"{_CHECK} {_TERMS if report['contract_hash'] else _NO_TERMS}",
        f"Computed with {versions}.",
    ]
    return "\n\n".join(parts)


def _section(title: str, found: dict[str, Any]) -> list[str]:
    rows = [f"| {said} | {_shown(found[name])} |" for name, said in _ROWS.items() if found.get(name) is not None]
    parts = [f"## {title}", f"{found['statement'][0].upper()}{found['statement'][1:]}."]
    if rows:
        parts.append("\n".join(["| | |", "|---|---|", *rows]))
    if "not_covered" in found:
        parts.append("Not covered:\n\n" + "\n".join(f"- {text}" for text in found["not_covered"]))
    return parts


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_shown, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)
