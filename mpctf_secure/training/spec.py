"""What the agent tells rank 0 before the first round, and rank 0 the others."""

from pathlib import Path

from mpctf_secure.config.base import Frozen
from mpctf_secure.config.privacy import RecordDpSgd
from mpctf_secure.config.run import Lora
from mpctf_secure.config.site import Compute, SiteConfig
from mpctf_secure.config.strategies import Aggregation, FedProx
from mpctf_secure.config.training import Training


class JobSpec(Frozen):
    """Paths on the nodes, SHA-256 in hex of what must lie there, the run's terms and the site's own."""

    model: Path
    model_hash: str
    data: Path
    data_hash: str
    lora: Lora
    training: Training
    mu: float
    compute: Compute
    record_dpsgd: RecordDpSgd | None
    seed: int
    participant: str
    """With the seed it chooses the rows that are held out; nothing else."""

    @classmethod
    def of(
        cls,
        site: SiteConfig,
        hashes: tuple[bytes, bytes],
        lora: Lora,
        training: Training,
        aggregation: Aggregation,
        seed: int = 0,
        participant: str = "",
        record_dpsgd: RecordDpSgd | None = None,
    ) -> "JobSpec":
        """From the site file, the hashes of base model and data file, and the run's terms; seed and name only matter
        where rows are held out."""
        return cls(
            model=site.model,
            model_hash=hashes[0].hex(),
            data=site.data,
            data_hash=hashes[1].hex(),
            lora=lora,
            training=training,
            mu=aggregation.mu if isinstance(aggregation, FedProx) else 0.0,
            compute=site.compute,
            record_dpsgd=record_dpsgd,
            seed=seed,
            participant=participant,
        )
