"""All evidence that a site has of one run, in an archive that can be checked without this program."""

import json
import zipfile
from pathlib import Path
from typing import Any

from mpctf_secure import files
from mpctf_secure.auditlog import own as own_logs
from mpctf_secure.auditlog.storage import CERTIFICATES, CHECKPOINT, CONTRACT, FOLDER, LOG, ROSTERS, STEPS, WITNESSED
from mpctf_secure.cli.audit.export import leaves, prove
from mpctf_secure.cli.audit.verdict import of_site
from mpctf_secure.cli.join import load_site
from mpctf_secure.errors import SecurityError, UsageError
from mpctf_secure.identity import keystore
from mpctf_secure.ids import NAME
from mpctf_secure.participant.witness import FORK
from mpctf_secure.privacy.spending import spending
from mpctf_secure.rounds.contract import Contract

_README = """\
# Evidence of run {run}

| file | what it is |
|---|---|
| run/log.jsonl | the coordinator's log of the run, a leaf a line |
| run/witnessed | its newest checkpoint with cosignatures: a C2SP signed note |
| run/certificates/, run/steps/ | per step the signed messages of its witnesses, and the checkpoint |
| run/contract.json, run/rosters/ | the contract that all signed, and the rosters with everybody's keys |
| own/proofs.json | what {name}'s own log has of this run, with proofs; the log itself may tell of other runs |
| own/unsigned.json | what it has after its last checkpoint: {name}'s word |
| privacy.json | what {name} has spent of its privacy budgets |
| verdict.json | what `mpctf-secure audit verify --site` found |

## To check it without mpctf-secure

1. SHA-256 of a roster's canonical JSON (RFC 8785; the file has a line end more) is `roster_hash` in the first leaf of
   run/log.jsonl. Ask an organisation that you trust for its hash. `log` of each member is its Ed25519 log key.
2. A leaf's hash is SHA-256(0x00, line without its end), a node's SHA-256(0x01, left, right), the tree that of RFC 6962,
   section 2.1. The root of as many leaves as the second line of run/witnessed says is its third line, in base64.
3. Of run/witnessed the text up to the empty line, with its last line end, is what the coordinator has signed. A
   witness has signed `cosignature/v1`, line end, `time` and the time in seconds, line end, and that text; its line has
   four bytes of key id, eight of the time, and the signature, in base64. golang.org/x/mod/sumdb/note reads such notes.
4. {needed} of {members} participants make a quorum: with so many cosignatures there is no other history, unless more
   than {colluders} of them lied.
5. In own/proofs.json each leaf leads by `inclusion` (RFC 9162, section 2.1.3.2) to the root in `checkpoint`.
"""


def write_pack(site_file: Path, run: str, target: Path) -> tuple[list[str], list[str]]:
    """The names in the archive, and what is doubtful in it; UsageError for no such run, or a file that is there."""
    site = load_site(site_file)
    folder = site.work / "runs" / run / FOLDER
    if not NAME.fullmatch(run) or not (folder / LOG).is_file():
        known = ", ".join(path.parent.name for path in sorted((site.work / "runs").glob(f"*/{FOLDER}"))) or "none"
        raise UsageError(f"{site.work}: no log of a run {run}", hint=f"there are: {known}")
    if target.exists():
        raise UsageError(f"{target}: exists already", hint="name a new file")
    own = next((one for one in own_logs.verified(site.keys) if one.history.find("run_accepted", run)), None)
    if own is None:
        raise SecurityError(
            f"{site.keys}: the own log has not accepted run {run}", hint="is it this run's keys folder?"
        )
    content = {f"run/{path.relative_to(folder)}": path.read_bytes() for path in _shown(folder)}
    own_folder = own_logs.folder_of(site.keys, own.key)
    mine = [(number, leaf) for number, leaf in leaves(own_folder) if leaf.get("run") == run]
    content["own/proofs.json"] = prove(own_folder, [number for number, _ in mine if number < own.signed]).encode()
    content["own/unsigned.json"] = _json([leaf for number, leaf in mine if number >= own.signed])
    spent = spending(site.keys, None, site.policy.budget, site.data_set)
    of_run = [{**one, "runs": [each for each in one["runs"] if each["run"] == run]} for one in spent]
    content["privacy.json"] = _json([one for one in of_run if one["runs"]])
    found = of_site(site_file, run)
    content["verdict.json"] = _json([one.fields() for one in found])
    contract = Contract.decode(content.get(f"run/{CONTRACT}", b""))
    content["README.md"] = _README.format(
        run=run,
        name=keystore.organisation(site.keys).name,
        needed=contract.agreement,
        members=len(contract.participants),
        colluders=contract.colluders,
    ).encode()
    unfinished = target.with_name(target.name + ".part")
    with files.writing(target):
        with zipfile.ZipFile(unfinished, "w", zipfile.ZIP_DEFLATED) as archive:
            for path, data in sorted(content.items()):
                archive.writestr(path, data)
        unfinished.chmod(0o600)
        unfinished.rename(target)
    return sorted(content), [doubt for one in found for doubt in one.doubts]


def _shown(folder: Path) -> list[Path]:
    """What a log's folder has to have, and no link to anything else."""
    names = [folder / name for name in (LOG, CHECKPOINT, WITNESSED, CONTRACT, FORK)]
    inside = [path for name in (STEPS, CERTIFICATES, ROSTERS) for path in sorted((folder / name).glob("*"))]
    return [path for path in (*names, *inside) if path.is_file() and not path.is_symlink() and path.suffix != ".part"]


def _json(content: Any) -> bytes:
    return json.dumps(content, indent=2, ensure_ascii=False).encode()
