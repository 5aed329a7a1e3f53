"""A second implementation of secagg/PROTOCOL.md: slow, literal, and without a line of the package.

Lanes are lists of Python integers. Section numbers are those of PROTOCOL.md. `Refused` stands for every check.
"""

import hashlib
import hmac

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from nacl.exceptions import BadSignatureError
from nacl.signing import SigningKey, VerifyKey

P = 2**256 + 297
CHUNK = 2**20


class Refused(Exception):  # noqa: N818
    """A check of section 8 failed."""


def check(condition: bool, what: str) -> None:
    if not condition:
        raise Refused(what)


# --- 1 Notation


def sha(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def enc(*fields) -> bytes:
    out = b""
    for value in fields:
        raw = value.encode() if isinstance(value, str) else value
        raw = raw.to_bytes(8, "big") if isinstance(raw, int) else raw
        out += len(raw).to_bytes(4, "big") + raw
    return out


def seq(items) -> bytes:
    items = list(items)
    return len(items).to_bytes(4, "big") + enc(*items)


def take(data: bytes) -> tuple[bytes, bytes]:
    """One field and the rest."""
    size = int.from_bytes(data[:4], "big")
    check(len(data) >= 4 + size, "field cut short")
    return data[4 : 4 + size], data[4 + size :]


def take_all(data: bytes, count: int) -> list[bytes]:
    fields = []
    for _ in range(count):
        value, data = take(data)
        fields.append(value)
    check(data == b"", "trailing bytes")
    return fields


def take_seq(data: bytes) -> tuple[list[bytes], bytes]:
    count, data, items = int.from_bytes(data[:4], "big"), data[4:], []
    check(count <= 100, "too many items")
    for _ in range(count):
        item, data = take(data)
        items.append(item)
    return items, data


def only_seq(data: bytes) -> list[bytes]:
    items, rest = take_seq(data)
    check(rest == b"", "trailing bytes")
    return items


def hkdf(ikm: bytes, info: bytes) -> bytes:
    """RFC 5869 with the empty salt; one block of output."""
    pseudo_random_key = hmac.new(bytes(32), ikm, hashlib.sha256).digest()
    return hmac.new(pseudo_random_key, info + b"\x01", hashlib.sha256).digest()


# --- 2 Context, 3 Thresholds


def threshold(c: dict) -> int:
    return (len(c["first_cohort"]) + c["colluders"]) // 2 + 1


def floor(c: dict) -> int:
    return 2 if c["colluders"] == 0 else max(threshold(c), c["colluders"] + 2, 3)


def digest_of(c: dict) -> bytes:
    fields = ["mpctf-secure/secagg/v1", c["run_id"], c["round"], c["attempt"], c["roster_hash"], c["contract_hash"]]
    fields += [c["base_model_hash"], c["state_hash"], c["round_parameters_hash"], c["schema_hash"], c["ring_bits"]]
    fields += [c["dimension"], c["scalars"], c["colluders"], threshold(c)]
    return sha(enc(*fields) + seq(c["cohort"]) + seq(c["first_cohort"]))


# --- 4 Messages


def sign(key: SigningKey, label: str, ctx: bytes, body: bytes) -> bytes:
    sender = bytes(key.verify_key)
    return enc(label, ctx, sender, body, key.sign(enc(label, ctx, sender, body)).signature)


def open_signed(message: bytes, label: str, ctx: bytes) -> tuple[bytes, bytes]:
    """(sender, body)."""
    got_label, got_ctx, sender, body, signature = take_all(message, 5)
    check((got_label, got_ctx) == (label.encode(), ctx), "another label or context")
    try:
        VerifyKey(sender).verify(enc(label, ctx, sender, body), signature)
    except (BadSignatureError, ValueError) as error:
        raise Refused("signature") from error
    return sender, body


def commitment(ctx: bytes, dealer: bytes, recipient: bytes, kind: str, value: bytes) -> bytes:
    return sha(enc("commitment", ctx, dealer, recipient, kind, value))


def read_adverts(c: dict, adverts: bytes) -> dict[bytes, tuple[bytes, bytes]]:
    found: dict[bytes, tuple[bytes, bytes]] = {}
    keys: list[bytes] = []
    for message in only_seq(adverts):
        sender, body = open_signed(message, "advert", digest_of(c))
        check(sender in c["cohort"] and all(sender > other for other in found), "advert out of place")
        mask_key, share_key = take_all(body, 2)
        for public in (mask_key, share_key):
            check(len(public) == 32 and int.from_bytes(public, "little") < 2**255 - 19, "key not canonical")
            check(public not in keys, "key used twice")
            exchange(b"\x09" * 32, public)  # refuses low order
            keys.append(public)
        found[sender] = mask_key, share_key
    return found


def read_dealing(u1: list[bytes], body: bytes) -> dict:
    adverts_hash, rest = take(body)
    of_b, rest = take(rest)
    shares_of_b, rest = take_seq(rest)
    shares_of_key, rest = take_seq(rest)
    boxes, rest = take_seq(rest)
    check(rest == b"", "trailing bytes")
    check([len(shares_of_b), len(shares_of_key), len(boxes) + 1] == [len(u1)] * 3, "dealing of another size")
    return {"adverts": adverts_hash, "b": of_b, "self-mask": shares_of_b, "mask-key": shares_of_key, "boxes": boxes}


def read_dealings(c: dict, u1: list[bytes], adverts_hash: bytes, messages: list[bytes]) -> dict[bytes, dict]:
    found: dict[bytes, dict] = {}
    for message in messages:
        sender, body = open_signed(message, "shares", digest_of(c))
        check(sender in u1 and all(sender > other for other in found), "dealing out of place")
        found[sender] = read_dealing(u1, body)
        check(found[sender]["adverts"] == adverts_hash, "a dealer saw other adverts")
    return found


# --- 5 Keys


def public_key(private: bytes) -> bytes:
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def exchange(private: bytes, public: bytes) -> bytes:
    try:
        return X25519PrivateKey.from_private_bytes(private).exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError as error:
        raise Refused("low order") from error


def deal(secret: bytes, coefficients: bytes, points: int) -> list[bytes]:
    numbers = [int.from_bytes(secret, "big")]
    for start in range(0, len(coefficients), 64):
        numbers.append(int.from_bytes(coefficients[start : start + 64], "big") % P)
    return [
        (sum(number * pow(x, power, P) for power, number in enumerate(numbers)) % P).to_bytes(33, "big")
        for x in range(1, points + 1)
    ]


def combine(shares: dict[int, bytes]) -> bytes | None:
    """Lagrange at zero; None for 2²⁵⁶ or more."""
    total = 0
    for x, share in shares.items():
        weight = int.from_bytes(share, "big")
        for other in shares:
            if other != x:
                weight = weight * other * pow(other - x, -1, P) % P
        total = (total + weight) % P
    return total.to_bytes(32, "big") if total < 2**256 else None


def pair_seeds(binding: bytes, private: bytes, public: bytes, a: bytes, b: bytes) -> tuple[bytes, bytes]:
    secret = exchange(private, public)
    lower, higher = sorted([a, b])
    return tuple(hkdf(secret, binding + enc(label, lower, higher)) for label in ("pair-vector", "pair-scalars"))  # type: ignore[return-value]


def self_seeds(binding: bytes, b: bytes, owner: bytes) -> tuple[bytes, bytes]:
    return tuple(hkdf(b, binding + enc(label, owner)) for label in ("self-vector", "self-scalars"))  # type: ignore[return-value]


# --- 6 Vector and masks


def keystream(seed: bytes, chunk: int, size: int) -> bytes:
    start = chunk.to_bytes(12, "big") + (2).to_bytes(4, "big")
    return Cipher(algorithms.AES(seed), modes.CTR(start)).encryptor().update(bytes(size))


def lanes_of(data: bytes, bits: int) -> list[int]:
    size = bits // 8
    return [int.from_bytes(data[i : i + size], "little") for i in range(0, len(data), size)]


def bytes_of(lanes: list[int], bits: int) -> bytes:
    return b"".join((lane % 2**bits).to_bytes(bits // 8, "little") for lane in lanes)


def prg(seed: bytes, bits: int, count: int) -> list[int]:
    size, out = count * bits // 8, b""
    for chunk in range(-(-size // CHUNK)):
        out += keystream(seed, chunk, min(CHUNK, size - chunk * CHUNK))
    return lanes_of(out, bits)


def plus(lanes: list[int], other: list[int], sign: int, bits: int) -> list[int]:
    return [(a + sign * b) % 2**bits for a, b in zip(lanes, other, strict=True)]


def to_chunks(c: dict, lanes: list[int], scalars: list[int]) -> list[bytes]:
    vector = bytes_of(lanes, c["ring_bits"])
    return [vector[i : i + CHUNK] for i in range(0, len(vector), CHUNK)] + [bytes_of(scalars, 64)]


def chunks_digest(chunks: list[bytes]) -> bytes:
    return sha(b"".join(map(sha, chunks)))


# --- 7 States


class Client:
    """The methods in the order of section 7."""

    def __init__(self, context: dict, signing_seed: bytes, entropy: bytes) -> None:
        self.c, self.ctx, self.t = context, digest_of(context), threshold(context)
        self.key = SigningKey(signing_seed)
        self.me = bytes(self.key.verify_key)
        assert len(entropy) == 96 + 128 * (self.t - 1)
        self.mask_private, self.share_private, self.b = entropy[:32], entropy[32:64], entropy[64:96]
        half = 96 + 64 * (self.t - 1)
        self.for_b, self.for_key = entropy[96:half], entropy[half:]

    def advertise(self) -> bytes:
        body = enc(public_key(self.mask_private), public_key(self.share_private))
        self.advert = sign(self.key, "advert", self.ctx, body)
        return self.advert

    def share(self, adverts: bytes) -> bytes:
        self.keys = read_adverts(self.c, adverts)
        check(len(self.keys) >= floor(self.c) and self.advert in only_seq(adverts), "U1")
        self.u1, self.adverts_hash = sorted(self.keys), sha(adverts)
        self.binding = enc(self.ctx, self.adverts_hash)
        of_b = deal(self.b, self.for_b, len(self.c["first_cohort"]))
        of_key = deal(self.mask_private, self.for_key, len(self.c["first_cohort"]))
        x = {member: self.c["first_cohort"].index(member) for member in self.u1}
        self.held = {self.me: (of_b[x[self.me]], of_key[x[self.me]])}
        boxes = [self.seal(m, enc(of_b[x[m]], of_key[x[m]])) for m in self.u1 if m != self.me]
        body = enc(self.adverts_hash, commitment(self.ctx, self.me, b"", "self-mask-seed", self.b))
        body += seq(commitment(self.ctx, self.me, m, "self-mask", of_b[x[m]]) for m in self.u1)
        body += seq(commitment(self.ctx, self.me, m, "mask-key", of_key[x[m]]) for m in self.u1)
        body += seq(map(sha, boxes))
        self.dealing = sign(self.key, "shares", self.ctx, body)
        return enc(self.dealing) + seq(boxes)

    def box(self, sender: bytes, recipient: bytes) -> tuple[ChaCha20Poly1305, bytes]:
        peer = recipient if sender == self.me else sender
        names = enc("box", sender, recipient)
        key = hkdf(exchange(self.share_private, self.keys[peer][1]), self.binding + names)
        return ChaCha20Poly1305(key), self.binding + names

    def seal(self, recipient: bytes, plaintext: bytes) -> bytes:
        cipher, associated = self.box(self.me, recipient)
        return cipher.encrypt(bytes(12), plaintext, associated)

    def mask(self, delivery: bytes, lanes: list[int], scalars: list[int]) -> list[bytes]:
        messages, rest = take_seq(delivery)
        boxes = only_seq(rest)
        check(self.dealing in messages, "my dealing")
        dealings = read_dealings(self.c, self.u1, self.adverts_hash, messages)
        others = [dealer for dealer in dealings if dealer != self.me]
        check(len(others) == len(boxes) and len(dealings) >= floor(self.c), "U2")
        for dealer, box in zip(others, boxes, strict=True):
            self.held[dealer] = self.open(dealer, dealings[dealer], box)
        seeds = [(1, self_seeds(self.binding, self.b, self.me))]
        for peer in others:
            sign_of_mask = 1 if self.me < peer else -1
            seeds.append((sign_of_mask, pair_seeds(self.binding, self.mask_private, self.keys[peer][0], self.me, peer)))
        for sign_of_mask, (vector, block) in seeds:
            lanes = plus(lanes, prg(vector, self.c["ring_bits"], len(lanes)), sign_of_mask, self.c["ring_bits"])
            scalars = plus(scalars, prg(block, 64, len(scalars)), sign_of_mask, 64)
        chunks = to_chunks(self.c, lanes, scalars)
        self.digest = chunks_digest(chunks)
        return chunks

    def open(self, dealer: bytes, dealing: dict, box: bytes) -> tuple[bytes, bytes]:
        boxed_to = [member for member in self.u1 if member != dealer]
        check(sha(box) == dealing["boxes"][boxed_to.index(self.me)], "box")
        cipher, associated = self.box(dealer, self.me)
        try:
            of_b, of_key = take_all(cipher.decrypt(bytes(12), box, associated), 2)
        except InvalidTag as error:
            raise Refused("box does not open") from error
        mine = self.u1.index(self.me)
        for kind, share in (("self-mask", of_b), ("mask-key", of_key)):
            check(len(share) == 33 and int.from_bytes(share, "big") < P, "share")
            check(commitment(self.ctx, dealer, self.me, kind, share) == dealing[kind][mine], "commitment")
        return of_b, of_key

    def complain(self, dealer: bytes) -> bytes:
        return sign(self.key, "complaint", self.ctx, enc(dealer))

    def declare(self) -> bytes:
        return sign(self.key, "upload", self.ctx, enc(self.digest))

    def confirm(self, survivors: bytes) -> bytes:
        self.claim = survivors
        adverts_hash, rest = take(survivors)
        u2, rest = take_seq(rest)
        self.u3, rest = take_seq(rest)
        digests = only_seq(rest)
        check(adverts_hash == self.adverts_hash and u2 == sorted(self.held), "tuple")
        check(self.u3 == sorted(set(self.u3)) and set(self.u3) <= set(u2), "U3")
        check(self.me in self.u3 and digests[self.u3.index(self.me)] == self.digest, "mine")
        check(len(self.u3) >= floor(self.c), "floor")
        return sign(self.key, "consistency", self.ctx, survivors)

    def release(self, signatures: bytes) -> bytes:
        signers = []
        for message in only_seq(signatures):
            sender, body = open_signed(message, "consistency", self.ctx)
            check(sender in self.u3 and body == self.claim, "another tuple")
            signers.append(sender)
        check(signers == sorted(set(signers)), "signers out of order")
        check(len(signers) >= self.t, "fewer than t")
        gone = [member for member in sorted(self.held) if member not in self.u3]
        body = seq(self.held[m][0] for m in self.u3) + seq(self.held[m][1] for m in gone)
        return sign(self.key, "release", self.ctx, body)


class Server:
    """One method for each stage, with all its messages at once."""

    def __init__(self, context: dict) -> None:
        self.c, self.ctx, self.t = context, digest_of(context), threshold(context)

    def collect_adverts(self, messages: list[bytes]) -> bytes:
        by_sender = {open_signed(m, "advert", self.ctx)[0]: m for m in messages}
        self.adverts = seq(by_sender[sender] for sender in sorted(by_sender))
        self.keys = read_adverts(self.c, self.adverts)
        check(len(self.keys) >= floor(self.c), "U1")
        self.u1, self.adverts_hash = sorted(self.keys), sha(self.adverts)
        return self.adverts

    def collect_shares(self, messages: list[bytes]) -> dict[bytes, bytes]:
        parts = {}
        for message in messages:
            dealing, rest = take(message)
            parts[open_signed(dealing, "shares", self.ctx)[0]] = dealing, only_seq(rest)
        self.u2 = sorted(parts)
        check(len(self.u2) >= floor(self.c), "U2")
        signed = [parts[dealer][0] for dealer in self.u2]
        self.dealings = read_dealings(self.c, self.u1, self.adverts_hash, signed)
        for dealer in self.u2:
            check(list(map(sha, parts[dealer][1])) == self.dealings[dealer]["boxes"], "boxes")
        deliveries = {}
        for member in self.u2:
            boxes = []
            for dealer in self.u2:
                if dealer != member:
                    boxes.append(parts[dealer][1][[m for m in self.u1 if m != dealer].index(member)])
            deliveries[member] = seq(signed) + seq(boxes)
        return deliveries

    def collect_uploads(self, uploads: dict[bytes, tuple[list[bytes], bytes]]) -> bytes:
        self.uploads = {}
        for member, (chunks, message) in uploads.items():
            sender, body = open_signed(message, "upload", self.ctx)
            check(sender == member and member in self.u2, "sender")
            check(take_all(body, 1) == [chunks_digest(chunks)], "digest")
            self.uploads[member] = chunks
        self.u3 = sorted(self.uploads)
        check(len(self.u3) >= floor(self.c), "U3")
        digests = [chunks_digest(self.uploads[member]) for member in self.u3]
        self.claim = enc(self.adverts_hash) + seq(self.u2) + seq(self.u3) + seq(digests)
        return self.claim

    def collect_consistency(self, messages: list[bytes]) -> bytes:
        by_sender = {}
        for message in messages:
            sender, body = open_signed(message, "consistency", self.ctx)
            check(sender in self.u3 and body == self.claim, "tuple")
            by_sender[sender] = message
        check(len(by_sender) >= self.t, "fewer than t")
        return seq(by_sender[sender] for sender in sorted(by_sender))

    def unmask(self, messages: list[bytes]) -> tuple[list[int], list[int]]:
        gone = [member for member in self.u2 if member not in self.u3]
        released: dict[bytes, dict[bytes, bytes]] = {}
        for message in messages:
            sender, body = open_signed(message, "release", self.ctx)
            of_b, rest = take_seq(body)
            of_key = only_seq(rest)
            check(sender in self.u3 and (len(of_b), len(of_key)) == (len(self.u3), len(gone)), "release")
            released[sender] = dict(zip(self.u3 + gone, of_b + of_key, strict=True))
            for owner, share in released[sender].items():
                kind = "self-mask" if owner in self.u3 else "mask-key"
                expected = self.dealings[owner][kind][self.u1.index(sender)]
                check(commitment(self.ctx, owner, sender, kind, share) == expected, "commitment")
        check(len(released) >= self.t, "fewer than t")
        chosen = sorted(released)[: self.t]
        binding, bits = enc(self.ctx, self.adverts_hash), self.c["ring_bits"]
        lanes, scalars = [0] * self.c["dimension"], [0] * self.c["scalars"]
        for chunks in self.uploads.values():
            lanes = plus(lanes, lanes_of(b"".join(chunks[:-1]), bits), 1, bits)
            scalars = plus(scalars, lanes_of(chunks[-1], 64), 1, 64)
        seeds = []
        for owner in self.u3 + gone:
            x = {self.c["first_cohort"].index(m) + 1: released[m][owner] for m in chosen}
            secret = combine(x)
            if owner in self.u3:
                right = (
                    secret and commitment(self.ctx, owner, b"", "self-mask-seed", secret) == self.dealings[owner]["b"]
                )
                check(bool(right), "bad dealer")
                seeds.append((-1, self_seeds(binding, secret, owner)))  # type: ignore[arg-type]
                continue
            check(secret is not None and public_key(secret) == self.keys[owner][0], "bad dealer")
            for peer in self.u3:
                pair = pair_seeds(binding, secret, self.keys[peer][0], owner, peer)  # type: ignore[arg-type]
                seeds.append((-1 if peer < owner else 1, pair))  # the survivor added it if it is the lower
        for sign_of_mask, (vector, block) in seeds:
            lanes = plus(lanes, prg(vector, bits, len(lanes)), sign_of_mask, bits)
            scalars = plus(scalars, prg(block, 64, len(scalars)), sign_of_mask, 64)
        return lanes, scalars


# --- 9 Bad dealer


def convict(c: dict, proof: bytes) -> bytes:
    """The dealer that a proof convicts."""
    adverts, rest = take(proof)
    dealing_message, rest = take(rest)
    kind, rest = take(rest)
    holders, rest = take_seq(rest)
    shares = only_seq(rest)
    keys = read_adverts(c, adverts)
    u1 = sorted(keys)
    (dealer, dealing), *_ = read_dealings(c, u1, sha(adverts), [dealing_message]).items()
    check(kind in {b"self-mask", b"mask-key"} and holders == sorted(set(holders)), "form")
    check(len(holders) == len(shares) == threshold(c) and set(holders) <= set(u1), "holders")
    for holder, share in zip(holders, shares, strict=True):
        expected = dealing[kind.decode()][u1.index(holder)]
        check(commitment(digest_of(c), dealer, holder, kind.decode(), share) == expected, "commitment")
    x = {c["first_cohort"].index(holder) + 1: share for holder, share in zip(holders, shares, strict=True)}
    secret = combine(x)
    if kind == b"self-mask":
        innocent = secret and commitment(digest_of(c), dealer, b"", "self-mask-seed", secret) == dealing["b"]
    else:
        innocent = secret and public_key(secret) == keys[dealer][0]
    check(not innocent, "the dealer did nothing wrong")
    return dealer
