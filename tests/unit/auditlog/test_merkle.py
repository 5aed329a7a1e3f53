import base64
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from unit.auditlog import vectors

from mpctf_secure.auditlog.merkle import (
    EMPTY_ROOT,
    Tree,
    leaf_hash,
    verify_consistency,
    verify_inclusion,
    verify_subtree,
)
from mpctf_secure.errors import SecurityError
from mpctf_secure.hazmat.kdf import sha256

MOST = 70
HASHES = [leaf_hash(bytes([number])) for number in range(MOST)]
TREE = Tree(HASHES)


def root_by_definition(hashes: list[bytes]) -> bytes:
    """MTH of RFC 6962, section 2.1, word for word."""
    if len(hashes) < 2:
        return hashes[0] if hashes else sha256(b"")
    k = max(2**e for e in range(20) if 2**e < len(hashes))
    return sha256(b"\1" + root_by_definition(hashes[:k]) + root_by_definition(hashes[k:]))


def test_root_is_that_of_the_definition_at_every_size() -> None:
    assert TREE.root(0) == EMPTY_ROOT
    assert [TREE.root(size) for size in range(MOST + 1)] == [
        root_by_definition(HASHES[:size]) for size in range(MOST + 1)
    ]


@given(st.data())
def test_every_proof_is_short_and_believed_and_no_changed_one_is(data: st.DataObject) -> None:
    size = data.draw(st.integers(1, MOST))
    old, index = data.draw(st.integers(1, size)), data.draw(st.integers(0, size - 1))
    included, continued = TREE.inclusion(index, size), TREE.consistency(old, size)
    verify_inclusion(HASHES[index], index, size, TREE.root(size), included)
    verify_consistency(old, size, TREE.root(old), TREE.root(size), continued)
    assert max(len(included), len(continued) - 1) <= size.bit_length()
    for proof in (included, continued):
        if proof:
            at = data.draw(st.integers(0, len(proof) - 1))
            bit = data.draw(st.integers(0, 255))
            proof[at] = (int.from_bytes(proof[at]) ^ 1 << bit).to_bytes(32)
        else:
            proof.append(bytes(32))
    with pytest.raises(SecurityError):
        verify_inclusion(HASHES[index], index, size, TREE.root(size), included)
    with pytest.raises(SecurityError):
        verify_consistency(old, size, TREE.root(old), TREE.root(size), continued)


def test_node_is_no_leaf() -> None:
    """Second preimage: the halves of a node as the content of one leaf would have the node's hash, but for a prefix."""
    pair = Tree(HASHES[:2])
    assert Tree([leaf_hash(HASHES[0] + HASHES[1])]).root() != pair.root()


@pytest.mark.parametrize(
    "call", [lambda: TREE.root(MOST + 1), lambda: TREE.inclusion(3, 3), lambda: TREE.consistency(4, 3)]
)
def test_tree_proves_nothing_of_leaves_that_it_has_not(call) -> None:
    with pytest.raises(ValueError, match=r"of \d+ leaves"):
        call()


def cases(kind: str) -> list[tuple[str, dict[str, object]]]:
    folder = vectors.FOLDER / "merkle" / "testdata"
    paths = sorted((folder / kind).rglob("*.json"))
    return [(str(path.relative_to(folder)), json.loads(path.read_text())) for path in paths]


def hashes(case: dict[str, object], *names: str) -> list[bytes]:
    return [base64.b64decode(case[name] or "") for name in names]


def check(kind: str, case: dict[str, object]) -> None:
    proof = [base64.b64decode(one) for one in case["proof"] or []]
    if kind == "inclusion":
        leaf, root = hashes(case, "leafHash", "root")
        verify_inclusion(leaf, case["leafIdx"], case["treeSize"], root, proof)
    elif kind == "subtreeinclusion":  # a subtree is a tree by itself
        leaf, root = hashes(case, "leafHash", "root")
        start, width = case["start"], case["end"] - case["start"]
        if width <= 0 or start % (1 << (width - 1).bit_length()):
            raise SecurityError("no subtree")
        verify_inclusion(leaf, case["leafIdx"] - start, width, root, proof)
    elif kind == "consistency":
        verify_consistency(case["size1"], case["size2"], *hashes(case, "root1", "root2"), proof)
    else:
        verify_subtree(case["start"], case["end"], case["size"], *hashes(case, "root1", "root2"), proof)


VECTORS = {"inclusion": 98, "consistency": 98, "subtreeinclusion": 204, "subtreeconsistency": 118}


@vectors.needed
@pytest.mark.parametrize(("kind", "number"), VECTORS.items())
def test_vectors_of_transparency_dev(kind: str, number: int) -> None:
    found = cases(kind)
    assert len(found) == number
    for name, case in found:
        try:
            check(kind, case)
            believed = True
        except SecurityError:
            believed = False
        assert believed != case["wantErr"], name
