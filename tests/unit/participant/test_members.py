import datetime
from pathlib import Path

from mpctf_secure.identity import ceremony, enrollment, keystore
from mpctf_secure.ids import ParticipantName
from mpctf_secure.participant.members import Members

NOW = datetime.datetime(2030, 1, 1, tzinfo=datetime.UTC)
NAMES = ("bank-b", "coordinator", "hospital-a", "insurer-d", "telecom-c")


def test_site_with_a_newer_roster_counts_a_revoked_member_no_longer(tmp_path: Path) -> None:
    """A coordinator that goes on with it would otherwise keep it in everybody's sums."""
    folders = {ParticipantName(name): tmp_path / name for name in NAMES}
    roster = ceremony.hold(folders, ParticipantName("coordinator"), NOW, b"x")
    members = Members(tmp_path / "bank-b", roster, ["bank-b", "hospital-a", "telecom-c"])
    identities = {str(member.name): member.identity for member in roster.members}
    everyone = {identities[name] for name in ("bank-b", "hospital-a", "telecom-c")}
    assert (members.left(), members.gone()) == (everyone, [])
    installed = keystore.installed(tmp_path / "bank-b")
    assert installed
    body = enrollment.next_roster(installed.roster, [], ["telecom-c"])
    voters = [keystore.unseal(tmp_path / name, b"x") for name in ("bank-b", "hospital-a", "insurer-d")]
    signed = enrollment.collect(body, [enrollment.vote(body, keys, []) for keys in voters])
    keystore.install(tmp_path / "bank-b", [signed])
    assert (members.left(), members.gone()) == (everyone - {identities["telecom-c"]}, ["telecom-c"])
    assert members.newest_roster().version == 2
    assert members.identities == everyone
