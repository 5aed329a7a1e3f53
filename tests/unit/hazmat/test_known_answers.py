"""Published vectors: RFC 7748, 5869, 8032 and 8439, SP 800-38A and 38D, and Project Wycheproof where it is on disk."""

import json
import os
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305

from mpctf_secure.errors import SecurityError
from mpctf_secure.hazmat import aead, agreement, signature
from mpctf_secure.hazmat.kdf import hkdf
from mpctf_secure.hazmat.prg import CHUNK_BYTES, Generator, keystream

unhex = bytes.fromhex
WYCHEPROOF = Path(
    os.environ.get("MPCTF_VECTORS", Path(__file__).parents[3].parent / "shared" / "vectors") / Path("wycheproof")
)


def wycheproof(name: str) -> list[tuple[dict, dict]]:
    path = WYCHEPROOF / name
    if not path.exists():
        pytest.skip(f"{path} is not here")
    groups = json.loads(path.read_text())["testGroups"]
    return [(group, case) for group in groups for case in group["tests"]]


def test_x25519_after_one_iteration_of_rfc_7748_section_5_2() -> None:
    start = unhex("09" + 31 * "00")
    assert agreement.exchange(start, start).hex() == "422c8e7a6227d7bca1350b3e2bb7279f7897b87bb6854b783c60e80311ae3079"


def test_hkdf_of_rfc_5869_case_3_which_has_no_salt() -> None:
    okm = "8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d9d201395faa4b61a96c8"
    assert hkdf(b"\x0b" * 22, b"", 42).hex() == okm


def test_ed25519_of_rfc_8032_test_1() -> None:
    key = signature.SigningKey(unhex("9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60"))
    assert key.public.hex() == "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a"
    expected = (
        "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e065224901555f"
        "b8821590a33bacc61e39701cf9b46bd25bf5f0595bbe24655141438e7a100b"
    )
    assert key.sign(b"").hex() == expected


@pytest.mark.parametrize("chunk", [0, 1, 2**40])
def test_keystream_is_that_of_gcm_over_zeros(chunk: int) -> None:
    seed = bytes(range(32))
    nonce = chunk.to_bytes(12, "big")
    expected = AESGCM(seed).encrypt(nonce, bytes(1000), None)[:1000]
    assert keystream(seed, chunk, 1000).tobytes() == expected


def test_neighbouring_chunks_share_no_block() -> None:
    """A bare chunk counter as counter block would repeat all blocks but one."""
    blocks = [keystream(bytes(32), chunk).tobytes() for chunk in (0, 1)]
    first, second = ({data[i : i + 16] for i in range(0, CHUNK_BYTES, 16)} for data in blocks)
    assert len(first) == len(second) == CHUNK_BYTES // 16
    assert not first & second


def test_generator_is_the_keystream_in_order_and_unbiased_below() -> None:
    generator, seed = Generator(bytes(32)), bytes(32)
    drawn = b"".join(generator.bytes(size).tobytes() for size in (5, CHUNK_BYTES, 7))
    assert drawn == (keystream(seed, 0).tobytes() + keystream(seed, 1).tobytes())[: CHUNK_BYTES + 12]
    counts = [0] * 6
    for _ in range(6000):
        counts[generator.below(6)] += 1
    assert min(counts) > 850
    assert sorted(generator.permutation(50)) == list(range(50))
    bound = (1 << 31) + 1  # nearly half of all draws must be rejected
    assert all(generator.below(bound) < bound for _ in range(20))
    assert {generator.choice("abc") for _ in range(50)} == set("abc")


def test_x25519_of_wycheproof() -> None:
    for _, case in wycheproof("x25519_test.json"):
        try:
            shared = agreement.exchange(unhex(case["private"]), unhex(case["public"])).hex()
        except SecurityError:
            shared = "refused"
        assert shared == ("refused" if int(case["shared"], 16) == 0 else case["shared"]), case["tcId"]


def test_ed25519_of_wycheproof() -> None:
    for group, case in wycheproof("ed25519_test.json"):
        public = unhex(group["publicKey"]["pk"])
        try:
            signature.verify(public, unhex(case["msg"]), unhex(case["sig"]))
            verdict = "valid"
        except SecurityError:
            verdict = "invalid"
        assert verdict == case["result"], case["tcId"]


def test_chacha20_poly1305_of_wycheproof_under_the_zero_nonce() -> None:
    for group, case in wycheproof("chacha20_poly1305_test.json"):
        if group["ivSize"] != 96 or int(case["iv"] or "0", 16) != 0 or case["result"] != "valid":
            continue
        box = unhex(case["ct"] + case["tag"])
        assert aead.open_once(unhex(case["key"]), box, unhex(case["aad"])) == unhex(case["msg"])


def test_small_order_and_non_canonical_ed25519_keys_are_refused() -> None:
    for bad in (bytes(32), b"\x01" + bytes(31), b"\xff" * 32, b"short"):
        with pytest.raises(SecurityError):
            signature.check_public_key(bad)


def test_aes_256_ctr_of_sp_800_38a_f_5_5() -> None:
    """The cipher behind the generator; the generator's own counter blocks end in 2 and are tested above."""
    key = unhex("603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4")
    encryptor = Cipher(algorithms.AES(key), modes.CTR(unhex("f0f1f2f3f4f5f6f7f8f9fafbfcfdfeff"))).encryptor()
    plaintext = unhex("6bc1bee22e409f96e93d7e117393172aae2d8a571e03ac9c9eb76fac45af8e51")
    assert encryptor.update(plaintext).hex() == "601ec313775789a5b7a7f504bbf3d228f443e3ca4d62b59aca84e990cacaf5c5"


def test_chacha20_poly1305_of_rfc_8439_section_2_8_2() -> None:
    """The cipher behind the boxes, whose own nonce is zero."""
    message = b"Ladies and Gentlemen of the class of '99: If I could offer you only one tip for the future, "
    message += b"sunscreen would be it."
    cipher, nonce = ChaCha20Poly1305(bytes(range(0x80, 0xA0))), unhex("070000004041424344454647")
    sealed = cipher.encrypt(nonce, message, unhex("50515253c0c1c2c3c4c5c6c7"))
    assert sealed[:16].hex() == "d31a8d34648e60db7b86afbc53ef7ec2"
    assert sealed[-16:].hex() == "1ae10b594f09e26a7e902ecbd0600691"
