import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pynvml
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mpctf_secure.errors import DecodeError, EnvironmentUnfitError
from mpctf_secure.monitoring import resources
from mpctf_secure.monitoring.resources import MOST_BYTES, MOST_GPUS, Gpu, Resources, Sampler, coarsen, free_memory

GIB = 1 << 30
MOST = 1 << 64

SIZES = st.integers(0, MOST)
SHARES = st.floats(0, 1)
GPUS = st.builds(
    Gpu,
    index=st.integers(0, MOST_GPUS - 1),
    name=st.text(max_size=96),
    memory_used=SIZES | st.none(),
    memory_total=SIZES | st.none(),
    use=SHARES | st.none(),
    temperature=st.integers(0, (1 << 32) - 1) | st.none(),
)
SAMPLES = st.builds(Resources, SHARES, *[SIZES] * 6, st.lists(GPUS, max_size=3).map(tuple))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)

GPU = Gpu(0, "NVIDIA H200", 9 * GIB, 141 * GIB, 0.4, 61)
SAMPLE = Resources(0.4, 5 * GIB, 31 * GIB, 100 * GIB + 1, 512 * GIB, 1000, 0, (GPU,))


class NVMLError(Exception):
    pass


def refuse(*_: object) -> None:
    raise NVMLError


def refuse_second(answer: object) -> Callable[..., object]:
    return lambda handle, *_: answer if handle == "gpu 0" else refuse()


def driver(**others: object) -> SimpleNamespace:
    """NVIDIA's library with two GPUs."""
    functions = {
        "NVMLError": NVMLError,
        "NVML_TEMPERATURE_GPU": 0,
        "nvmlInit": lambda: None,
        "nvmlDeviceGetCount": lambda: 2,
        "nvmlDeviceGetHandleByIndex": lambda index: f"gpu {index}",
        "nvmlDeviceGetName": lambda handle: f"NVIDIA {handle}",
        "nvmlDeviceGetMemoryInfo": lambda _: SimpleNamespace(used=2 * GIB, total=8 * GIB),
        "nvmlDeviceGetUtilizationRates": lambda _: SimpleNamespace(gpu=75, memory=10),
        "nvmlDeviceGetTemperature": lambda _, sensor: 50 + sensor,
    }
    assert functions.keys() <= vars(pynvml).keys()
    assert others.keys() <= functions.keys()
    return SimpleNamespace(**functions | others)


def gpus(monkeypatch: pytest.MonkeyPatch, library: SimpleNamespace | None, folder: Path) -> tuple[Gpu, ...]:
    monkeypatch.setitem(sys.modules, "pynvml", library)
    return Sampler(folder).sample().gpus


def test_every_gpu_tells_what_it_can(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shy = driver(
        nvmlDeviceGetTemperature=refuse_second(50),
        nvmlDeviceGetUtilizationRates=refuse_second(SimpleNamespace(gpu=0, memory=0)),
    )
    assert gpus(monkeypatch, shy, tmp_path) == (
        Gpu(0, "NVIDIA gpu 0", 2 * GIB, 8 * GIB, 0.0, 50),
        Gpu(1, "NVIDIA gpu 1", 2 * GIB, 8 * GIB, None, None),
    )


def test_lost_gpu_keeps_its_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    library = driver(nvmlDeviceGetHandleByIndex=lambda index: refuse() if index == 0 else f"gpu {index}")
    lost, other = gpus(monkeypatch, library, tmp_path)
    assert lost == Gpu(0, "", None, None, None, None)
    assert other == Gpu(1, "NVIDIA gpu 1", 2 * GIB, 8 * GIB, 0.75, 50)


@pytest.mark.parametrize("library", [None, driver(nvmlInit=refuse), driver(nvmlDeviceGetCount=refuse)])
def test_no_library_no_driver_no_gpus(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, library: SimpleNamespace | None
) -> None:
    assert gpus(monkeypatch, library, tmp_path) == ()
    assert free_memory([]) > 0
    with pytest.raises(EnvironmentUnfitError, match="no GPU 0: this machine has 0"):
        free_memory([0])


def test_name_that_is_no_text_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    library = driver(nvmlDeviceGetName=lambda _: b"\xff".decode())
    assert [gpu.name for gpu in gpus(monkeypatch, library, tmp_path)] == ["", ""]


def test_use_is_never_above_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    library = driver(nvmlDeviceGetUtilizationRates=lambda _: SimpleNamespace(gpu=101, memory=0))
    assert [gpu.use for gpu in gpus(monkeypatch, library, tmp_path)] == [1, 1]


def test_more_gpus_than_can_be_told_of(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert len(gpus(monkeypatch, driver(nvmlDeviceGetCount=lambda: MOST_GPUS + 1), tmp_path)) == MOST_GPUS


def test_this_machine(tmp_path: Path) -> None:
    ticks = iter([0.0, 1e-9])
    sampler = Sampler(tmp_path, lambda: next(ticks))
    first = sampler.sample()
    assert (first.cpu, first.sent, first.received) == (0, 0, 0)
    assert 0 < first.memory_used < first.memory_total <= psutil.virtual_memory().total
    assert 0 < first.disk_free < first.disk_total
    sum(range(3_000_000))  # longer than the kernel's tick
    assert sampler.sample().cpu == 1  # within the nanosecond that the clock tells
    assert Resources.from_json(first.to_json()) == first
    assert 0 < free_memory([]) <= first.memory_total


def test_folder_that_is_gone(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentUnfitError, match="away: No such file"):
        Sampler(tmp_path / "away").sample()


def traffic(*moments: dict[str, tuple[int, int]]) -> Callable[..., dict[str, Any]]:
    left: Iterator[dict[str, tuple[int, int]]] = iter(moments)
    return lambda **_: {
        name: SimpleNamespace(bytes_sent=sent, bytes_recv=received) for name, (sent, received) in next(left).items()
    }


def test_rates_are_per_second_since_the_sample_before(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    moments = (
        {"lo": (0, 0), "eth0": (100, 200), "ib0": (0, 0)},
        {"lo": (9999, 9999), "eth0": (300, 200), "ib0": (10, 40)},
        {"lo": (9999, 9999), "eth0": (300, 208)},  # less in sum: ib0 took its counters with it
        {"lo": (9999, 9999), "eth0": (400, 300)},  # at the same moment
    )
    monkeypatch.setattr(psutil, "net_io_counters", traffic(*moments))
    busy = iter([7.0, 7.5, 9.5, 9.5])
    monkeypatch.setattr(resources, "_cpu_seconds", lambda: next(busy))
    ticks = iter([10.0, 12.0, 16.0, 16.0])
    sampler = Sampler(tmp_path, lambda: next(ticks))
    samples = [sampler.sample() for _ in moments]
    assert [(one.cpu, one.sent, one.received) for one in samples] == [
        (0, 0, 0),
        (0.25, 105, 20),
        (0.5, 0, 0),
        (0, 0, 0),
    ]


def container(monkeypatch: pytest.MonkeyPatch, folder: Path, memory: str, cpu: str) -> None:
    (folder / "memory.max").write_text(f"{memory}\n")
    (folder / "memory.current").write_text("5000\n")
    (folder / "memory.stat").write_text("anon 3000\nfile 2000\ninactive_file 1500\n")
    (folder / "cpu.max").write_text(f"{cpu} 100000\n")
    (folder / "cpu.stat").write_text("usage_usec 3000000\nuser_usec 3000000\nsystem_usec 0\n")
    monkeypatch.setattr(resources, "_CGROUP", folder)


def test_container_counts_as_the_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    container(monkeypatch, tmp_path, "10000", "150000")
    assert resources._memory() == (3500, 10000)
    assert free_memory([]) == 6500
    assert resources._cpu_seconds() == 2.0  # three seconds on a core and a half
    (tmp_path / "memory.current").write_text("1000\n")  # read after the cache had shrunk
    assert resources._memory() == (0, 10000)


@pytest.mark.parametrize("memory", ["max", str(1 << 62)])
def test_container_without_limits_is_the_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, memory: str) -> None:
    container(monkeypatch, tmp_path, memory, "max")
    times = {
        "user": 10,
        "nice": 1,
        "system": 5,
        "idle": 99,
        "iowait": 9,
        "irq": 1,
        "softirq": 2,
        "steal": 1,
        "guest": 4,
    }
    monkeypatch.setattr(psutil, "cpu_times", lambda: SimpleNamespace(**times))
    monkeypatch.setattr(psutil, "cpu_count", lambda: 4)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=20000, available=1000))
    for folder in (tmp_path, tmp_path / "none"):
        monkeypatch.setattr(resources, "_CGROUP", folder)
        assert resources._memory() == (19000, 20000)
        assert resources._cpu_seconds() == 5.0


def test_container_has_no_more_than_the_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    container(monkeypatch, tmp_path, "10000", "max")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=20000, available=1000))
    assert free_memory([]) == 1000


def test_free_memory_of_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", driver())
    assert free_memory([1]) == 6 * GIB
    assert free_memory([0, 1]) == 12 * GIB
    for index in (2, -1):
        with pytest.raises(EnvironmentUnfitError, match=f"no GPU {index}: this machine has 2"):
            free_memory([0, index])
    monkeypatch.setitem(sys.modules, "pynvml", driver(nvmlDeviceGetMemoryInfo=refuse))
    with pytest.raises(EnvironmentUnfitError, match="GPU 1 does not tell"):
        free_memory([1])


@given(SAMPLES)
def test_what_is_written_is_read(sample: Resources) -> None:
    assert Resources.from_json(sample.to_json()) == sample


def decodes_or_refuses(data: bytes) -> None:
    try:
        sample = Resources.from_json(data)
    except DecodeError:
        return
    assert Resources.from_json(sample.to_json()) == sample


@example(b"[" * MOST_BYTES)
@given(st.binary() | JSON.map(json.dumps).map(str.encode))
def test_anything_gives_a_sample_or_a_decode_error(data: bytes) -> None:
    decodes_or_refuses(data)


@given(st.sampled_from([*json.loads(SAMPLE.to_json())]), JSON)
def test_any_field_gives_a_sample_or_a_decode_error(field: str, value: object) -> None:
    decodes_or_refuses(json.dumps({**json.loads(SAMPLE.to_json()), field: value}).encode())


@given(st.sampled_from([*json.loads(SAMPLE.to_json())["gpus"][0]]), JSON)
def test_any_field_of_a_gpu_gives_a_sample_or_a_decode_error(field: str, value: object) -> None:
    content = json.loads(SAMPLE.to_json())
    content["gpus"][0][field] = value
    decodes_or_refuses(json.dumps(content).encode())


@pytest.mark.parametrize(
    "changes",
    [
        {"cpu": 1.01},
        {"cpu": float("nan")},
        {"cpu": float("inf")},
        {"cpu": "0.5"},
        {"cpu": True},
        {"memory_used": -1},
        {"memory_used": MOST + 1},
        {"memory_used": 1.5},
        {"sent": None},
        {"lunch": 1},
        {"gpus": [vars(GPU)] * (MOST_GPUS + 1)},
        {"gpus": [vars(GPU) | {"name": "x" * 97}]},
        {"gpus": [vars(GPU) | {"use": float("nan")}]},
        {"gpus": [vars(GPU) | {"index": MOST_GPUS}]},
        {"gpus": [vars(GPU) | {"lunch": 1}]},
        {"gpus": [None]},
        {"gpus": {}},
    ],
)
def test_out_of_bounds(changes: dict[str, object]) -> None:
    with pytest.raises(DecodeError, match="cannot be parsed"):
        Resources.from_json(json.dumps({**json.loads(SAMPLE.to_json()), **changes}).encode())


def test_missing_field() -> None:
    for field in json.loads(SAMPLE.to_json()):
        content = json.loads(SAMPLE.to_json())
        del content[field]
        with pytest.raises(DecodeError, match="Field required"):
            Resources.from_json(json.dumps(content).encode())


def test_largest_sample_is_read_and_nothing_longer() -> None:
    gpu = Gpu(MOST_GPUS - 1, "\x01" * 96, MOST, MOST, 0.1 + 0.2, (1 << 32) - 1)
    largest = Resources(0.1 + 0.2, *[MOST] * 6, (gpu,) * MOST_GPUS)
    assert Resources.from_json(largest.to_json()) == largest
    padded = SAMPLE.to_json().ljust(MOST_BYTES)
    assert Resources.from_json(padded) == SAMPLE
    with pytest.raises(DecodeError, match="more than the limit"):
        Resources.from_json(padded + b" ")


@pytest.mark.parametrize(
    ("size", "coarse"), [(0, 0), (1, 1), (GIB, 1), (GIB + 1, 2), (3 * GIB, 4), (31 * GIB, 32), (32 * GIB, 32)]
)
def test_coarse_sizes_are_powers_of_two_gib(size: int, coarse: int) -> None:
    gpu = replace(GPU, memory_used=size, memory_total=size)
    sample = coarsen(Resources(0, size, size, size, size, 0, 0, (gpu,)))
    told = (sample.memory_used, sample.memory_total, sample.disk_free, sample.disk_total)
    assert told == (coarse * GIB,) * 4
    assert (sample.gpus[0].memory_used, sample.gpus[0].memory_total) == (coarse * GIB,) * 2


@pytest.mark.parametrize(("rate", "coarse"), [(0, 0), (1, 1), (3, 4), (1000, 1024), (1024, 1024), (1025, 2048)])
def test_coarse_rates_are_powers_of_two(rate: int, coarse: int) -> None:
    sample = coarsen(replace(SAMPLE, sent=rate, received=rate))
    assert (sample.sent, sample.received) == (coarse, coarse)


@pytest.mark.parametrize(
    ("share", "coarse"), [(0, 0), (0.1, 0), (0.13, 0.25), (0.37, 0.25), (0.38, 0.5), (0.87, 0.75), (0.88, 1), (1, 1)]
)
def test_coarse_shares_are_quarters(share: float, coarse: float) -> None:
    sample = coarsen(replace(SAMPLE, cpu=share, gpus=(replace(GPU, use=share),)))
    assert (sample.cpu, sample.gpus[0].use) == (coarse, coarse)


def test_coarse_tells_how_many_gpus_and_neither_name_nor_temperature() -> None:
    silent = Gpu(1, "NVIDIA H200", None, None, None, None)
    assert coarsen(replace(SAMPLE, gpus=(GPU, silent))).gpus == (
        Gpu(0, "", 16 * GIB, 256 * GIB, 0.5, None),
        Gpu(1, "", None, None, None, None),
    )


@given(SAMPLES)
def test_coarse_sample_travels_like_another(sample: Resources) -> None:
    coarse = coarsen(sample)
    assert Resources.from_json(coarse.to_json()) == coarse == coarsen(coarse)
