"""The W&B side of tracking: which mode, whose run, and how artefacts look there."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from semantic_ep.errors import BackendError, ConfigError, explain, nearest

logger = logging.getLogger(__name__)

PREFIXES = ("train", "routing", "plan", "a2a", "serving", "benchmark")
WandbSetting = Literal["auto", "online", "offline", "disabled"]
WANDB_SETTINGS: tuple[WandbSetting, ...] = ("auto", "online", "offline", "disabled")

_DEFAULT_PROJECT = "semantic-ep"
_DEFAULT_HOST = "https://api.wandb.ai"
_PROBE_SECONDS = 3.0
_INIT_SECONDS = 30.0
# Raw traces can reveal text and checkpoints are large: W&B gets their identity, not their bytes.
_UPLOADED_KINDS = ("profile", "plan", "layout", "report", "benchmark")


def open_run(
    mode: Any, setting: str, directory: Path, config: dict[str, Any], job_type: str
) -> tuple[Any | None, bool]:
    """Return (run, whether this tracker owns it); (None, False) where W&B is off."""
    if mode == "disabled":
        return None, False
    try:
        import wandb
    except ImportError as error:
        if setting == "auto" and "WANDB_MODE" not in os.environ:
            logger.info("wandb is not installed; metrics of %s go to its JSONL only", directory)
            return None, False
        raise BackendError(
            explain(
                "W&B was asked for and is not installed",
                where="semantic_ep.tracking.wandb",
                got=setting,
                do='pip install "semantic_ep[track]", or set it to "disabled"',
            )
        ) from error
    run, owned = wandb.run, wandb.run is None
    if run is None:
        run = _init(mode, setting, directory, config, job_type)
    else:
        logger.info("metrics join the W&B run that is open already (%s)", run.id)
        run.config.update({"semantic_ep": config}, allow_val_change=True)
    for prefix in PREFIXES:
        run.define_metric(f"{prefix}/step", hidden=True)
        run.define_metric(f"{prefix}/*", step_metric=f"{prefix}/step")
    return run, owned


def _init(mode: Any, setting: str, directory: Path, config: dict[str, Any], job_type: str) -> Any:
    import wandb

    settings = wandb.Settings(silent=True, disable_git=True, init_timeout=_INIT_SECONDS)
    # W&B reads its variables once a process; a second run of the process may have other ones.
    tags = [tag for tag in os.environ.get("WANDB_TAGS", "").split(",") if tag]
    options: dict[str, Any] = {
        "project": os.environ.get("WANDB_PROJECT", _DEFAULT_PROJECT),
        "entity": os.environ.get("WANDB_ENTITY"),
        "name": os.environ.get("WANDB_NAME"),
        "group": os.environ.get("WANDB_RUN_GROUP"),
        "tags": tags or None,
        "job_type": job_type,
        "config": config,
        "dir": os.environ.get("WANDB_DIR", str(directory)),
        "settings": settings,
    }
    try:
        return wandb.init(mode=mode, **options)
    except wandb.Error as error:
        if setting == "online":
            raise ConfigError(
                explain(
                    f"W&B refused the run: {error}",
                    where="semantic_ep.tracking.wandb",
                    got=setting,
                    do='Check WANDB_API_KEY and the network, or set it to "auto"',
                )
            ) from error
        logger.warning("W&B cannot be reached (%s); the run is recorded offline", error)
        return wandb.init(mode="offline", **options)


def resolve_mode(setting: str) -> Any:
    """Resolve the setting to W&B's "online", "offline" or "disabled"."""
    if setting not in WANDB_SETTINGS:
        close = nearest(setting, WANDB_SETTINGS)
        raise ConfigError(
            explain(
                "unknown W&B setting",
                where="semantic_ep.tracking.wandb",
                got=setting,
                allowed=WANDB_SETTINGS,
                do=f'Did you mean "{close}"?' if close else None,
            )
        )
    if setting == "online" and not _has_key():
        raise ConfigError(
            explain(
                "W&B cannot go online without a key",
                where="semantic_ep.tracking.wandb",
                got=setting,
                do='Run `wandb login` or export WANDB_API_KEY, or set it to "auto"',
            )
        )
    if setting != "auto":
        return setting
    wish = os.environ.get("WANDB_MODE", "").lower()
    aliases = {"dryrun": "offline", "run": "online", "": "online"}
    wish = aliases.get(wish, wish)
    if wish not in WANDB_SETTINGS[1:]:
        raise ConfigError(
            explain(
                "unknown W&B mode",
                where="WANDB_MODE",
                got=os.environ["WANDB_MODE"],
                allowed=WANDB_SETTINGS[1:],
            )
        )
    if wish == "online" and not (_has_key() and _reachable(_host())):
        return "offline"
    return wish


def _host() -> str:
    return os.environ.get("WANDB_BASE_URL", _DEFAULT_HOST)


def _has_key() -> bool:
    """Whether W&B would find credentials without asking a person."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    import netrc
    from urllib.parse import urlsplit

    with suppress(OSError, netrc.NetrcParseError):
        entries = netrc.netrc(os.environ.get("NETRC"))
        return entries.authenticators(urlsplit(_host()).netloc) is not None
    return False


def _reachable(url: str) -> bool:
    """Whether a server answers, through the proxies of the environment, within the probe time.

    The thread bounds name resolution too, which no socket timeout covers.
    """
    import urllib.error
    import urllib.request

    answered = threading.Event()

    def probe() -> None:
        with suppress(OSError, ValueError):
            try:
                urllib.request.urlopen(url, timeout=_PROBE_SECONDS).close()
            except urllib.error.HTTPError as error:
                error.close()
            answered.set()

    threading.Thread(target=probe, daemon=True).start()
    reached = answered.wait(_PROBE_SECONDS)
    if not reached:
        logger.warning("%s does not answer; the W&B run is recorded offline", url)
    return reached


def as_artifact(target: Path, kind: str, identity: Mapping[str, Any]) -> Any:
    """Return the `wandb.Artifact` of a file or directory: its bytes, or a reference to it."""
    import wandb

    name = f"{kind}-{identity.get('architecture') or target.name}"
    artifact = wandb.Artifact(name=name, type=kind, metadata={"path": str(target), **identity})
    if kind not in _UPLOADED_KINDS:
        artifact.add_reference(target.resolve().as_uri(), checksum=False)
    else:
        for file in sorted(target.rglob("*")) if target.is_dir() else [target]:
            if file.is_file():
                base = target if target.is_dir() else target.parent
                artifact.add_file(str(file), name=str(file.relative_to(base)))
    return artifact
