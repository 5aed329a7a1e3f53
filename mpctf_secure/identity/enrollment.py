"""The rules of the ceremony, without I/O: CEREMONY.md sections 3 and 4.

Rules of this file:
- Whatever comes in was written by somebody who may lie; the bytes were decoded, nothing else is known of them.
- `verify_*` returns what it established or raises and names the culprit, a member's name.
- Equal inputs make equal rosters, byte for byte, so that people can compare them by their hash.
"""

import base64
import datetime
import itertools
from collections.abc import Iterable, Mapping, Sequence

from mnemonic import Mnemonic

from mpctf_secure.errors import SecurityError, UsageError, blaming
from mpctf_secure.hazmat import signature
from mpctf_secure.hazmat.encoding import enc
from mpctf_secure.hazmat.kdf import sha256
from mpctf_secure.identity import certificate
from mpctf_secure.identity.certificate import Role
from mpctf_secure.identity.documents import Request, RosterBody, SignedRoster, Vote, from_time, to_time
from mpctf_secure.identity.keys import Keys
from mpctf_secure.ids import IdentityKey

Heard = Mapping[str, frozenset[str]]
"""Identity (hex) of who signed a roster → names of those whose words it heard."""

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
        authority=base64.b64encode(certificate.authority(keys.identity, created)).decode(),
        created=to_time(created),
        expires=to_time(expires),
        nonce=nonce.hex(),
        package=package.hex(),
        signatures={},
    )
    signatures = {use: getattr(keys, use).sign(unsigned.to_sign()).hex() for use in _KEY_NAMES}
    return unsigned.model_copy(update={"signatures": signatures})


def verify_request(request: Request) -> None:
    """1. keys are canonical, none of low order; 2. each signed; 3. the authority is the identity's; 4. dates fit."""
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
        certificate.check_authority(base64.b64decode(request.authority), IdentityKey(keys["identity"]), created)


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


def same_words(typed: str, expected: Sequence[str]) -> bool:
    """Whether somebody typed these words, each at least to its fourth letter."""
    given = typed.lower().replace(",", " ").split()
    return len(given) == len(expected) and all(
        word.startswith(start) and len(start) >= min(_PREFIX, len(word))
        for start, word in zip(given, expected, strict=True)
    )


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
        raise SecurityError("roster: it needs one coordinator and at least two participants")
    owners: dict[str, str] = {}
    for member in roster.members:
        verify_request(member)
        for key in (member.identity, member.box, member.log):
            if key in owners:
                raise SecurityError(
                    f"roster: {member.name} has a key of {owners[key]}", culprits=[owners[key], member.name]
                )
            owners[key] = member.name


def verify_history(history: Sequence[SignedRoster], me: str) -> None:
    """A site's rosters from its first one on: each follows the one before, and I heard the others when I came in.

    1. version 1 is signed by all, each of whom heard all the others. 2. A site that came later also has the roster
    before its first one; its own signature has heard all participants of that one but one.
    The caller still owes: expiry.
    """
    first = history[0].roster
    if first.version == 1:
        verify_first(history[0])
    elif len(history) == 1 or _member(first, me):
        raise SecurityError(
            f"roster: version {first.version} follows one that is not here",
            hint=f"name the signed roster version {first.version - 1} too",
        )
    for before, after in itertools.pairwise(history):
        verify_next(before.roster, after)
        joined = _member(after.roster, me)
        if joined and not _member(before.roster, me):
            heard = _verify_votes(after, before.roster).get(joined.identity, frozenset())
            _check_ears(len(heard & _participants(before.roster).keys()), before.roster, me, f"are heard by {me}")


def _member(roster: RosterBody, name: str) -> Request | None:
    return next((member for member in roster.members if member.name == name), None)


def _participants(roster: RosterBody) -> dict[str, Request]:
    return {member.name: member for member in roster.members if member.role == "participant"}


def verify_first(signed: SignedRoster) -> None:
    """Version 1: every member has signed, and has heard all the others."""
    roster = signed.roster
    verify_form(roster)
    if roster.version != 1 or roster.previous is not None:
        raise SecurityError("roster: not a first one")
    heard = _verify_votes(signed, None)
    everybody = {member.name for member in roster.members}
    for member in roster.members:
        if member.identity not in heard:
            raise SecurityError(
                f"roster: {member.name} has not signed", culprits=[member.name], hint="get that signature"
            )
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


def identity_of(name: str, roster: RosterBody, previous: RosterBody | None) -> bytes:
    """The identity under which a member signs a roster: its new one, or its last one if it leaves."""
    for members in (roster.members, previous.members if previous else ()):
        for member in members:
            if member.name == name:
                return bytes.fromhex(member.identity)
    raise UsageError(f"{name} is neither in this roster nor in the one before", hint="mpctf-secure enroll show")


def verify_next(previous: RosterBody, signed: SignedRoster) -> None:
    """A roster that follows `previous`; the caller still owes: expiry, and that `previous` is the installed one."""
    roster = signed.roster
    verify_follows(previous, roster)
    heard = _verify_votes(signed, previous)
    old, new = _participants(previous), _participants(roster)
    signers = {name for name, member in old.items() if member.identity in heard}
    _check_quorum(len(signers), len(old), f"participants of version {previous.version}")
    _check_quorum(sum(m.identity in heard for m in new.values()), len(new), f"participants of version {roster.version}")
    for name in newcomers(previous, roster):
        if identity_of(name, roster, None).hex() not in heard:
            raise SecurityError(f"roster: {name} is new and has not signed", culprits=[name])
        ears = {signer for signer in signers - {name} if name in heard[old[signer].identity]}
        _check_ears(len(ears), previous, name, f"have heard {name}")


def _check_ears(heard: int, previous: RosterBody, name: str, deed: str) -> None:
    """All participants but one, and two at least where there are two others; nobody counts for itself."""
    others = len(_participants(previous).keys() - {name})
    needed = min(others, max(2, len(_participants(previous)) - 1))
    if heard < needed:
        raise SecurityError(
            f"roster: {heard} participants of version {previous.version} {deed}, {needed} are needed", culprits=[name]
        )


def _check_quorum(signed: int, members: int, whose: str) -> None:
    needed = default_quorum(members)
    if signed < needed:
        raise SecurityError(f"roster: {signed} {whose} have signed, {needed} are needed")


def default_quorum(members: int) -> int:
    """More than half of the participants and of those who may collude, c = max(1, ⌊(n − 1)/3⌋), none of a pair."""
    colluders = 0 if members == 2 else max(1, (members - 1) // 3)
    return (members + colluders) // 2 + 1


def _verify_votes(signed: SignedRoster, previous: RosterBody | None) -> Heard:
    """Signatures by identity, of members of this roster or of the one before."""
    names = {m.identity: m.name for one in (previous, signed.roster) if one for m in one.members}
    signers = [one.signer for one in signed.signatures]
    if signers != sorted(set(signers)):
        raise SecurityError("roster: signatures are not ascending by signer")
    for one in signed.signatures:
        if one.signer not in names:
            raise SecurityError(f"roster: signature of a stranger, {one.signer[:16]}…")
        with blaming(names[one.signer], f"roster: signature of {names[one.signer]}"):
            if bytes.fromhex(one.roster) != signed.roster.hash:
                raise SecurityError("it is of another roster")
            if list(one.heard) != sorted(set(one.heard)):
                raise SecurityError("names are not ascending and unique")
            signature.verify(bytes.fromhex(one.signer), one.to_sign(), bytes.fromhex(one.signature))
    return {one.signer: frozenset(one.heard) for one in signed.signatures}
