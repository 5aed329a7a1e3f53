"""What this site's nodes use: kept here, and told to the coordinator as far as the site's policy goes."""

import math
import time
from collections.abc import Callable
from dataclasses import asdict

from mpctf_secure.config.site import Sharing
from mpctf_secure.monitoring.events import Record
from mpctf_secure.monitoring.resources import Resources, coarsen
from mpctf_secure.monitoring.usage import Usage

_RECORD_SECONDS, _TELL_SECONDS = 30.0, 15.0


class ResourceSharing:
    """Takes samples as they come: `record` gets them now and then, `tell` what others may know of them."""

    def __init__(
        self,
        share: Sharing,
        record: Record,
        tell: Callable[[bytes], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._share, self._record, self._tell, self._clock = share, record, tell, clock
        self._recorded = dict[int, float]()
        self._untold = dict[int, Resources]()
        self._told = -math.inf

    def note(self, samples: dict[int, Resources]) -> None:
        """New samples of some nodes, by their numbers; what `tell` raises goes on."""
        for node, resources in samples.items():
            self._keep(node, resources)
        self._untold.update(samples)
        if self._share != "off" and self._clock() - self._told >= _TELL_SECONDS:
            self._told = self._clock()
            self._tell(Usage(self._shared()).encode())
            self._untold.clear()

    def _keep(self, node: int, resources: Resources) -> None:
        if self._clock() - self._recorded.get(node, -math.inf) >= _RECORD_SECONDS:
            self._recorded[node] = self._clock()
            self._record("resources", node=node, **asdict(resources))

    def _shared(self) -> dict[int, Resources]:
        """The newest of each node that has one that nobody was told of."""
        if self._share == "exact":
            return self._untold
        return {node: coarsen(resources) for node, resources in self._untold.items()}
