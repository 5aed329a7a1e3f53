"""What a person sees of a run: made from the event stream alone; a live view on a terminal, plain lines elsewhere."""

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pydantic import BaseModel
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Column, Table

from mpctf_secure.cli.resources import in_short
from mpctf_secure.cli.text import one_line
from mpctf_secure.config.training import Choice
from mpctf_secure.monitoring.events import Event
from mpctf_secure.rounds.contract import Proposal
from mpctf_secure.rounds.messages import PROGRESS_PARTS

_QUIET = {"run_interrupted", "round_started", "run_ended", "stage_closed"} | {
    # These are for the audit log.
    "run_opened",
    "process_started",
    "contract_closed",
    "attempt_opened",
    "sum_published",
    "round_closed",
    "step_witnessed",
    "model_exported",
}


class Screen:
    """Shows events as they come; `quiet` leaves standard output to the report."""

    def __init__(self, *, quiet: bool) -> None:
        self._console = Console(stderr=quiet, highlight=False)
        columns = (
            TextColumn("  {task.description}"),
            BarColumn(bar_width=12),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            # The only one that is cut off where the terminal is narrow.
            TextColumn("{task.fields[uses]}", markup=False, table_column=Column(ratio=1, no_wrap=True)),
        )
        silent = not self._console.is_terminal
        self._bars = Progress(*columns, console=self._console, transient=True, expand=True, disable=silent)
        self._tasks: dict[str, TaskID] = {}
        self._nodes: dict[str, dict[int, dict[str, Any]]] = {}

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._bars.stop()

    def line(self, text: str) -> None:
        """One plain line."""
        self._console.print(one_line(text), markup=False, soft_wrap=True)

    def show(self, event: Event) -> None:
        """One event."""
        if event.kind == "progress":
            self._advance(event.fields)
        elif event.kind == "resources":
            self._measure(event.fields)
        elif event.kind not in _QUIET:
            fields = {name: _listed(value) for name, value in event.fields.items()}
            if event.kind == "sum_opened":
                fields["learnt"] = "".join(
                    part.format(**fields) for name, part in _LEARNT.items() if fields[name] is not None
                )
            fields["then"] = "starts it again" if fields.get("again") else "is out until it joins again"
            self.line(_TEXTS[event.kind].format(**fields))

    def terms(self, proposal: Proposal, choices: Mapping[str, Mapping[str, float]]) -> None:
        """The effective settings: what is fixed for all, and what each site trains with."""
        for name in ("base_model", "lora", "data", "aggregation", "privacy"):
            self.line(f"  {name}: {_plain(getattr(proposal, name))}")
        if not proposal.secure:
            self.line("  SECURE AGGREGATION IS OFF: the coordinator sees each update")
        training = proposal.training
        self.line(f"  training: validation {training.validation:g}, send {training.send}")
        counts = {"quorum": proposal.quorum, "colluders": proposal.colluders, "void rounds borne": proposal.void_rounds}
        self.line(f"  {proposal.rounds} rounds, {', '.join(f'{name} {count}' for name, count in counts.items())}")
        table = Table("training", *Choice.model_fields)
        table.add_row("bounds", *map(training.shown_range, Choice.model_fields))
        for participant in proposal.participants:
            used = training.model_copy(update=choices.get(participant, {}))
            table.add_row(participant, *(f"{getattr(used, name):g}" for name in Choice.model_fields))
        self._console.print(table)

    def summary(self, content: dict[str, Any], folder: Path, *, as_json: bool) -> None:
        """The table of accuracies and where everything lies, or the report itself as JSON."""
        if as_json:
            print(json.dumps(content, indent=2))
            return
        if content["held_out_accuracy"]:
            table = Table("held-out rows answered exactly", "accuracy")
            for name, accuracy in content["held_out_accuracy"].items():
                table.add_row(name, f"{accuracy:.3f}")
            self._console.print(table)
        if content["exit"]["code"] == 0:
            self.line(f"privacy: {content['privacy']['statement']}")
            if content["privacy"]["records"]:
                self.line(f"privacy of records: {content['privacy']['records']['statement']}")
            self.line(f"adapter: {folder / 'adapter'}")
        self.line(f"report:  {folder / 'report.json'}")

    def _advance(self, fields: dict[str, Any]) -> None:
        name = fields["participant"]
        description = f"{name} round {fields['round']}"
        self._bars.update(self._task(name), description=description, total=PROGRESS_PARTS, completed=fields["done"])

    def _measure(self, fields: dict[str, Any]) -> None:
        name = fields["participant"]
        nodes = self._nodes.setdefault(name, {})
        nodes[fields["node"]] = fields
        self._bars.update(self._task(name), uses=in_short(list(nodes.values())))

    def _task(self, name: str) -> TaskID:
        if name not in self._tasks:
            self._tasks[name] = self._bars.add_task(name, total=None, uses="")
        return self._tasks[name]


def _plain(value: Any) -> str:
    if not isinstance(value, BaseModel):
        return str(value)
    fields = ((name, getattr(value, name)) for name in type(value).model_fields)
    return ", ".join(
        f"{name} ({_plain(part)})" if isinstance(part, BaseModel) else f"{name} {part}"
        for name, part in fields
        if part is not None
    )


def _listed(value: Any) -> Any:
    return ", ".join(value) if isinstance(value, (list, tuple)) else value


_TEXTS = {
    "run_started": "run {run} at {listens_at}: waiting for {participants}",
    "participant_joined": "{participant} joined",
    "contract_accepted": "all accepted contract {contract_hash:.16}…",
    "training_failed": "{participant}: its training failed: {code}, node {node}, rank {rank}; {then}",
    "waiting": "round {round}: waits {seconds:.0f} s for {participants}, who are away: a quorum is {quorum}",
    "veto": "{participant} refuses: {reason}",
    "banned": "{participant} is out of the run: {reason}",
    "dropout": "round {round}: {participant} dropped out of {stage}: {reason}",
    "refused": "refused a message of {participant}: {reason}",
    "roster_changed": "roster version {version} is in force; out of this run: {gone}",
    "sum_opened": (
        "round {round}: sum of {survivors}{learnt}; "
        "training {training_seconds:.1f} s, secure aggregation {aggregation_seconds:.1f} s"
    ),
    "sizes_added_up": "round {round}: {survivors} have {rows} rows together; shared out by rows and memory",
    "box_refused": "round {round}, attempt {attempt}: {participant} left over a box of {dealer} that it cannot open",
    "attempt_failed": "round {round}: attempt {attempt} failed: {reason}",
    "round_void": "round {round} is void and the model stays: {reason}",
    "round_finished": "round {round}: all hold state {state_hash:.16}…",
}
_LEARNT = {
    "rows": ": {rows} rows",
    "mean_loss": ", mean loss {mean_loss:.3f}",
    "validation_loss_before": ", validation loss at its start {validation_loss_before:.3f}",
    "clipped": ", {clipped} updates clipped",
}
"""Of a sum with noise none of these is known."""
