"""Where base models and built-in configs are found. Nothing is fetched."""

import os
from importlib import resources
from pathlib import Path

from mpctf_secure.errors import EnvironmentUnfitError


def cache() -> Path:
    """The folder for models; XDG_CACHE_HOME moves it."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mpctf-secure"


def find_model(base: str, beside: Path) -> Path:
    """The folder of a model given as a path (relative to the run file) or a name in the cache."""
    for folder in (beside / base, cache() / "models" / base):
        if (folder / "config.json").is_file():
            return folder.resolve()
    raise EnvironmentUnfitError(
        f"model.base: no model {base!r} beside the run file or in {cache() / 'models'}",
        hint="`make demo` puts smollm2-135m-instruct there; any transformers folder works by its path",
    )


def builtin_config(name: str) -> Path:
    """configs/NAME.yaml of the checkout or of the installed package."""
    package = Path(str(resources.files("mpctf_secure")))
    candidates = [folder / f"{name}.yaml" for folder in (package / "configs", package.parent / "configs")]
    return next((path for path in candidates if path.is_file()), candidates[-1])
