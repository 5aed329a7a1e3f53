"""Secure aggregation: seconds, bytes and memory of both ends, and ratios within this very run.

Usage: python benchmarks/secagg.py [--peer flower --peer-python PATH] [--round] [--dimensions D …] [--participants N …]

Each measurement runs in a process of its own, so that its peak memory is its own. The figures at the end are for
d = 20 million, n = 10 and one dropout, in the 16-bit ring.
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from secagg_round import compare

from mpctf_secure.coordinator.spool import Spool
from mpctf_secure.hazmat.kdf import sha256
from mpctf_secure.ids import IdentityKey
from mpctf_secure.parallel import CORES, ordered_map
from mpctf_secure.quorum import default_colluders
from mpctf_secure.secagg import codec
from mpctf_secure.secagg.chunks import Layout
from mpctf_secure.secagg.masks import Mask, MaskedInput
from mpctf_secure.secagg.parameters import Context, floor

MAIN = {"dimension": 20_000_000, "participants": 10, "bits": 16}
TENSOR = 1 << 16
REPEATS, LONG_SECONDS = 5, 5.0


def context(dimension: int, participants: int, bits: int, scalars: int) -> Context:
    """A context of made-up members."""
    cohort = tuple(sorted(IdentityKey(sha256(bytes([i]))) for i in range(participants)))
    hashes = {name: bytes(32) for name in Context.__dataclass_fields__ if name.endswith("_hash")}
    return Context(
        run_id="bench", round=1, attempt=1, ring_bits=bits, dimension=dimension, scalars=scalars,
        colluders=default_colluders(participants), cohort=cohort, first_cohort=cohort, **hashes,
    )  # fmt: skip


def tensors(dimension: int) -> tuple[int, ...]:
    """Sizes like those of LoRA tensors."""
    full, rest = divmod(dimension, TENSOR)
    return (TENSOR,) * full + (rest,) * (rest > 0)


def masks(count: int) -> tuple[Mask, ...]:
    """Fresh ones."""
    return tuple(Mask(os.urandom(32), os.urandom(32), added=i % 2 == 0) for i in range(count))


def best(work: Callable[[], object]) -> float:
    """The least seconds of a few calls, of fewer where they take long."""
    times: list[float] = []
    while len(times) < REPEATS and sum(times) < LONG_SECONDS:
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return min(times)


def measure_client(dimension: int, participants: int, bits: int, **_: object) -> dict[str, float]:
    """Quantise and mask one update, chunk by chunk, as a participant does while it sends."""
    sizes = tensors(dimension)
    grid = codec.Grid(sizes, (4e-3,) * len(sizes), bits, participants)
    update = np.random.default_rng(0).standard_normal(dimension, dtype=np.float32)
    update *= np.float32(1e-3)
    layout = Layout(bits, dimension, 3 + len(sizes))
    lanes, _ = codec.encode(update, 0.7, grid, bytes(32), ordered_map)
    masked = MaskedInput(layout, lanes, np.zeros(layout.scalars, "<u8"), masks(participants))

    def mask() -> None:
        for _ in ordered_map(masked.chunk, range(len(layout.sizes))):
            pass

    encode_seconds = best(lambda: codec.encode(update, 0.7, grid, bytes(32), ordered_map))
    mask_seconds = best(mask)
    return {
        "encode": encode_seconds,
        "mask": mask_seconds,
        "keystream_rate": participants * layout.size / mask_seconds,
        "bytes_up_per_coordinate": layout.size / dimension,
        "memory": peak_memory(),
    }


def measure_server(dimension: int, participants: int, bits: int, dropouts: int) -> dict[str, float]:
    """Add the spooled uploads and take off the masks that are left, from disk to disk; then the next state."""
    sizes = tensors(dimension)
    grid = codec.Grid(sizes, (4e-3,) * len(sizes), bits, participants)
    setting = context(dimension, participants, bits, 3 + len(sizes))
    survivors = setting.cohort[: participants - dropouts]
    noise = os.urandom(max(setting.layout.sizes))
    with tempfile.TemporaryDirectory() as folder:
        spool = Spool(Path(folder) / "spool", setting)
        for owner in survivors:
            with (Path(folder) / "spool" / f"{owner.hex()}.masked").open("wb") as stream:
                for size in setting.layout.sizes:
                    stream.write(noise[:size])
        left = masks(len(survivors) + dropouts * len(survivors))
        target = Path(folder) / "sum"
        seconds = best(lambda: spool.open_sum(survivors, left, target))
        adapter = np.zeros(dimension, np.float32)
        lanes, _ = spool.load_sum(target)
        mean = codec.decode_mean(lanes, len(survivors), 1, grid, ordered_map)
        mean += adapter
    return {"unmask": seconds, "memory": peak_memory(), "vectors": peak_memory() / (4 * dimension)}


def peak_memory() -> float:
    """Bytes above what the imports took."""
    return memory("VmHWM") - BASELINE


def memory(field: str) -> float:
    """Bytes from /proc/self/status; unlike ru_maxrss it does not begin with the parent's."""
    return 1024.0 * int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])  # type: ignore[index]


def openssl_rate() -> float:
    """Bytes a second of AES-256-CTR on as many cores."""
    argv = ["openssl", "speed", "-mr", "-multi", str(CORES), "-evp", "aes-256-ctr", "-bytes", "262144", "-seconds", "3"]
    printed = subprocess.run(argv, check=True, capture_output=True, text=True).stdout
    return float(re.findall(r"\+F:\d+:[^:]+:([\d.]+)", printed)[-1])


def in_child(kind: str, **setting: int) -> dict[str, float]:
    """Run one measurement in a fresh process."""
    argv = [sys.executable, __file__, "--measure", kind, json.dumps(setting)]
    return json.loads(subprocess.run(argv, check=True, capture_output=True, text=True).stdout)


def table(dimensions: list[int], cohorts: list[int]) -> None:
    """Seconds and memory over a grid of settings."""
    print("\n| d | ring | n | dropouts | encode s | mask s | unmask s | client MB | server MB |")
    print("|---|---|---|---|---|---|---|---|---|")
    for dimension in dimensions:
        for bits in (16, 32):
            for n in cohorts:
                client = in_child("client", dimension=dimension, participants=n, bits=bits)
                most = n - floor(n, default_colluders(n))
                for dropouts in sorted({min(n * share // 100, most) for share in (0, 10, 30)}):
                    server = in_child("server", dimension=dimension, participants=n, bits=bits, dropouts=dropouts)
                    cells = (
                        f"{dimension / 1e6:g}M", bits, n, dropouts, f"{client['encode']:.3f}", f"{client['mask']:.3f}",
                        f"{server['unmask']:.3f}", f"{client['memory'] / 1e6:.0f}", f"{server['memory'] / 1e6:.0f}",
                    )  # fmt: skip
                    print("|", " | ".join(map(str, cells)), "|", flush=True)


def figures(peer_python: str | None, *, with_round: bool) -> bool:
    """Print the figures that must be reached; whether all are."""
    client, server = in_child("client", **MAIN), in_child("server", **MAIN, dropouts=1)
    openssl = openssl_rate()
    more = in_child("server", **{**MAIN, "participants": 30}, dropouts=1)
    rows: list[tuple[str, float, str, float, bool]] = []
    if peer_python:
        argv = [peer_python, str(Path(__file__).with_name("flower_peer.py")), str(MAIN["dimension"]), "10", "1"]
        environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
        peer = json.loads(subprocess.run(argv, check=True, capture_output=True, text=True, env=environment).stdout)
        ours = client["encode"] + client["mask"]
        print(f"\nFlower 1.42: client {peer['client']:.2f} s, server {peer['server']:.2f} s")
        rows.append(("client encode + mask, times faster than Flower", peer["client"] / ours, "≥", 20, True))
        rows.append(("server unmask, times faster than Flower", peer["server"] / server["unmask"], "≥", 15, True))
    rows.append(("mask keystream as a share of openssl's", client["keystream_rate"] / openssl, "≥", 0.6, True))
    rows.append(("bytes up as a share of the bf16 update", client["bytes_up_per_coordinate"] / 2, "≤", 1.01, False))
    rows.append(("server memory in float32 vectors, n = 10", server["vectors"], "≤", 4, False))
    rows.append(("server memory at n = 30 over n = 10", more["memory"] / server["memory"], "≤", 1.1, False))
    if with_round:
        secure, clear = compare(MAIN["dimension"], MAIN["participants"])
        print(f"round on loopback: secure {secure:.2f} s, in the clear {clear:.2f} s")
        rows.append(("secure round over the same in the clear", secure / clear, "≤", 1.25, False))
    print(
        f"client: encode {client['encode']:.3f} s, mask {client['mask']:.3f} s; server: unmask {server['unmask']:.3f} s"
    )
    print(f"keystream {client['keystream_rate'] / 1e9:.1f} GB/s, openssl {openssl / 1e9:.1f} GB/s on {CORES} cores")
    print("\n| figure | seen | must be | |\n|---|---|---|---|")
    for name, seen, sign, bound, at_least in rows:
        reached = seen >= bound if at_least else seen <= bound
        print(f"| {name} | {seen:.3g} | {sign} {bound} | {'reached' if reached else 'MISSED'} |")
    return all((seen >= bound) if at_least else (seen <= bound) for _, seen, _, bound, at_least in rows)


def machine() -> str:
    """One line about where this runs."""
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return f"{CORES} cores, {cpu[1] if cpu else platform.machine()}, Python {platform.python_version()}"


def main() -> int:
    """Parse, measure, print; 1 if a figure is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", nargs=2, metavar=("KIND", "SETTING"), help=argparse.SUPPRESS)
    parser.add_argument("--peer", choices=["flower"])
    parser.add_argument("--peer-python", default=".venv-flower/bin/python", help="an interpreter that has flwr")
    parser.add_argument("--round", action="store_true", help="also whole rounds on loopback")
    parser.add_argument("--dimensions", type=int, nargs="*", default=[1_000_000, 20_000_000])
    parser.add_argument("--participants", type=int, nargs="*", default=[3, 10, 30, 100])
    options = parser.parse_args()
    if options.measure:
        measure: dict[str, Callable[..., Any]] = {"client": measure_client, "server": measure_server}
        print(json.dumps(measure[options.measure[0]](**json.loads(options.measure[1]))))
        return 0
    print(machine())
    reached = figures(options.peer_python if options.peer else None, with_round=options.round)
    table(options.dimensions, options.participants)
    return 0 if reached else 1


BASELINE = memory("VmRSS")

if __name__ == "__main__":
    sys.exit(main())
