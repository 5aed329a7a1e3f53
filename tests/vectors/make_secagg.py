"""Writes the frozen transcripts of secagg/: every message of an attempt, by the second implementation alone.

Usage: python tests/vectors/make_secagg.py, from the repository's root. Only a new protocol version may change them.
"""

import hashlib
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import plain_secagg as plain

SCENARIOS = {
    "pair": {"n": 2, "colluders": 0, "ring_bits": 32},
    "three-of-three": {"n": 3, "colluders": 1, "ring_bits": 16},
    "four-one-drops-after-sharing-keys": {"n": 4, "colluders": 1, "ring_bits": 16, "no_upload": [2]},
    "four-one-drops-after-upload": {"n": 4, "colluders": 1, "ring_bits": 32, "no_consistency": [1]},
    "seven-one-drops-at-each-of-two-stages": {
        "n": 7, "colluders": 2, "ring_bits": 32, "no_shares": [3], "no_upload": [5]
    },
    "second-attempt-of-four-by-three": {"n": 4, "colluders": 1, "ring_bits": 16, "attempt": 2, "no_advert": [0]},
}  # fmt: skip
DIMENSION, SCALARS = 21, 3


def stream(*names: object) -> "hashlib._Hash":
    return hashlib.shake_256("/".join(map(str, names)).encode())


def numbers(count: int, bits: int, n: int, *names: object) -> list[int]:
    """Lanes within the headroom of n summands, the two outermost values among them."""
    most = (2 ** (bits - 1) - 1) // n
    drawn = plain.lanes_of(stream(*names).digest(count * bits // 8), bits)
    return [value % 2**bits for value in (most, -most, *(lane % (2 * most + 1) - most for lane in drawn[2:]))]


def transcript(name: str, scenario: dict) -> dict:
    """Inputs and every message, hexadecimal."""
    seeds = {
        bytes(plain.SigningKey(seed).verify_key): seed
        for seed in (stream(name, i).digest(32) for i in range(scenario["n"]))
    }
    first = sorted(seeds)
    missing = {first[i] for i in scenario.get("no_advert", [])}
    cohort = [member for member in first if member not in missing]
    context = {field: stream(name, field).digest(32) for field in (
        "roster_hash", "contract_hash", "base_model_hash", "state_hash", "round_parameters_hash", "schema_hash"
    )}  # fmt: skip
    context |= {
        "run_id": name, "round": 3, "attempt": scenario.get("attempt", 1), "ring_bits": scenario["ring_bits"],
        "dimension": DIMENSION, "scalars": SCALARS, "colluders": scenario["colluders"], "cohort": cohort,
        "first_cohort": first,
    }  # fmt: skip

    def still(stage: str) -> list[bytes]:
        stages = ["no_shares", "no_upload", "no_consistency"]
        gone = {first[i] for at in stages[: stages.index(stage) + 1] for i in scenario.get(at, [])}
        return [member for member in cohort if member not in gone]

    entropy_bytes = 96 + 128 * (plain.threshold(context) - 1)
    members = {
        member: {
            "seed": seeds[member],
            "entropy": stream(name, member.hex(), "entropy").digest(entropy_bytes),
            "lanes": numbers(DIMENSION, scenario["ring_bits"], len(first), name, member.hex(), "lanes"),
            "scalars": numbers(SCALARS, 64, len(first), name, member.hex(), "scalars"),
        }
        for member in cohort
    }
    clients = {m: plain.Client(context, given["seed"], given["entropy"]) for m, given in members.items()}
    server = plain.Server(context)
    adverts = {m: clients[m].advertise() for m in cohort}
    to_all = server.collect_adverts(list(adverts.values()))
    shares = {m: clients[m].share(to_all) for m in still("no_shares")}
    deliveries = server.collect_shares(list(shares.values()))
    chunks = {m: clients[m].mask(deliveries[m], members[m]["lanes"], members[m]["scalars"]) for m in still("no_upload")}
    uploads = {m: clients[m].declare() for m in chunks}
    survivors = server.collect_uploads({m: (chunks[m], uploads[m]) for m in chunks})
    consistency = {m: clients[m].confirm(survivors) for m in still("no_consistency")}
    signatures = server.collect_consistency(list(consistency.values()))
    releases = {m: clients[m].release(signatures) for m in consistency}
    lanes, scalars = server.unmask(list(releases.values()))
    return {
        "context": context, "ctx": plain.digest_of(context), "members": members, "adverts": adverts,
        "adverts_to_all": to_all, "shares": shares, "deliveries": deliveries, "chunks": chunks, "uploads": uploads,
        "survivors": survivors, "consistency": consistency, "signatures": signatures, "releases": releases,
        "sum": {"lanes": lanes, "scalars": scalars},
    }  # fmt: skip


def readable(value: object) -> object:
    """Bytes as hexadecimal."""
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, dict):
        return {(key.hex() if isinstance(key, bytes) else key): readable(item) for key, item in value.items()}
    return [readable(item) for item in value] if isinstance(value, list) else value


def main() -> None:
    for name, scenario in SCENARIOS.items():
        path = Path(__file__).parent / "secagg" / f"{name}.json"
        path.write_text(json.dumps(readable(transcript(name, scenario)), indent=1) + "\n")


if __name__ == "__main__":
    main()
