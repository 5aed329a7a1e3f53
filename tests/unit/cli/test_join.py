import pytest

from mpctf_secure.cli.join import _show
from mpctf_secure.monitoring.events import Event

ROUND = {"round": 1, "turn": 1, "rows": 50, "tokens": 900, "loss": 1.5, "seconds": 2.0}


def test_validation_loss_is_shown_where_there_is_one(capsys: pytest.CaptureFixture[str]) -> None:
    _show(Event("round_trained", {**ROUND, "held_out": None}))
    held_out = {"loss_before": 2.5, "loss_after": 1.25, "sent_step": 4}
    _show(Event("round_trained", {**ROUND, "held_out": held_out}))
    without, with_loss = capsys.readouterr().out.splitlines()
    assert without == "round 1: 50 rows, 900 tokens, loss 1.500, 2.0 s"
    assert with_loss == without + "; sends the adapter after step 4, validation loss 1.250, 2.500 at its start"
