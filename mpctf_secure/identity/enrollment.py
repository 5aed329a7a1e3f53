"""The rules of the ceremony, without I/O: CEREMONY.md sections 3 and 4.

Rules of this file:
- Whatever comes in was written by somebody who may lie; the bytes were decoded, nothing else is known of them.
- `verify_*` returns what it established or raises and names the culprit, a member's name.
- Equal inputs make equal rosters, byte for byte, so that people can compare them by their hash.
"""

import datetime
import itertools
from collections.abc import Collection, Iterable, Mapping, Sequence

from mnemonic import Mnemonic

from mpctf_secure.errors import SecurityError, UsageError, blaming
from mpctf_secure.hazmat import signature
from mpctf_secure.hazmat.encoding import enc
from mpctf_secure.hazmat.kdf import sha256
from mpctf_secure.identity.certificate import Role
from mpctf_secure.identity.documents import Request, RosterBody, SignedRoster, Vote, from_time, to_time
from mpctf_secure.identity.keys import Keys
from mpctf_secure.quorum import default_colluders, default_quorum

Heard = Mapping[str, frozenset[str]]
"""Identity (hex) of who signed a roster → names of those whose words it heard."""

WORDS = 24
MOST_DAYS = 3650
_KEY_NAMES = ("identity", "box", "log")
_PREFIX = 4  # BIP39: the first four letters tell all words apart


def make_request(
    keys: Keys,
    name: str,
    role: Role,
    created: datetime.datetime,
    expires: datetime.datetime,
    nonce: bytes,
    package: bytes,
) -> Request:
    """A request signed by all keys in it."""
    created = created.replace(microsecond=0)
    unsigned = Request(
        name=name,
        role=role,
        identity=keys.identity.public.hex(),
        box=keys.box.public.hex(),
        log=keys.log.public.hex(),
        created=to_time(created),
        expires=to_time(expires),
        nonce=nonce.hex(),
        package=package.hex(),
        signatures={},
    )
    signatures = {use: getattr(keys, use).sign(unsigned.to_sign()).hex() for use in _KEY_NAMES}
    return unsigned.model_copy(update={"signatures": signatures})


def verify_request(request: Request) -> None:
    """1. keys are canonical, none of low order; 2. each signed; 3. dates fit."""
    with blaming(request.name, f"request of {request.name}"):
        keys = {use: bytes.fromhex(getattr(request, use)) for use in _KEY_NAMES}
        if request.signatures.keys() != keys.keys():
            raise SecurityError(f"signed by {sorted(request.signatures)} instead of {sorted(keys)}")
        for use, key in keys.items():
            with blaming(request.name, f"{use} key"):
                signature.check_public_key(key)
                signature.verify(key, request.to_sign(), bytes.fromhex(request.signatures[use]))
        created = from_time(request.created)
        if not created < from_time(request.expires) <= created + datetime.timedelta(days=MOST_DAYS):
            raise SecurityError(f"its end is not within {MOST_DAYS} days of its beginning")


def next_roster(previous: RosterBody | None, requests: Iterable[Request], removed: Iterable[str] = ()) -> RosterBody:
    """The roster after `previous` with these requests and without these members; UsageError for what cannot be."""
    members = {member.name: member for member in previous.members} if previous else {}
    for name in removed:
        if members.pop(name, None) is None:
            raise UsageError(f"{name} is not in the roster", hint="mpctf-secure enroll show")
    asked: dict[str, Request] = {}
    for request in requests:
        verify_request(request)
        if asked.setdefault(request.name, request) != request:
            raise UsageError(f"two requests of {request.name}", hint="ask which one is right, and leave the other out")
    members |= asked
    if not members:
        raise UsageError("a roster needs members", hint="name the request files")
    ordered = tuple(members[name] for name in sorted(members))
    version, before, expires = _derived(previous, ordered)
    roster = RosterBody(version=version, previous=before, expires=expires, members=ordered)
    if previous:
        verify_follows(previous, roster)
    else:
        verify_form(roster)
    return roster


def _derived(previous: RosterBody | None, members: Sequence[Request]) -> tuple[int, str | None, str]:
    version, before = (previous.version + 1, previous.hash.hex()) if previous else (1, None)
    return version, before, min(member.expires for member in members)


def words(roster: RosterBody, speaker: str) -> tuple[str, ...]:
    """The 24 BIP39 words that one member reads to the others.

    256 bits: with 12 words a coordinator could search 2⁶⁶ requests for two rosters with the same ones. Every speaker
    has other words, so nobody can repeat what it was just told, nor an operator copy them from the own screen.
    """
    identity = next(bytes.fromhex(member.identity) for member in roster.members if member.name == speaker)
    return tuple(Mnemonic("english").to_mnemonic(sha256(enc("mpctf-secure/words/v1", roster.hash, identity))).split())


def find_typing_error(typed: str) -> str | None:
    """What nobody can have read out: another number of words, or one that is in no list. None for 24 words."""
    known = {word[:_PREFIX] for word in Mnemonic("english").wordlist}
    given = _split(typed)
    if wrong := [
        f"word {number} is none of the list: {word}"
        for number, word in enumerate(given, 1)
        if word[:_PREFIX] not in known
    ]:
        return wrong[0]
    return None if len(given) == WORDS else f"{len(given)} words instead of {WORDS}"


def same_words(typed: str, expected: Sequence[str]) -> bool:
    """Whether somebody typed these words, each at least to its fourth letter."""
    return [word[:_PREFIX] for word in _split(typed)] == [word[:_PREFIX] for word in expected]


def _split(typed: str) -> list[str]:
    return typed.lower().replace(",", " ").split()


def newcomers(previous: RosterBody | None, roster: RosterBody) -> list[str]:
    """Whose words must be heard: a name, role or key is other than in `previous`."""
    known = {_who(member) for member in previous.members} if previous else set()
    return [member.name for member in roster.members if _who(member) not in known]


def _who(member: Request) -> tuple[str, ...]:
    return (member.name, member.role, member.identity, member.box, member.log)


def vote(roster: RosterBody, keys: Keys, heard: Iterable[str]) -> Vote:
    """This member's signature of the roster."""
    signer = keys.identity.public.hex()
    unsigned = Vote(roster=roster.hash.hex(), signer=signer, heard=tuple(sorted(heard)), signature="0" * 128)
    return unsigned.model_copy(update={"signature": keys.identity.sign(unsigned.to_sign()).hex()})


def collect(roster: RosterBody, votes: Iterable[Vote]) -> SignedRoster:
    """A roster with signatures, in their order; not verified."""
    return SignedRoster(roster=roster, signatures=tuple(sorted(votes, key=lambda one: one.signer)))


def verify_form(roster: RosterBody) -> None:
    """1. names ascending and unique; 2. one coordinator, two participants; 3. every request good; 4. no key twice."""
    names = [member.name for member in roster.members]
    if names != sorted(set(names)):
        raise SecurityError("roster: names are not ascending and unique")
    roles = [member.role for member in roster.members]
    if roles.count("coordinator") != 1 or len(roles) < 3:
        raise SecurityError(
            "roster: it needs one coordinator and at least two participants",
            hint="name the request files of all; who joins a roster that exists names its signed file too",
        )
    owners: dict[str, str] = {}
    for member in roster.members:
        verify_request(member)
        for key in (member.identity, member.box, member.log):
            if key in owners:
                raise SecurityError(
                    f"roster: {member.name} has a key of {owners[key]}", culprits=[owners[key], member.name]
                )
            owners[key] = member.name


def verify_history(history: Sequence[SignedRoster]) -> None:
    """A site's rosters from its first one on: each follows the one before, and version 1 is signed by all.

    The caller still owes: `verify_arrival` when the first ones are installed, and expiry.
    """
    if history[0].roster.version == 1:
        verify_first(history[0])
    for before, after in itertools.pairwise(history):
        verify_next(before.roster, after)


def verify_arrival(history: Sequence[SignedRoster], held: Collection[str]) -> None:
    """The first rosters of a site that holds the keys of these identities (hex): has it heard whom it now trusts?

    1. It is a member of the last one. 2. It came in with version 1, which `verify_history` checks, or it brings the
    roster before its first one and its own signature has heard that one's participants but one. Its keys count and not
    its name: else a roster before its first one could hold an impostor of that name, and the site would hear nobody.
    """
    mine = [next((m for m in signed.roster.members if m.identity in held), None) for signed in history]
    if mine[-1] is None:
        raise UsageError(
            f"roster: you are not in version {history[-1].roster.version}",
            hint="compare it with your request, sign the next roster, and verify both in one command",
        )
    came, me = next((number, member) for number, member in enumerate(mine) if member)
    first = history[came]
    if came:
        before = history[came - 1].roster
        heard = verify_votes(first, before).get(me.identity, frozenset())
        _check_ears(len(heard & _participants(before).keys()), before, me.name, f"are heard by {me.name}")
    elif first.roster.version != 1:
        raise SecurityError(
            f"roster: version {first.roster.version} follows one that is not here",
            hint=f"name the signed roster version {first.roster.version - 1} too",
        )


def _participants(roster: RosterBody) -> dict[str, Request]:
    return {member.name: member for member in roster.members if member.role == "participant"}


def verify_first(signed: SignedRoster) -> None:
    """Version 1: every member has signed, and has heard all the others."""
    roster = signed.roster
    verify_form(roster)
    if roster.version != 1 or roster.previous is not None:
        raise SecurityError("roster: not a first one")
    heard = verify_votes(signed, None)
    everybody = {member.name for member in roster.members}
    if silent := [member.name for member in roster.members if member.identity not in heard]:
        who = f"{', '.join(silent)} {'has' if len(silent) == 1 else 'have'}"
        raise SecurityError(
            f"roster: {who} not signed", culprits=silent, hint="name all signature files, also your own"
        )
    for member in roster.members:
        if missing := sorted(everybody - heard[member.identity] - {member.name}):
            raise SecurityError(f"roster: {member.name} has not heard {', '.join(missing)}", culprits=[member.name])


def verify_follows(previous: RosterBody, roster: RosterBody) -> None:
    """A well-formed roster that may come after `previous`: no way back, no gap, nothing that does not derive."""
    if roster.version <= previous.version:
        raise SecurityError(f"roster: version {roster.version} after version {previous.version} is a way back")
    if roster.version > previous.version + 1:
        raise SecurityError(
            f"roster: version {roster.version} leaves a gap after version {previous.version}",
            hint=f"mpctf-secure enroll verify the signed version {previous.version + 1} first",
        )
    verify_form(roster)
    if (roster.version, roster.previous, roster.expires) != _derived(previous, roster.members):
        raise SecurityError(f"roster: it does not follow the version {previous.version} that is installed here")
    used = {getattr(m, use): (m.name, use) for m in previous.members for use in _KEY_NAMES}
    before = {member.identity: member.created for member in previous.members}
    for member in roster.members:
        # Else a member could become two, or a key that was given up come back under another name.
        if any(used.get(getattr(member, use), (member.name, use)) != (member.name, use) for use in _KEY_NAMES):
            raise SecurityError(f"roster: {member.name} has a key of another member or use", culprits=[member.name])
        if member.created < before.get(member.identity, ""):
            raise SecurityError(f"roster: an older request of {member.name} is back", culprits=[member.name])


def signing_identities(name: str, roster: RosterBody, previous: RosterBody | None) -> list[bytes]:
    """The identities under which a member signs a roster: its new one, its old one, or both where it rotates.

    Both, since the quorum of the roster before counts old keys, and a pair or three need every one of them.
    """
    found = {
        m.identity: bytes.fromhex(m.identity)
        for known in (roster, previous)
        if known
        for m in known.members
        if m.name == name
    }
    if not found:
        raise UsageError(f"{name} is neither in this roster nor in the one before", hint="mpctf-secure enroll show")
    return list(found.values())


def needs_leaver(previous: RosterBody, name: str) -> str | None:
    """What to say where a member must sign its own removal: of two or three participants a quorum is all."""
    old = _participants(previous)
    if name in old and len(old) - 1 < default_quorum(len(old), default_colluders(len(old))):
        return f"of {len(old)} participants all must sign, {name} too; without it, begin again in new folders"
    return None


def verify_next(previous: RosterBody, signed: SignedRoster) -> None:
    """A roster that follows `previous`; the caller still owes: expiry, and that `previous` is the installed one."""
    roster = signed.roster
    verify_follows(previous, roster)
    heard = verify_votes(signed, previous)
    old, new = _participants(previous), _participants(roster)
    signers = {name for name, member in old.items() if member.identity in heard}
    _check_quorum(len(signers), len(old), f"participants of version {previous.version}")
    _check_quorum(sum(m.identity in heard for m in new.values()), len(new), f"participants of version {roster.version}")
    identities = {member.name: member.identity for member in roster.members}
    for name in newcomers(previous, roster):
        if identities[name] not in heard:
            raise SecurityError(f"roster: {name} is new and has not signed", culprits=[name])
        ears = {signer for signer in signers - {name} if name in heard[old[signer].identity]}
        _check_ears(len(ears), previous, name, f"have heard {name}")


def _check_ears(heard: int, previous: RosterBody, name: str, deed: str) -> None:
    """All participants but one, and two at least where there are two others; nobody counts for itself."""
    others = len(_participants(previous).keys() - {name})
    needed = min(others, max(2, len(_participants(previous)) - 1))
    if heard < needed:
        raise SecurityError(
            f"roster: {heard} participants of version {previous.version} {deed}, {needed} are needed",
            hint="those who have not compare words with each other, and sign again",
            culprits=[name],
        )


def _check_quorum(signed: int, members: int, whose: str) -> None:
    needed = default_quorum(members, default_colluders(members))
    if signed < needed:
        raise SecurityError(
            f"roster: {signed} {whose} have signed, {needed} are needed", hint="name all signature files, also your own"
        )


def verify_votes(signed: SignedRoster, previous: RosterBody | None) -> Heard:
    """Signatures by identity, ascending, each of a member of this roster or of the one before."""
    signers = [one.signer for one in signed.signatures]
    if signers != sorted(set(signers)):
        raise SecurityError("roster: signatures are not ascending by signer")
    roster_hash = signed.roster.hash
    for one in signed.signatures:
        verify_vote(one, roster_hash, signed.roster, previous)
    return {one.signer: frozenset(one.heard) for one in signed.signatures}


def verify_vote(one: Vote, roster_hash: bytes, roster: RosterBody, previous: RosterBody | None) -> None:
    """1. A member signed it, 2. for this roster, 3. and names members whom it heard; `roster_hash` is `roster`'s."""
    names = {m.identity: m.name for known in (previous, roster) if known for m in known.members}
    if one.signer not in names:
        raise SecurityError(f"roster: signature of a stranger, {one.signer[:16]}…")
    with blaming(names[one.signer], f"roster: signature of {names[one.signer]}"):
        if bytes.fromhex(one.roster) != roster_hash:
            raise SecurityError("it is of another roster")
        if list(one.heard) != sorted(set(one.heard)) or not set(one.heard) <= set(names.values()):
            raise SecurityError("those whom it heard are not members, ascending and unique")
        signature.verify(bytes.fromhex(one.signer), one.to_sign(), bytes.fromhex(one.signature))
