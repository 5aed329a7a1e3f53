"""One participant in one run: what it loads, what it checks before it agrees, and its end."""

from collections.abc import Collection
from pathlib import Path

from mpctf_secure.config.site import SiteConfig
from mpctf_secure.errors import MpctfError
from mpctf_secure.identity import keystore
from mpctf_secure.identity.keys import Keys
from mpctf_secure.identity.roster import Roster
from mpctf_secure.ids import IdentityKey
from mpctf_secure.participant.link import Link
from mpctf_secure.participant.policy import check_contract, check_proposal
from mpctf_secure.participant.rounds import Participant, Report
from mpctf_secure.rounds.contract import Contract, Proposal
from mpctf_secure.rounds.messages import Facts
from mpctf_secure.training.data import load_rows
from mpctf_secure.training.launch import Job, JobSpec
from mpctf_secure.training.model_hash import hash_model
from mpctf_secure.transport.client import Channel
from mpctf_secure.transport.tls import OwnTls, utc_now


class Members:
    """Who of a contract may still be in a cohort: whom the newest roster installed here has under the same identity."""

    def __init__(self, keys: Path, roster: Roster, names: Collection[str]) -> None:
        self._keys = keys
        self._first = {member for member in roster.participants if member.name in names}
        self._version, self._current = roster.version, roster

    def __call__(self) -> set[IdentityKey]:
        """Identities, of this moment."""
        if keystore.latest_version(self._keys) > self._version:
            self._current = keystore.load_roster(self._keys)
            self._version = self._current.version
        return {member.identity for member in self._first & set(self._current.participants)}


def join(site: SiteConfig, keys: Keys, report: Report) -> None:
    """Take part in one run; returns when it is over. Errors name culprits by their names in the roster."""
    roster = keystore.load_roster(site.keys)
    roster.check_unexpired(utc_now())
    try:
        _join(site, keys, roster, report)
    except MpctfError as error:
        error.culprits = tuple(roster.named(error.culprits))
        raise


def _join(site: SiteConfig, keys: Keys, roster: Roster, report: Report) -> None:
    me = roster.by_identity(keys.identity.public)
    name = me.name
    load_rows(site.data)  # a bad row is found before anybody waits for us
    base_model_hash = hash_model(site.model)
    site.work.mkdir(parents=True, exist_ok=True)
    channel = Channel(site.coordinator, roster, OwnTls(keys.identity, me))
    try:
        link = Link(channel, keys.identity, roster.coordinator)
        proposal = Proposal.decode(link.ask("hello", roster.hash, b"", "proposal"))
        check_proposal(proposal, site.policy, roster, name)
        report(f"{name}: joins run {proposal.run_id}")
        job = Job(JobSpec.of(site.model, site.data, proposal.lora, proposal.training), site.work)
        report(f"{name}: {job.rows} rows, {job.truncated} of them truncated; on {job.hardware_text}")
        try:
            facts = Facts.of(base_model_hash, job.schema)
            contract = Contract.decode(link.ask("facts", roster.hash, facts.encode(), "contract"))
            check_contract(contract, proposal, facts)
            link.ask("accept", contract.run_context, b"", "go")
            members = Members(site.keys, roster, contract.participants)
            Participant(name, link, keys.identity, contract, job, members, site, report).run()
        finally:
            job.close()
    finally:
        channel.close()
