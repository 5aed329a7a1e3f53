"""Masks: their keys, and adding or removing them one chunk at a time.

Everything here is a pure function of a chunk's number, so that the caller may use all cores.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from mpctf_secure.hazmat import agreement, prg
from mpctf_secure.hazmat.encoding import enc
from mpctf_secure.hazmat.kdf import hkdf
from mpctf_secure.ids import IdentityKey
from mpctf_secure.secagg.chunks import Lanes, Layout


@dataclass(frozen=True)
class Mask:
    """One keystream and its sign in a masked input; the repr hides the seeds."""

    vector_seed: bytes
    scalar_seed: bytes
    added: bool

    def __repr__(self) -> str:
        return "Mask(…)"


def box_key(binding: bytes, private: bytes, public: bytes, sender: bytes, recipient: bytes) -> bytes:
    """The key of the one box from `sender` to `recipient`; `binding` is enc(ctx, adverts hash)."""
    return hkdf(agreement.exchange(private, public), binding + enc("box", sender, recipient))


def self_mask(binding: bytes, owner: IdentityKey, seed: bytes) -> Mask:
    """The mask that hides an upload whose owner the server may claim dropped; always added."""
    vector, scalars = (hkdf(seed, binding + enc(label, owner)) for label in ("self-vector", "self-scalars"))
    return Mask(vector, scalars, added=True)


def pair_mask(binding: bytes, owner: IdentityKey, private: bytes, peer: IdentityKey, public: bytes) -> Mask:
    """The mask that `owner` shares with `peer`: the lower identity adds it, the higher subtracts it."""
    shared = agreement.exchange(private, public)
    pair = sorted((owner, peer))
    vector, scalars = (hkdf(shared, binding + enc(label, *pair)) for label in ("pair-vector", "pair-scalars"))
    return Mask(vector, scalars, added=owner < peer)


def apply(target: Lanes, masks: Sequence[Mask], layout: Layout, number: int, *, remove: bool = False) -> None:
    """Put the masks on the lanes of chunk `number`, or take them off, in place."""
    is_vector = number < layout.vector_chunks
    scratch = np.empty(target.nbytes, np.uint8)
    for mask in masks:
        seed, chunk = (mask.vector_seed, number) if is_vector else (mask.scalar_seed, 0)
        prg.fill(seed, chunk, scratch)
        (np.add if mask.added != remove else np.subtract)(target, scratch.view(target.dtype), out=target)


@dataclass(frozen=True)
class MaskedInput:
    """What may leave a participant: lanes and scalars under all masks, the same bytes at every reading."""

    layout: Layout
    lanes: Lanes
    scalars: Lanes
    masks: tuple[Mask, ...]

    def __repr__(self) -> str:
        return f"MaskedInput({self.lanes.size} lanes)"

    def chunk(self, number: int) -> bytes:
        """Chunk `number` of the upload; the scalar block is the last."""
        piece = self.layout.cut(number, self.lanes, self.scalars).copy()
        apply(piece, self.masks, self.layout, number)
        return piece.tobytes()

    def chunks(self) -> Iterator[bytes]:
        """All of them in order."""
        return map(self.chunk, range(len(self.layout.sizes)))


def unmask_chunk(pieces: Iterator[bytes], masks: Sequence[Mask], layout: Layout, number: int) -> bytes:
    """Chunk `number` of the true sum, from that chunk of every upload and the masks that are left on their sum."""
    kind = layout.lane_type(number)
    total: Lanes = np.frombuffer(next(pieces), kind).copy()
    for piece in pieces:
        np.add(total, np.frombuffer(piece, kind), out=total)
    apply(total, masks, layout, number, remove=True)
    return total.tobytes()
