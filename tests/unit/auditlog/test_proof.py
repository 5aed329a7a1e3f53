import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpctf_secure.auditlog.merkle import Tree, leaf_hash
from mpctf_secure.auditlog.note import Checkpoint, Key, Note
from mpctf_secure.auditlog.proof import Continued, Proof
from mpctf_secure.errors import DecodeError, SecurityError
from mpctf_secure.hazmat.signature import SigningKey

LOG, THIEF = SigningKey(b"1" * 32), SigningKey(b"2" * 32)
ORIGIN = "registry-x/run/joint-1"
KEY = Key(ORIGIN, LOG.public)
LINES = [f'{{"leaf":{number}}}'.encode() for number in range(20)]


def signed(tree: Tree, size: int, key: SigningKey = LOG, origin: str = ORIGIN) -> Note:
    return Note(Checkpoint(origin, size, tree.root(size)).encode()).signed(origin, key)


TREE = Tree(map(leaf_hash, LINES))
PROOF = Proof.of(TREE, signed(TREE, 13), LINES, [4, 12], 7)


@given(size=st.integers(1, 20), data=st.data())
def test_any_leaf_and_any_earlier_tree_is_proved_and_comes_through_json(size: int, data: st.DataObject) -> None:
    wanted = data.draw(st.lists(st.integers(0, size - 1)))
    since = data.draw(st.none() | st.integers(1, size))
    proof = Proof.of(TREE, signed(TREE, size), LINES, wanted, since)
    assert Proof.decode(proof.encode()) == proof
    assert proof.verify(KEY).size == size


LIES = {
    "another leaf": replace(PROOF, leaves=(replace(PROOF.leaves[0], leaf=b"x"),)),
    "another number": replace(PROOF, leaves=(replace(PROOF.leaves[0], index=5),)),
    "a leaf behind the checkpoint": replace(PROOF, leaves=(replace(PROOF.leaves[0], index=13),)),
    "a number below nought": replace(PROOF, leaves=(replace(PROOF.leaves[0], index=-1),)),
    "a path cut off": replace(PROOF, leaves=(replace(PROOF.leaves[0], path=PROOF.leaves[0].path[:-1]),)),
    "another tree before": replace(PROOF, since=Continued(7, bytes(32), ())),
    "no tree before": replace(PROOF, since=Continued(0, TREE.root(0), ())),
    "signed by a thief": replace(PROOF, note=signed(TREE, 13, THIEF)),
    "another log of the same key": replace(PROOF, note=signed(TREE, 13, origin="registry-x/run/joint-2")),
    "the name of one log in the checkpoint of another": replace(
        PROOF, note=Note(Checkpoint("registry-x/run/joint-2", 13, TREE.root(13)).encode()).signed(ORIGIN, LOG)
    ),
}


@pytest.mark.parametrize("proof", LIES.values(), ids=LIES.keys())
def test_lie_is_refused(proof: Proof) -> None:
    with pytest.raises(SecurityError):
        Proof.decode(proof.encode()).verify(KEY)


@given(st.binary())
def test_any_bytes_are_refused_or_a_proof(data: bytes) -> None:
    with pytest.raises(DecodeError):
        Proof.decode(data)


CONTENT = json.loads(PROOF.encode())
NO_PROOFS = {
    "an index that is no number": {**CONTENT, "leaves": [{**CONTENT["leaves"][0], "index": True}]},
    "a path that is a word": {**CONTENT, "leaves": [{**CONTENT["leaves"][0], "inclusion": "abcd"}]},
    "a hash that is not base64": {**CONTENT, "root": "no!"},
    "a leaf that is no text": {**CONTENT, "leaves": [{**CONTENT["leaves"][0], "leaf": 7}]},
    "half a pair of surrogates": {**CONTENT, "leaves": [{**CONTENT["leaves"][0], "leaf": "\ud800"}]},
    "no checkpoint": {"leaves": []},
    "a checkpoint that is none": {**CONTENT, "checkpoint": "hello"},
    "a list": [CONTENT],
}


@pytest.mark.parametrize("content", NO_PROOFS.values(), ids=NO_PROOFS.keys())
def test_what_is_no_proof_is_refused(content: object) -> None:
    with pytest.raises(DecodeError):
        Proof.decode(json.dumps(content).encode())
