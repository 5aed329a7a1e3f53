import base64
import json
import re

import pytest
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_der_public_key
from hypothesis import given
from hypothesis import strategies as st
from unit.auditlog import vectors

from mpctf_secure.auditlog.merkle import leaf_hash, verify_inclusion
from mpctf_secure.auditlog.note import MOST_BYTES, Checkpoint, Key, Line, Note
from mpctf_secure.errors import DecodeError, SecurityError
from mpctf_secure.hazmat.signature import SigningKey

LOG, WITNESS, THIEF = (SigningKey(bytes([number]) * 32) for number in (1, 2, 3))
ORIGIN = "registry-x/joint-1"
KEY, WITNESS_KEY = Key(ORIGIN, LOG.public), Key("hospital-a", WITNESS.public)
TEXT = Checkpoint(ORIGIN, 7, bytes(range(32))).encode()
NOTE = Note(TEXT).signed(ORIGIN, LOG)
COSIGNER_VKEY = f"{ORIGIN}+{KEY.cosigner_id.hex()}+{base64.b64encode(bytes([4]) + LOG.public).decode()}"
BOTH = NOTE.with_lines([NOTE.cosigned("hospital-a", WITNESS, 1_800_000_000)])


def test_note_comes_back_as_it_was_with_both_kinds_of_signature() -> None:
    note = Note.decode(BOTH.encode())
    assert note == BOTH
    note.verify(KEY)
    assert note.cosigned_at(WITNESS_KEY) == 1_800_000_000
    assert Checkpoint.decode(note.text) == Checkpoint(ORIGIN, 7, bytes(range(32)))
    assert Key.from_vkey(KEY.vkey) == KEY


def test_who_has_not_signed_has_not() -> None:
    with pytest.raises(SecurityError, match="not signed by hospital-a"):
        BOTH.verify(WITNESS_KEY)
    assert BOTH.cosigned_at(KEY) is None
    assert BOTH.cosigned_at(Key("bank-b", WITNESS.public)) is None


FORGERIES = {
    "another text": Note(TEXT.replace("7", "8"), BOTH.lines),
    "signed by a thief under the log's name and key id": Note(
        TEXT, tuple(Line(line.name, line.key_id, THIEF.sign(b"x") + bytes(8)) for line in BOTH.lines)
    ),
    "a log's signature as a witness's": Note(
        TEXT, (Line("hospital-a", WITNESS_KEY.id_of(4), bytes(8) + WITNESS.sign(TEXT.encode())),)
    ),
    "another time": Note(TEXT, (Line("hospital-a", WITNESS_KEY.id_of(4), bytes(8) + BOTH.lines[1].signature[8:]),)),
    "a time that no clock shows": Note(TEXT, (NOTE.cosigned("hospital-a", WITNESS, 253_402_300_800),)),
    "no signature's length": Note(TEXT, (Line("hospital-a", WITNESS_KEY.id_of(4), bytes(9)),)),
}


@pytest.mark.parametrize("note", FORGERIES.values(), ids=FORGERIES.keys())
def test_forgery_is_refused(note: Note) -> None:
    with pytest.raises(SecurityError):
        note.verify(KEY)
    if any(line.name == "hospital-a" for line in note.lines):
        with pytest.raises(SecurityError):
            note.cosigned_at(WITNESS_KEY)


NO_NOTES = {
    "nothing": b"",
    "no signature": TEXT.encode() + b"\n",
    "no empty line": TEXT.encode() + NOTE.lines[0].encode().encode(),
    "no dash": BOTH.encode().replace("—".encode(), b"-"),
    "no end of the last line": BOTH.encode()[:-1],
    "something after it": BOTH.encode() + b"\n",
    "a control character": BOTH.encode().replace(b"registry", b"re\x07istry", 1),
    "a line's end of another kind": BOTH.encode().replace(b"\n7\n", b"\n7\r\n"),
    "not UTF-8": b"\xff" + BOTH.encode(),
    "base64 that is none": re.sub(rb"(?m) (\S+)$", rb" !\1", BOTH.encode()),
    "too long": b"x" * MOST_BYTES + BOTH.encode(),
    "too many signatures": BOTH.with_lines(NOTE.lines * 300).encode(),
}


@pytest.mark.parametrize("data", NO_NOTES.values(), ids=NO_NOTES.keys())
def test_what_is_no_note_is_refused(data: bytes) -> None:
    with pytest.raises(DecodeError):
        Note.decode(data)


NO_CHECKPOINTS = {
    "too short": f"{ORIGIN}\n7\n",
    "no origin": TEXT.replace(ORIGIN, ""),
    "a size with a zero before it": TEXT.replace("7", "07"),
    "a size below nothing": TEXT.replace("7", "-7"),
    "a size in other digits": TEXT.replace("7", "٧"),
    "a huge size": TEXT.replace("7", str(1 << 63)),
    "a short root": TEXT.replace(base64.b64encode(bytes(range(32))).decode(), "AAAA"),
    "an empty line": TEXT + "\n",
    "no end": TEXT[:-1],
}


@pytest.mark.parametrize("text", NO_CHECKPOINTS.values(), ids=NO_CHECKPOINTS.keys())
def test_what_is_no_checkpoint_is_refused(text: str) -> None:
    with pytest.raises(DecodeError):
        Checkpoint.decode(text)


def test_more_lines_of_a_checkpoint_are_kept_as_they_are_signed() -> None:
    assert Checkpoint.decode(TEXT + "more\n") == Checkpoint(ORIGIN, 7, bytes(range(32)), ("more",))


@pytest.mark.parametrize("vkey", ["", "a+b", "a+b+c", COSIGNER_VKEY, KEY.vkey[:-4], KEY.vkey.replace("+", "+0", 1)])
def test_what_is_no_key_of_a_log_is_refused(vkey: str) -> None:
    with pytest.raises(DecodeError):
        Key.from_vkey(vkey)


@given(
    st.binary()
    | st.text().map(str.encode)
    | st.builds(
        lambda at, byte: BOTH.encode()[:at] + byte + BOTH.encode()[at + 1 :],
        st.integers(0, len(BOTH.encode())),
        st.binary(max_size=2),
    )
)
def test_any_bytes_are_one_note_or_refused(data: bytes) -> None:
    try:
        note = Note.decode(data)
    except DecodeError:
        return
    assert note.encode() == data
    try:
        checkpoint = Checkpoint.decode(note.text)
    except DecodeError:
        return
    assert checkpoint.encode() == note.text


@vectors.needed
def test_checkpoint_of_sum_golang_org() -> None:
    script = (vectors.FOLDER / "tlog" / "testdata" / "sumdb.txt").read_text()
    (vkey,) = re.findall(r"-key (sum\.golang\.org\S+)", script)
    (note,) = re.findall(r"(?s)old 0\n\n(.*?)```", script)
    key, parsed = Key.from_vkey(vkey), Note.decode(note.encode())
    parsed.verify(key)
    assert key.vkey == vkey
    assert Checkpoint.decode(parsed.text).size == 35225469
    with pytest.raises(SecurityError):
        Note.decode(note.replace("35225469", "35225470").encode()).verify(key)


def rekor(name: str) -> tuple[Note, dict[str, object]]:
    bundle = json.loads((vectors.FOLDER / "sigstore" / name / "bundle.sigstore.json").read_text())
    (entry,) = bundle["verificationMaterial"]["tlogEntries"]
    return Note.decode(entry["inclusionProof"]["checkpoint"]["envelope"].encode()), entry


def check_rekor(name: str) -> Note:
    note, entry = rekor(name)
    checkpoint, proof = Checkpoint.decode(note.text), entry["inclusionProof"]
    trusted = json.loads((vectors.FOLDER / "sigstore" / name / "trusted_root.json").read_text())
    keys = [base64.b64decode(log["publicKey"]["rawBytes"]) for log in trusted["tlogs"] if "ED25519" in str(log)]
    public = [load_der_public_key(key).public_bytes(Encoding.Raw, PublicFormat.Raw) for key in keys]
    (key,) = [Key(checkpoint.origin, one) for one in public]
    note.verify(key)
    leaf = leaf_hash(base64.b64decode(entry["canonicalizedBody"]))
    path = [base64.b64decode(one) for one in proof["hashes"]]
    verify_inclusion(leaf, int(proof["logIndex"]), checkpoint.size, checkpoint.root, path)
    return note


@vectors.needed
@pytest.mark.parametrize(
    ("name", "signatures"),
    [
        ("rekor2-happy-path", 1),
        ("rekor2-timestamp-with-embedded-cert", 1),
        ("rekor2-checkpoint-cosigned", 2),
        ("rekor2-checkpoint-multiple-cosigs", 3),
    ],
)
def test_checkpoint_and_inclusion_proof_of_rekor(name: str, signatures: int) -> None:
    assert len(check_rekor(name).lines) == signatures


@vectors.needed
def test_rekor_s_checkpoint_of_another_root_proves_nothing() -> None:
    note, entry = rekor("checkpoint-wrong-roothash_fail")
    checkpoint, proof = Checkpoint.decode(note.text), entry["inclusionProof"]
    leaf = leaf_hash(base64.b64decode(entry["canonicalizedBody"]))
    path = [base64.b64decode(one) for one in proof["hashes"]]
    with pytest.raises(SecurityError, match="does not lead to the root"):
        verify_inclusion(leaf, int(proof["logIndex"]), checkpoint.size, checkpoint.root, path)
