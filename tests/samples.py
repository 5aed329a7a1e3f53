"""A contract for tests, one term changed at a time."""

from mpctf_secure.config.privacy import NoNoise
from mpctf_secure.config.run import Lora
from mpctf_secure.config.strategies import FedAvg, FixedSize
from mpctf_secure.config.training import Bounds, Training
from mpctf_secure.identity.roster import Roster
from mpctf_secure.rounds.contract import Contract, Proposal

TENSORS = (("m.lora_A.weight", (4, 100)), ("m.lora_B.weight", (50, 4)))


def make_proposal(roster: Roster, names: tuple[str, ...]) -> Proposal:
    """One round of all these, who are in the roster."""
    return Proposal(
        run_id="r", roster_hash=roster.hash.hex(), participants=names, quorum=3, colluders=1, allow_pair=False,
        rounds=1, void_rounds=0, seed=0, base_model="m", lora=Lora(), data=FixedSize(),
        training=Training(bounds=Bounds(batch_size=(1, 32))),
        aggregation=FedAvg(), privacy=NoNoise(),
    )  # fmt: skip


def make_contract(**changes: object) -> Contract:
    fields: dict[str, object] = {
        "run_id": "run-1",
        "roster_hash": "00" * 32,
        "participants": ("a", "b", "c", "d"),
        "quorum": 3,
        "colluders": 1,
        "allow_pair": False,
        "rounds": 3,
        "void_rounds": 2,
        "seed": 7,
        "base_model": "tiny",
        "lora": Lora(),
        "training": Training(),
        "data": FixedSize(size=10),
        "aggregation": FedAvg(),
        "privacy": NoNoise(clip_norm=1.0),
        "package": "22" * 32,
        "base_model_hash": "11" * 32,
        "tensors": TENSORS,
    }
    return Contract(**{**fields, **changes})
