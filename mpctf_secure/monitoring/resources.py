"""What a node, one machine of a participant, uses at the moment."""

import contextlib
import dataclasses
import importlib
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import psutil
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from mpctf_secure.errors import DecodeError, EnvironmentUnfitError

MOST_GPUS = 64
MOST_BYTES = 1 << 16
"""More than the JSON of any `Resources` may have by the limits below."""
_MOST_NAME = 96  # the driver's own limit
_GIB = 1 << 30
_CGROUP = Path("/sys/fs/cgroup")
_EXACT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

# A power of two that no 64-bit counter exceeds: coarse numbers stay within it.
Bytes = Annotated[int, Field(ge=0, le=1 << 64)]
Share = Annotated[float, Field(ge=0, le=1)]


@dataclasses.dataclass(frozen=True)
class Gpu:
    """One GPU, numbered as by nvidia-smi: memory [bytes], use [0, 1], temperature [°C]; None where it does not tell."""

    index: Annotated[int, Field(ge=0, lt=MOST_GPUS)]
    name: Annotated[str, Field(max_length=_MOST_NAME)]
    memory_used: Bytes | None
    memory_total: Bytes | None
    use: Share | None
    temperature: Annotated[int, Field(ge=0, lt=1 << 32)] | None

    __pydantic_config__ = _EXACT


@dataclasses.dataclass(frozen=True)
class Resources:
    """One sample: CPU [0, 1] of all cores, main memory and the folder's disk [bytes], network [bytes/s], GPUs."""

    cpu: Share
    memory_used: Bytes
    memory_total: Bytes
    disk_free: Bytes
    disk_total: Bytes
    sent: Bytes
    received: Bytes
    """Both of all interfaces but loopback, since the sample before."""
    gpus: Annotated[tuple[Gpu, ...], Field(max_length=MOST_GPUS)]

    __pydantic_config__ = _EXACT

    @staticmethod
    def from_json(data: bytes) -> "Resources":
        """Parse; DecodeError for anything else."""
        if len(data) > MOST_BYTES:
            raise DecodeError(f"resources have {len(data)} bytes, more than the limit of {MOST_BYTES}")
        try:
            return _ADAPTER.validate_json(data)
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False, include_input=False)[0]
            raise DecodeError(f"resources cannot be parsed: {first['msg']}") from error

    def to_json(self) -> bytes:
        """As JSON, on one line."""
        return _ADAPTER.dump_json(self)


_ADAPTER = TypeAdapter(Resources)


class Sampler:
    """Looks at this machine now and then; `folder` is on the disk that counts, `clock` gives seconds."""

    def __init__(self, folder: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._folder = folder
        self._clock = clock
        self._nvml = _start_nvml()
        self._last: tuple[float, ...] | None = None

    def sample(self) -> Resources:
        """What is used now; CPU and network since the sample before, 0 in the first.

        EnvironmentUnfitError where the folder is gone.
        """
        now = (self._clock(), _cpu_seconds(), *_traffic())
        seconds, *growth = (after - before for before, after in zip(self._last or now, now, strict=True))
        self._last = now
        # An interface that goes takes its counters with it.
        cpu, sent, received = (max(0.0, grown / seconds) if seconds > 0 else 0.0 for grown in growth)
        try:
            disk = shutil.disk_usage(self._folder)
        except OSError as error:
            raise EnvironmentUnfitError(f"{self._folder}: {error.strerror}", hint="is its disk mounted?") from error
        return Resources(
            min(1.0, cpu), *_memory(), disk.free, disk.total, round(sent), round(received), _gpus(self._nvml)
        )


def coarsen(resources: Resources) -> Resources:
    """What a site tells that shares coarsely: quarters, and powers of two [GiB; network: bytes/s], rounded up.

    Neither names nor temperatures of GPUs are told, but how many there are.
    """
    return Resources(
        cpu=_quarters(resources.cpu),
        memory_used=_power_of_two(resources.memory_used, _GIB),
        memory_total=_power_of_two(resources.memory_total, _GIB),
        disk_free=_power_of_two(resources.disk_free, _GIB),
        disk_total=_power_of_two(resources.disk_total, _GIB),
        sent=_power_of_two(resources.sent, 1),
        received=_power_of_two(resources.received, 1),
        gpus=tuple(map(_coarsen_gpu, resources.gpus)),
    )


def _coarsen_gpu(gpu: Gpu) -> Gpu:
    return Gpu(
        index=gpu.index,
        name="",
        memory_used=None if gpu.memory_used is None else _power_of_two(gpu.memory_used, _GIB),
        memory_total=None if gpu.memory_total is None else _power_of_two(gpu.memory_total, _GIB),
        use=None if gpu.use is None else _quarters(gpu.use),
        temperature=None,
    )


def _quarters(share: float) -> float:
    return round(4 * share) / 4


def _power_of_two(value: int, unit: int) -> int:
    """0 or the least of 1, 2, 4, … units that is not less."""
    units = -(-value // unit)
    return unit << (units - 1).bit_length() if units else 0


def free_memory(indices: Sequence[int]) -> int:
    """Free memory [bytes] of these GPUs together, or of the machine where none is named.

    EnvironmentUnfitError for one that does not exist or does not tell.
    """
    if not indices:
        used, total = _memory()
        return min(total - used, psutil.virtual_memory().available)
    gpus = _gpus(_start_nvml())
    return sum(_free(gpus, index) for index in indices)


def _free(gpus: Sequence[Gpu], index: int) -> int:
    if index not in range(len(gpus)):
        raise EnvironmentUnfitError(f"no GPU {index}: this machine has {len(gpus)}", hint="nvidia-smi -L lists them")
    gpu = gpus[index]
    if gpu.memory_used is None or gpu.memory_total is None:
        raise EnvironmentUnfitError(f"GPU {index} does not tell its free memory", hint=f"nvidia-smi -q -i {index}")
    return gpu.memory_total - gpu.memory_used


def _cpu_seconds() -> float:
    """For how long the average core has worked: of the container where it has a quota, else of the machine."""
    with contextlib.suppress(OSError, ValueError):  # no container, another kind of cgroup, or "max"
        quota, period = map(int, (_CGROUP / "cpu.max").read_text().split())
        return _cgroup_stat("cpu.stat")["usage_usec"] / 1e6 * period / quota
    times = psutil.cpu_times()
    busy = times.user + times.nice + times.system + times.irq + times.softirq + times.steal
    return busy / (psutil.cpu_count() or 1)


def _memory() -> tuple[int, int]:
    """Used and total main memory [bytes]: of the container where it has a limit, else of the machine."""
    machine = psutil.virtual_memory()
    with contextlib.suppress(OSError, ValueError):  # no container, another kind of cgroup, or "max"
        total = int((_CGROUP / "memory.max").read_text())
        if total < machine.total:
            # What the kernel drops from its cache of files before it refuses memory is not in use.
            cache = _cgroup_stat("memory.stat")["inactive_file"]
            return max(0, int((_CGROUP / "memory.current").read_text()) - cache), total
    return machine.total - machine.available, machine.total


def _cgroup_stat(name: str) -> dict[str, int]:
    lines = (_CGROUP / name).read_text().splitlines()
    return {key: int(value) for key, value in map(str.split, lines)}


def _traffic() -> tuple[int, int]:
    """Bytes sent and received so far."""
    cards = [counters for name, counters in psutil.net_io_counters(pernic=True).items() if name != "lo"]
    return sum(card.bytes_sent for card in cards), sum(card.bytes_recv for card in cards)


def _start_nvml() -> ModuleType | None:
    """The library that asks NVIDIA's driver; None where it or the driver is missing."""
    try:
        nvml = importlib.import_module("pynvml")
    except ImportError:
        return None
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        return None
    return nvml  # and never shut down: the driver puts a GPU that nobody holds to sleep, and waking it takes seconds


def _gpus(nvml: ModuleType | None) -> tuple[Gpu, ...]:
    """All that the driver counts, in its order."""
    if nvml is None:
        return ()
    count = _ask(nvml, "nvmlDeviceGetCount") or 0
    return tuple(_gpu(nvml, index) for index in range(min(count, MOST_GPUS)))


def _gpu(nvml: ModuleType, index: int) -> Gpu:
    handle = _ask(nvml, "nvmlDeviceGetHandleByIndex", index)
    if handle is None:
        return Gpu(index, "", None, None, None, None)
    memory = _ask(nvml, "nvmlDeviceGetMemoryInfo", handle)
    rates = _ask(nvml, "nvmlDeviceGetUtilizationRates", handle)
    return Gpu(
        index=index,
        name=_ask(nvml, "nvmlDeviceGetName", handle) or "",
        memory_used=memory and memory.used,
        memory_total=memory and memory.total,
        use=rates and min(1.0, rates.gpu / 100),
        temperature=_ask(nvml, "nvmlDeviceGetTemperature", handle, nvml.NVML_TEMPERATURE_GPU),
    )


def _ask(nvml: ModuleType, function: str, *arguments: object) -> Any:
    """The driver's answer, or None: a GPU can be lost or forbidden, a MIG or virtual one does not know everything."""
    try:
        return getattr(nvml, function)(*arguments)
    except (nvml.NVMLError, UnicodeDecodeError):  # under WSL, names have been no text
        return None
