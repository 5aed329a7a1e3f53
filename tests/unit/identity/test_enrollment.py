"""The rules of CEREMONY.md section 4, each with somebody who breaks it."""

import datetime
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography import x509
from hypothesis import given
from hypothesis import strategies as st
from nacl.bindings import crypto_core_ed25519_add

from mpctf_secure.errors import DecodeError, SecurityError, UsageError
from mpctf_secure.hazmat.kdf import sha256
from mpctf_secure.identity import certificate, documents, enrollment
from mpctf_secure.identity.documents import Request, RosterBody, SignedRoster, Vote
from mpctf_secure.identity.keys import Keys

NOW = datetime.datetime(2030, 1, 1, tzinfo=datetime.UTC)
YEAR = datetime.timedelta(days=365)
SITES = ("bank-b", "hospital-a", "insurer-d", "telecom-c")
EVERYBODY = tuple(sorted((*SITES, "registry-x")))
SMALL_ORDER = (b"\1" + bytes(31)).hex()
# A point of order 8 (libsodium's list of small-order points) added to one of the prime-order group.
_ORDER_8 = bytes.fromhex("26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05")
MIXED_ORDER = crypto_core_ed25519_add(_ORDER_8, Keys.of(bytes(96)).box.public).hex()


def keys_of(name: str, generation: int = 0) -> Keys:
    return Keys.of(b"".join(sha256(f"{name}/{generation}/{use}".encode()) for use in range(3)))


def request(name: str, generation: int = 0, *, day: int = 0, role: str | None = None) -> Request:
    created = NOW + datetime.timedelta(days=day)
    role = role or ("coordinator" if name == "registry-x" else "participant")
    return enrollment.make_request(
        keys_of(name, generation),
        name,
        role,
        created,
        created + YEAR,
        bytes(32),
        bytes(32),  # type: ignore[arg-type]
    )


def votes(roster: RosterBody, signers: Iterable[str], heard: Iterable[str] = (), *, generation: int = 0) -> list[Vote]:
    return [enrollment.vote(roster, keys_of(name, generation), set(heard) - {name}) for name in signers]


def signed(roster: RosterBody, signers: Iterable[str], heard: Iterable[str] = ()) -> SignedRoster:
    return enrollment.collect(roster, votes(roster, signers, heard))


FIRST = enrollment.next_roster(None, [request(name) for name in EVERYBODY])
NEWCOMER = request("utility-e", day=1)
WITH_NEWCOMER = enrollment.next_roster(FIRST, [NEWCOMER])
WITHOUT_BANK = enrollment.next_roster(FIRST, [], ["bank-b"])
ROTATED = enrollment.next_roster(FIRST, [request("bank-b", 1, day=1)])
OTHERS = ["hospital-a", "insurer-d", "telecom-c"]


def resigned(changed: dict, keys: Keys | None = None) -> Request:
    """A request after a change, signed again by the keys that are given: what a forger can do."""
    unsigned = Request.model_validate({**changed, "signatures": {}}, strict=False)
    keys = keys or keys_of(unsigned.name)
    signatures = {use: getattr(keys, use).sign(unsigned.to_sign()).hex() for use in ("identity", "box", "log")}
    return unsigned.model_copy(update={"signatures": signatures})


def twice(name: str) -> Request:
    """A request with one key as box and log key, signed as it should be."""
    keys = replace(keys_of(name), log=keys_of(name).box)
    return resigned({**content(name), "log": keys.log.public.hex()}, keys)


def content(name: str = "bank-b") -> dict:
    return json.loads(request(name).encode())


BAD_REQUESTS: dict[str, tuple[Callable[[], Request], str]] = {
    "somebody else's box key": (
        lambda: resigned({**content(), "box": keys_of("telecom-c").box.public.hex()}), "box key: signature"),
    "a box key put in by the post": (
        lambda: Request(**{**content(), "box": keys_of("attacker").box.public.hex()}), "signature is not valid"),
    "an identity key of low order": (
        lambda: resigned({**content(), "identity": SMALL_ORDER}), "identity key: Ed25519 public key is not"),
    "a box key of low order": (
        lambda: resigned({**content(), "box": SMALL_ORDER}), "box key: Ed25519 public key is not"),
    "a box key with a part of low order": (
        lambda: resigned({**content(), "box": MIXED_ORDER}), "box key: Ed25519 public key is not"),
    "one key for two purposes": (
        lambda: resigned({**content(), "log": content()["identity"]}), "log key: signature"),
    "another name after signing": (lambda: Request(**{**content(), "name": "hospital-a"}), "signature is not valid"),
    "another role after signing": (lambda: Request(**{**content(), "role": "coordinator"}), "signature is not valid"),
    "an end before its beginning": (
        lambda: resigned({**content(), "expires": "2029-01-01T00:00:00Z"}), "its end is not within"),
    "a date that is none": (lambda: resigned({**content(), "expires": "2030-13-41T00:00:00Z"}), "is no date"),
    "a date before all calendars": (
        lambda: resigned({**content(), "created": "0001-01-01T00:00:00Z"}), "out of the years"),
    "a date after all calendars": (
        lambda: resigned({**content(), "created": "9999-12-30T00:00:00Z", "expires": "9999-12-31T00:00:00Z"}),
        "out of the years"),
    "no signature of the log key": (
        lambda: Request(
            **{**content(), "signatures": {k: v for k, v in content()["signatures"].items() if k != "log"}}
        ), r"signed by \['box', 'identity'\]"),
    "an end in a hundred years": (
        lambda: resigned({**content(), "expires": "2130-01-01T00:00:00Z"}), "its end is not within"),
}  # fmt: skip


@pytest.mark.parametrize(("forged", "why"), BAD_REQUESTS.values(), ids=BAD_REQUESTS.keys())
def test_bad_request_is_refused_and_its_owner_named(forged: Callable[[], Request], why: str) -> None:
    enrollment.verify_request(request("bank-b"))
    with pytest.raises(SecurityError, match=why) as caught:
        enrollment.verify_request(forged())
    assert caught.value.culprits[0] in {"bank-b", "hospital-a"}


def test_all_who_apply_the_same_requests_make_the_same_roster() -> None:
    again = enrollment.next_roster(None, [request(name) for name in reversed(EVERYBODY)])
    assert again.encode() == FIRST.encode()
    assert enrollment.words(again, "bank-b") == enrollment.words(FIRST, "bank-b")
    assert FIRST.expires == documents.to_time(NOW + YEAR)


def test_any_change_of_a_request_changes_the_words() -> None:
    other = enrollment.next_roster(None, [*(request(n) for n in EVERYBODY[1:]), request("bank-b", 1)])
    for name in EVERYBODY:
        assert not set(enrollment.words(other, name)) >= set(enrollment.words(FIRST, name))
    assert len(enrollment.words(FIRST, "bank-b")) == 24


def test_everybody_reads_other_words_so_that_none_can_be_repeated() -> None:
    """An impostor who lets the other read first, or an operator who copies the own screen, gets no further."""
    assert len({enrollment.words(FIRST, name) for name in EVERYBODY}) == len(EVERYBODY)


def test_words_count_from_their_fourth_letter_and_in_their_order() -> None:
    words = enrollment.words(FIRST, "bank-b")
    assert enrollment.same_words(", ".join(word[:4].upper() for word in words), words)
    assert not enrollment.same_words(" ".join(word[:3] for word in words), words)
    assert not enrollment.same_words(" ".join(reversed(words)), words)
    assert not enrollment.same_words(" ".join(words[:-1]), words)
    assert not enrollment.same_words("", words)


ALL_FIRST = signed(FIRST, EVERYBODY, EVERYBODY)


def test_first_roster_needs_everybody_who_heard_everybody() -> None:
    enrollment.verify_first(ALL_FIRST)
    for missing in EVERYBODY:
        with pytest.raises(SecurityError, match=f"{missing} has not signed") as caught:
            enrollment.verify_first(signed(FIRST, set(EVERYBODY) - {missing}, EVERYBODY))
        assert caught.value.culprits == (missing,)
    with pytest.raises(SecurityError, match="has not heard telecom-c"):
        enrollment.verify_first(signed(FIRST, EVERYBODY, set(EVERYBODY) - {"telecom-c"}))


def by_all(**changes: object) -> SignedRoster:
    """A roster that somebody made otherwise, and that all have signed: what remains is its form."""
    body = FIRST.model_copy(update=changes)
    signers = {member.name for member in body.members}
    return signed(body, signers, signers)


def with_votes(*changed: Vote) -> SignedRoster:
    """All signatures of FIRST, some of them in another's words."""
    others = [one for one in ALL_FIRST.signatures if one.signer not in {vote.signer for vote in changed}]
    return enrollment.collect(FIRST, [*others, *changed])


def voted(heard: Iterable[str], roster: RosterBody = FIRST) -> Vote:
    """bank-b's own signature, over a list in this very order."""
    keys = keys_of("bank-b")
    vote = enrollment.vote(roster, keys, []).model_copy(update={"heard": tuple(heard)})
    return vote.model_copy(update={"signature": keys.identity.sign(vote.to_sign()).hex()})


BANK, *REST = FIRST.members
BAD_FIRST: dict[str, tuple[SignedRoster, str]] = {
    "a member whose request is not signed": (
        by_all(members=(BANK.model_copy(update={"signatures": {}}), *REST)), r"request of bank-b: signed by \[\]"),
    "members in another order": (by_all(members=tuple(reversed(FIRST.members))), "names are not ascending"),
    "a member twice": (by_all(members=(BANK, *FIRST.members)), "names are not ascending and unique"),
    "two coordinators": (
        by_all(members=(request("bank-b", role="coordinator"), *REST)), "needs one coordinator"),
    "no coordinator": (
        by_all(members=tuple(m for m in FIRST.members if m.role == "participant")), "needs one coordinator"),
    "one participant": (
        by_all(members=(BANK, request("registry-x"))), "at least two participants"),
    "one key in two uses": (
        by_all(members=(twice("bank-b"), *REST)), "bank-b has a key of bank-b"),
    "another version": (by_all(version=2), "not a first one"),
    "a roster before the first": (by_all(previous="00" * 32), "not a first one"),
    "a signature by another's key": (
        with_votes(ALL_FIRST.signatures[0].model_copy(update={"signature": ALL_FIRST.signatures[1].signature})),
        "signature is not valid"),
    "a good signature of another roster": (
        with_votes(voted([n for n in EVERYBODY if n != "bank-b"], WITHOUT_BANK)), "bank-b: it is of another roster"),
    "a name put on the list of those heard": (
        with_votes(ALL_FIRST.signatures[0].model_copy(update={"heard": ("bank-b", "hospital-a")})),
        "signature is not valid"),
    "a stranger on the list of those heard": (with_votes(voted(["x", "y"])), "are not members"),
    "a list of those heard in another order": (with_votes(voted(["telecom-c", "hospital-a"])), "ascending and unique"),
    "signatures in another order": (
        ALL_FIRST.model_copy(update={"signatures": ALL_FIRST.signatures[::-1]}), "not ascending by signer"),
    "a signature twice": (
        ALL_FIRST.model_copy(update={"signatures": (ALL_FIRST.signatures[0], *ALL_FIRST.signatures)}),
        "not ascending by signer"),
    "a stranger's signature": (
        with_votes(enrollment.vote(FIRST, keys_of("stranger"), [])), "signature of a stranger"),
}  # fmt: skip


@pytest.mark.parametrize(("roster", "why"), BAD_FIRST.values(), ids=BAD_FIRST.keys())
def test_first_roster_of_another_form_is_refused_though_all_have_signed_it(roster: SignedRoster, why: str) -> None:
    with pytest.raises(SecurityError, match=why):
        enrollment.verify_first(roster)


def test_member_with_a_key_of_another_is_refused() -> None:
    """Alone each request is good; together they would make one signature count for two."""
    twin = resigned({**content("telecom-c"), "log": content()["log"]})
    signatures = {**twin.signatures, "log": keys_of("bank-b").log.sign(twin.to_sign()).hex()}
    twin = twin.model_copy(update={"signatures": signatures})
    enrollment.verify_request(twin)
    with pytest.raises(SecurityError, match="telecom-c has a key of bank-b"):
        enrollment.next_roster(FIRST, [twin])


NEXT_ROSTERS: dict[str, tuple[SignedRoster, str | None]] = {
    "three of four participants and the newcomer, all of whom heard it": (
        signed(WITH_NEWCOMER, [*SITES[:3], "utility-e"], ["utility-e"]), None),
    "all sign and two have not heard the newcomer": (
        enrollment.collect(WITH_NEWCOMER, [
            *votes(WITH_NEWCOMER, ["bank-b", "hospital-a", "utility-e"], ["utility-e"]),
            *votes(WITH_NEWCOMER, ["insurer-d", "telecom-c"])]),
        "2 participants of version 1 have heard utility-e, 3 are needed"),
    "the coordinator and one participant add a sybil": (
        signed(WITH_NEWCOMER, ["bank-b", "registry-x", "utility-e"], ["utility-e"]),
        "1 participants of version 1 have signed, 3 are needed"),
    "the newcomer has not signed": (signed(WITH_NEWCOMER, SITES, ["utility-e"]), "utility-e is new and has not signed"),
    "three of four remove the fourth": (signed(WITHOUT_BANK, OTHERS), None),
    "two of the three that stay": (
        signed(WITHOUT_BANK, ["bank-b", "hospital-a", "insurer-d"]), "2 participants of version 2 have signed"),
    "two of four remove another": (signed(WITHOUT_BANK, OTHERS[:2]), "2 participants of version 1 have signed"),
    "two of four and the coordinator": (
        signed(WITHOUT_BANK, [*OTHERS[:2], "registry-x"]), "2 participants of version 1 have signed"),
    "a rotation that all others have heard": (
        enrollment.collect(ROTATED, [*votes(ROTATED, ["bank-b"], generation=1), *votes(ROTATED, OTHERS, ["bank-b"])]),
        None),
    "a rotation by the thief of the old key, whom nobody has heard": (
        enrollment.collect(ROTATED, [
            *votes(ROTATED, ["bank-b"], generation=1), *votes(ROTATED, ["bank-b"], ["bank-b"]),
            *votes(ROTATED, OTHERS)]),
        "0 participants of version 1 have heard bank-b, 3 are needed"),
    "a rotation that the new key has not signed": (
        signed(ROTATED, SITES, ["bank-b"]), "bank-b is new and has not signed"),
    "the same roster again": (ALL_FIRST, "is a way back"),
}  # fmt: skip


@pytest.mark.parametrize(("roster", "why"), NEXT_ROSTERS.values(), ids=NEXT_ROSTERS.keys())
def test_next_roster_needs_the_quorums_of_both_and_ears_for_newcomers(roster: SignedRoster, why: str | None) -> None:
    if why is None:
        enrollment.verify_next(FIRST, roster)
        return
    with pytest.raises(SecurityError, match=why):
        enrollment.verify_next(FIRST, roster)


def test_gap_other_history_and_invented_dates_are_refused() -> None:
    third = enrollment.next_roster(WITHOUT_BANK, [], ["hospital-a"])
    with pytest.raises(SecurityError, match="leaves a gap"):
        enrollment.verify_next(FIRST, signed(third, SITES))
    other = WITHOUT_BANK.model_copy(update={"previous": "11" * 32})
    with pytest.raises(SecurityError, match="does not follow"):
        enrollment.verify_next(FIRST, signed(other, SITES))
    longer = WITHOUT_BANK.model_copy(update={"expires": "2099-01-01T00:00:00Z"})
    with pytest.raises(SecurityError, match="does not follow"):
        enrollment.verify_next(FIRST, signed(longer, SITES))


def test_site_that_joins_later_has_the_roster_before_and_heard_its_participants() -> None:
    def history(heard: Iterable[str]) -> list[SignedRoster]:
        added = [*votes(WITH_NEWCOMER, SITES, ["utility-e"]), *votes(WITH_NEWCOMER, ["utility-e"], heard)]
        return [ALL_FIRST, enrollment.collect(WITH_NEWCOMER, added)]

    def arrive(rosters: list[SignedRoster], name: str) -> None:
        enrollment.verify_history(rosters)
        enrollment.verify_arrival(rosters, {keys_of(name).identity.public.hex()})

    arrive(history(SITES[:3]), "utility-e")
    arrive([ALL_FIRST], "bank-b")
    with pytest.raises(SecurityError, match="2 participants of version 1 are heard by utility-e, 3 are needed"):
        arrive(history([*SITES[:2], "registry-x"]), "utility-e")
    with pytest.raises(UsageError, match="you are not in version 1"):
        arrive([ALL_FIRST], "utility-e")
    third = enrollment.next_roster(WITH_NEWCOMER, [request("water-f", day=2)])
    everybody = [*SITES, "utility-e", "water-f"]
    later = [history(SITES)[1], signed(third, everybody, everybody)]
    arrive(later, "water-f")
    for part, me in ((later[1:], "water-f"), (later, "bank-b")):
        with pytest.raises(SecurityError, match="follows one that is not here"):
            arrive(part, me)


def test_newcomer_is_not_taken_for_an_impostor_of_its_name_in_the_roster_before() -> None:
    """A participant and the coordinator make a past with a false hospital-a and a false bank-b in it.

    The true bank-b would come in as a rotation of the false one, and hear nobody but those two.
    """
    false = [request(name, 7) for name in ("bank-b", "hospital-a")]
    past = enrollment.next_roster(None, [*false, request("mallory"), request("registry-x")])
    everybody = ["bank-b", "hospital-a", "mallory", "registry-x"]
    made = [
        *votes(past, ["mallory", "registry-x"], everybody),
        *votes(past, ["bank-b", "hospital-a"], everybody, generation=7),
    ]
    now = enrollment.next_roster(past, [request("bank-b", day=1)])
    mine = enrollment.vote(now, keys_of("bank-b"), ["mallory", "registry-x"])
    others = [*votes(now, ["mallory"], ["bank-b"]), *votes(now, ["bank-b", "hospital-a"], ["bank-b"], generation=7)]
    history = [enrollment.collect(past, made), enrollment.collect(now, [mine, *others])]
    enrollment.verify_history(history)
    with pytest.raises(SecurityError, match="1 participants of version 1 are heard by bank-b, 2 are needed"):
        enrollment.verify_arrival(history, {keys_of("bank-b").identity.public.hex()})


def test_member_that_is_not_the_same_is_new() -> None:
    renewed = enrollment.next_roster(FIRST, [request("bank-b", day=3)])
    assert enrollment.newcomers(FIRST, renewed) == []
    other_box = resigned({**content(), "box": keys_of("bank-b", 3).box.public.hex()})
    signatures = {**other_box.signatures, "box": keys_of("bank-b", 3).box.sign(other_box.to_sign()).hex()}
    other_box = other_box.model_copy(update={"signatures": signatures})
    assert enrollment.newcomers(FIRST, enrollment.next_roster(FIRST, [other_box])) == ["bank-b"]
    changed = [request("registry-x", role="participant"), request("bank-b", role="coordinator")]
    swapped = enrollment.next_roster(FIRST, changed)
    assert enrollment.newcomers(FIRST, swapped) == ["bank-b", "registry-x"]
    assert enrollment.newcomers(None, FIRST) == list(EVERYBODY)
    assert enrollment.newcomers(FIRST, WITH_NEWCOMER) == ["utility-e"]
    assert enrollment.newcomers(FIRST, ROTATED) == ["bank-b"]


def test_member_cannot_become_two_nor_a_key_come_back_under_another_name() -> None:
    """bank-b rotates and keeps its old key as a second member: both would count."""
    keys = keys_of("bank-b")
    second = enrollment.make_request(keys, "bank-b2", "participant", NOW, NOW + YEAR, bytes(32), bytes(32))
    with pytest.raises(SecurityError, match="bank-b2 has a key of another member"):
        enrollment.next_roster(FIRST, [request("bank-b", 1), second])


def test_old_requests_two_requests_and_unknown_leavers_are_refused() -> None:
    renewed = enrollment.next_roster(FIRST, [request("bank-b", day=3)])
    with pytest.raises(SecurityError, match="an older request of bank-b is back"):
        enrollment.next_roster(renewed, [request("bank-b", day=2)])
    with pytest.raises(UsageError, match="two requests of bank-b"):
        enrollment.next_roster(FIRST, [request("bank-b", day=2), request("bank-b", day=3)])
    with pytest.raises(UsageError, match="is not in the roster"):
        enrollment.next_roster(FIRST, [], ["nobody"])
    with pytest.raises(UsageError, match="needs members"):
        enrollment.next_roster(None, [])


def test_coordinator_is_replaced_in_one_step() -> None:
    body = enrollment.next_roster(FIRST, [request("registry-y", role="coordinator", day=1)], ["registry-x"])
    enrollment.verify_next(FIRST, signed(body, [*SITES, "registry-y"], ["registry-y"]))


@pytest.mark.parametrize("n", [2, 3])
def test_pair_and_three_rotate_with_both_keys(n: int) -> None:
    """Their quorum is all of them, under the keys of the roster before and under those of the next."""
    first = enrollment.next_roster(None, [request(name) for name in (*SITES[:n], "registry-x")])
    rotated = enrollment.next_roster(first, [request("bank-b", 1, day=1)])
    others = votes(rotated, SITES[1:n], ["bank-b"])
    new, old = votes(rotated, ["bank-b"], generation=1), votes(rotated, ["bank-b"])
    both = enrollment.signing_identities("bank-b", rotated, first)
    assert {one.hex() for one in both} == {new[0].signer, old[0].signer}
    enrollment.verify_next(first, enrollment.collect(rotated, [*others, *new, *old]))
    with pytest.raises(SecurityError, match=f"{n - 1} participants of version 1 have signed"):
        enrollment.verify_next(first, enrollment.collect(rotated, [*others, *new]))


@pytest.mark.parametrize("n", [2, 3])
def test_small_rosters_need_all_their_participants(n: int) -> None:
    first = enrollment.next_roster(None, [request(name) for name in (*SITES[:n], "registry-x")])
    added = enrollment.next_roster(first, [NEWCOMER])
    enrollment.verify_next(first, signed(added, [*SITES[:n], "utility-e"], ["utility-e"]))
    with pytest.raises(SecurityError, match=f"{n - 1} participants of version 1 have signed, {n} are needed"):
        enrollment.verify_next(first, signed(added, [*SITES[: n - 1], "utility-e"], ["utility-e"]))


def test_messages_and_certificates_of_one_key_never_look_alike() -> None:
    assert request("bank-b").to_sign()[0] == ALL_FIRST.signatures[0].to_sign()[0] == 0
    tls = certificate.issue(keys_of("bank-b").identity, "bank-b", "participant", NOW)
    assert x509.load_pem_x509_certificate(tls.certificate).tbs_certificate_bytes[0] == 0x30


SPOILT: dict[str, bytes] = {
    "0 bytes": b"",
    "not UTF-8": b"\xff\xfe",
    "not JSON": b"{",
    "a list": b"[]",
    "a key twice": request("bank-b").encode().replace(b'"box"', b'"name":"x-1","box"', 1),
    "another order": json.dumps(content()).encode(),
    "another line end": request("bank-b").encode().replace(b"\n", b"\r\n"),
    "a second line end": request("bank-b").encode() + b"\n",
    "white space": json.dumps(content(), indent=1, sort_keys=True).encode(),
    "an unknown field": json.dumps({**content(), "zz": 1}, sort_keys=True, separators=(",", ":")).encode(),
    "a number that is none": FIRST.encode().replace(b'"version":1', b'"version":NaN'),
    "a number with a point": FIRST.encode().replace(b'"version":1', b'"version":1.0'),
    "a huge number": FIRST.encode().replace(b'"version":1', b'"version":9007199254740993'),
    "too long": b" " * (documents.MOST_BYTES + 1),
    "deep": b'{"type":' + b"[" * 100_000,
    "an unknown kind": b'{"type":"mpctf-secure/other/v1"}',
    "a newline in a name": request("bank-b").encode().replace(b'"bank-b"', b'"bank\\nb"'),
}


@pytest.mark.parametrize("data", SPOILT.values(), ids=SPOILT.keys())
def test_file_in_any_other_form_is_refused(data: bytes) -> None:
    for decode in (documents.decode_any, Request.decode, RosterBody.decode):
        with pytest.raises(DecodeError):
            decode(data)


@given(st.one_of(st.binary(max_size=200), st.text(max_size=80).map(lambda t: json.dumps({"type": t}).encode())))
def test_any_bytes_are_a_document_or_refused(data: bytes) -> None:
    with pytest.raises(DecodeError):
        documents.decode_any(data)


def test_documents_survive_their_files() -> None:
    for document in (request("bank-b"), FIRST, ALL_FIRST, ALL_FIRST.signatures[0]):
        assert documents.decode_any(document.encode()) == document
    assert isinstance(documents.decode_any(ALL_FIRST.signatures[0].encode()), Vote)


def test_ceremony_document_has_the_labels_of_the_code() -> None:
    text = (Path(enrollment.__file__).parent / "CEREMONY.md").read_text()
    for kind in (Request, Vote):
        assert f"`{kind.model_fields['type'].default}`" in text
    tests = "".join(path.read_text() for path in Path(__file__).parents[2].rglob("test_*.py"))
    named = re.findall(r"`(test_\w+)`", text)
    assert len(named) == 10
    assert all(f"def {name}(" in tests for name in named)
