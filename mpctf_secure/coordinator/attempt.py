"""One attempt of secure aggregation: its stages, from the announcement to the masks that are left on the sum."""

from collections.abc import Callable

from mpctf_secure.config.run import Timeouts
from mpctf_secure.coordinator.gate import Answer, Gate
from mpctf_secure.coordinator.ledger import Ledger
from mpctf_secure.coordinator.patience import ForUploads
from mpctf_secure.coordinator.reception import NOTED, Reception
from mpctf_secure.coordinator.spool import Spool
from mpctf_secure.hazmat.encoding import Reader
from mpctf_secure.ids import IdentityKey
from mpctf_secure.rounds.messages import Announce
from mpctf_secure.secagg import masks
from mpctf_secure.secagg.parameters import Context
from mpctf_secure.secagg.server import Server


def announcement(context: Context) -> Announce:
    """What participants are told of an attempt."""
    return Announce(context.round, context.attempt, context.cohort, context.first_cohort)


class Stages:
    """Opens a gate for each stage, and lets `server`, the protocol's state machine, say what is right."""

    def __init__(self, server: Server, spool: Spool, reception: Reception, ledger: Ledger, timeouts: Timeouts) -> None:
        self._server = server
        self._context = server.context
        self._ctx = server.context.digest()
        self._spool = spool
        self._reception = reception
        self._ledger = ledger
        self._timeouts = timeouts

    async def aggregate(self, ready: Gate) -> tuple[Gate, tuple[masks.Mask, ...]]:
        """All stages for those who wait at `ready`; the last gate stays shut. ParticipationError for too few."""
        server, context = self._server, self._context
        advert = self._stage("advert", lambda _, message: server.accept_advert(message))
        self._announce(ready)
        await self._collect(advert, "advertise keys", context.floor)
        adverts = Answer("adverts", server.close_adverts())

        shares = self._stage("shares", lambda _, message: server.accept_shares(message))
        advert.answer(dict.fromkeys(server.expected, adverts))
        await self._collect(shares, "share keys", context.floor)
        deliveries = {member: Answer("delivery", body) for member, body in server.close_shares().items()}

        uploads = self._stage("upload", self._keep)
        complaints = self._stage("complaint", lambda sender, message: self._complain(uploads, sender, message))
        shares.answer(deliveries)
        await self._collect_uploads(uploads)
        complaints.answer({}, otherwise=NOTED)
        survivors = Answer("survivors", server.close_uploads())

        consistency = self._stage("consistency", lambda _, message: server.accept_consistency(message))
        uploads.answer(dict.fromkeys(server.survivors, survivors))
        await self._collect(consistency, "consistency check", context.threshold)
        signatures = Answer("signatures", server.close_consistency())

        release = self._stage("release", lambda _, message: server.accept_release(message))
        consistency.answer(dict.fromkeys(server.survivors, signatures))
        await self._collect(release, "unmask", context.threshold)
        return release, server.close_releases()

    def _stage(self, label: str, accept: Callable[[IdentityKey, bytes], None]) -> Gate:
        return self._reception.open(label, self._ctx, self._context.round, self._server.expected, accept)

    def _announce(self, ready: Gate) -> None:
        """Attempt 1 is the answer to `ready`; later ones are news of the round."""
        context, announce = self._context, announcement(self._context)
        if context.attempt == 1:
            ready.answer(dict.fromkeys(context.cohort, Answer("announce", announce.encode())))
        else:
            self._reception.archive.tell(context.round, announce)

    def _keep(self, sender: IdentityKey, message: bytes) -> None:
        with Reader(message) as reader:
            trailer, digest = reader.bytes(), reader.bytes()
        self._server.accept_upload(trailer, digest)
        self._spool.keep(sender)

    def _complain(self, uploads: Gate, sender: IdentityKey, message: bytes) -> None:
        dealer, proved = self._server.accept_complaint(message)
        names = {"participant": self._ledger.name(sender), "dealer": self._ledger.name(dealer)}
        self._ledger.tell("box_refused", round=self._context.round, attempt=self._context.attempt, **names)
        uploads.drop(sender, f"refused the box of {names['dealer']}")
        if proved:
            self._reception.ban(dealer, "more participants than may collude refused its boxes")

    async def _collect(self, gate: Gate, stage: str, least: int) -> None:
        await gate.collect(self._timeouts.stage, least)
        self._ledger.note_stage(gate, stage)

    async def _collect_uploads(self, gate: Gate) -> None:
        times, floor = self._timeouts, self._context.floor
        patience = ForUploads(floor, times.stage, self._spool.still)
        await gate.collect(times.training, floor, lambda: patience.is_over(gate))
        self._ledger.note_stage(gate, "masked input")
