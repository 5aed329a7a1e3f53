"""PROTOCOL.md says what the code does: its tables are read and compared."""

import hmac
import re
from hashlib import sha256
from pathlib import Path

import pytest
from adversarial.test_checks_switched_off import CASES
from simulator import Attempt

import mpctf_secure.secagg
from mpctf_secure.hazmat import agreement, shamir
from mpctf_secure.hazmat.encoding import Reader, decode_sequence, enc, enc_sequence
from mpctf_secure.quorum import default_colluders, default_quorum
from mpctf_secure.secagg import masks
from mpctf_secure.secagg.client import entropy_bytes
from mpctf_secure.secagg.messages import Delivery, ShareMessage, SharePair, Signed, Survivors
from mpctf_secure.secagg.parameters import MAX_ATTEMPTS, MAX_COHORT, PROTOCOL, floor, threshold
from mpctf_secure.secagg.transitions import CLIENT, SERVER

TEXT = (Path(mpctf_secure.secagg.__file__).parent / "PROTOCOL.md").read_text()
TESTS = Path(__file__).parents[2]


def table(section: str, number: int = 0) -> list[list[str]]:
    """The rows of a section's table, without its head."""
    body = TEXT.split(f"\n## {section}", 1)[1].split("\n## ", 1)[0]
    found = re.findall(r"(?:^\|.*\n)+", body, re.MULTILINE)[number]
    return [
        [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", row)[1:-1]]
        for row in found.splitlines()[2:]
    ]


def test_context_is_the_hash_of_the_fields_in_the_table() -> None:
    context = Attempt(4).context
    names = [row[0] for row in table("2 Context")]
    assert names[0] == "protocol"
    assert names[-2:] == ["cohort", "first_cohort"]
    fields = [PROTOCOL, *(getattr(context, name) for name in names[1:-2])]
    encoded = enc(*fields) + enc_sequence(context.cohort) + enc_sequence(context.first_cohort)
    assert context.digest() == sha256(encoded).digest()
    of_contract = {"least", "secure"}  # which is hashed
    assert set(names[1:]) == {*context.__dataclass_fields__, "threshold"} - of_contract
    assert f"`{PROTOCOL}`" in TEXT
    assert f"1 to {MAX_ATTEMPTS}" in TEXT
    assert f"up to {MAX_COHORT} clients" in TEXT


@pytest.mark.parametrize("row", table("3 Thresholds"))
def test_thresholds_are_those_of_the_table(row: list[str]) -> None:
    n, colluders, t, least = map(int, row)
    assert (default_colluders(n), threshold(n, colluders), floor(n, colluders)) == (colluders, t, least)
    assert default_quorum(n, colluders) == (n + colluders) // 2 + 1


def real_messages() -> dict[str, tuple[bytes, dict[str, int]]]:
    """A message of each kind from an attempt of eight in which |U1|, |U2| and |U3| differ."""
    attempt = Attempt(8, dimension=300_000, drops={0: "advertise", 5: "upload"})
    adverts = attempt.advertise()
    first = attempt.clients[1]
    share_message = first.share(adverts)
    attempt.server.accept_shares(share_message)
    for i in attempt.active("share")[1:]:
        attempt.server.accept_shares(attempt.clients[i].share(adverts))
    deliveries = attempt.server.close_shares()
    survivors = attempt.upload(deliveries)
    confirmed = Signed.decode(first.confirm(survivors))
    for i in attempt.active("confirm")[1:]:
        attempt.server.accept_consistency(attempt.clients[i].confirm(survivors))
    attempt.server.accept_consistency(confirmed.encode())
    released = Signed.decode(first.release(attempt.server.close_consistency()))
    claim = Survivors.decode(survivors)
    advert, dealing = Signed.decode(first._my_advert), Signed.decode(first._my_dealing)
    upload = Signed.decode(first._declared)
    sizes = {"n1": len(decode_sequence(adverts, 100)), "n2": len(claim.dealers), "n3": len(claim.survivors)}
    box = ShareMessage.decode(share_message).boxes[0]
    opening = enc(attempt.context.digest(), attempt.context.layout.size, 0)
    messages = {
        "signed": confirmed.encode(),
        "advert body": advert.body,
        "shares body": dealing.body,
        "box plaintext": SharePair(bytes(33), bytes(33)).encode(),
        "box": box,
        "share message": share_message,
        "delivery": deliveries[first.me],
        "upload opening": opening,
        "complaint body": Signed.decode(first.complain(attempt.clients[2].me)).body,
        "upload body": upload.body,
        "survivor tuple": survivors,
        "release body": released.body,
    }
    own = {"signed": {"L": len("consistency"), "body": len(confirmed.body)}}
    return {name: (message, {**sizes, **own.get(name, {})}) for name, message in messages.items()}


def test_messages_have_the_lengths_of_the_table() -> None:
    messages = real_messages()
    rows = {row[0]: row[2] for row in table("4 Messages")}
    assert rows.keys() == messages.keys()
    for name, formula in rows.items():
        message, sizes = messages[name]
        expression = formula.replace("·", "*").translate(str.maketrans("₁₂₃−", "123-"))
        assert re.fullmatch(r"[\d\s+*()\-nLbody]+", expression)
        assert len(message) == eval(expression, {"__builtins__": {}}, sizes), name  # noqa: S307
    assert len(Delivery.decode(messages["delivery"][0]).boxes) == messages["delivery"][1]["n2"] - 1


def hkdf(secret: bytes, info: bytes) -> bytes:
    key = hmac.new(bytes(32), secret, "sha256").digest()
    return hmac.new(key, info + b"\1", "sha256").digest()


def test_keys_are_those_of_the_table() -> None:
    low, high, private, binding = b"\1" * 32, b"\2" * 32, b"\3" * 32, b"binding"
    public = agreement.public_key(b"\4" * 32)
    shared = agreement.exchange(private, public)
    names = {"from": low, "to": high, "lower": low, "higher": high, "owner": low}
    pair = masks.pair_mask(binding, high, private, low, public)
    own = masks.self_mask(binding, low, b"\5" * 32)
    code = {
        "box": masks.box_key(binding, private, public, low, high),
        "pair-vector": pair.vector_seed,
        "pair-scalars": pair.scalar_seed,
        "self-vector": own.vector_seed,
        "self-scalars": own.scalar_seed,
    }
    rows = table("5 Keys")
    assert {row[0] for row in rows} == code.keys()
    for label, material, info in rows:
        assert info.split(", ")[0] == label
        secret = b"\5" * 32 if material == "b" else shared
        assert code[label] == hkdf(secret, binding + enc(label, *(names[name] for name in info.split(", ")[1:])))
    assert masks.pair_mask(binding, low, private, high, public).added
    assert not pair.added
    assert own.added
    assert entropy_bytes(7) == 96 + 128 * 6
    assert shamir.PRIME == 2**256 + 297


@pytest.mark.parametrize(("number", "transitions"), [(0, CLIENT), (1, SERVER)])
def test_state_tables_are_those_of_the_code(number: int, transitions: dict) -> None:
    code = [[state.value, event, following.value] for (state, event), following in transitions.items()]
    assert table("7 States", number) == code


def test_every_check_names_what_shows_it() -> None:
    tests = "\n".join(path.read_text() for path in TESTS.rglob("test_*.py"))
    named = set()
    for *_, shown in table("8 Checks"):
        for name in shown.split("; "):
            if name.startswith("`"):
                assert f"def {name.strip('`')}(" in tests, name
            else:
                assert name in CASES, name
                named.add(name)
    assert named == CASES.keys()


def test_labels_in_the_text_are_those_that_are_signed() -> None:
    attempt = Attempt(3)
    labels = set()

    def sent(message: bytes) -> bytes:
        signed = message if Reader(message).bytes().isalpha() else ShareMessage.decode(message).dealing
        labels.add(Signed.decode(signed).label)
        return message

    attempt.sent = sent  # type: ignore[method-assign]
    attempt.run()
    sent(attempt.clients[0].complain(attempt.clients[1].me))
    line = next(line for line in TEXT.splitlines() if line.startswith("Labels: "))
    assert set(re.findall(r"`(\w+)`", line)) == labels
