"""Artefacts: the directories that one stage hands to the next.

An artefact is a directory with a `manifest.json` (schema, kind, model fingerprint, checksums,
parents, the command and versions that made it) and safetensors files. Data files carry their
checksum in their name and the manifest is replaced last, in one `os.replace`: a crash at any byte
leaves either the old artefact or the new one, on every file system that renames atomically.
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
import os
import platform
import sys
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from semantic_ep import __version__
from semantic_ep.errors import ArtifactError, FingerprintError, explain

SCHEMA_VERSION = 1
KINDS = ("trace", "profile", "plan", "layout")
MANIFEST = "manifest.json"
_VERSIONED_PACKAGES = ("numpy", "torch", "deepspeed", "megatron-core", "transformers")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelFingerprint:
    """Identity of the model whose routing an artefact describes.

    Attributes:
        architecture: Family name, e.g. the Hugging Face `model_type`.
        layer_ids: Model layer index of each MoE layer, in order; its length is L.
        num_experts: Logical experts a layer (E).
        top_k: Experts a token activates in a layer (K).
        router_sha256: Hash of the router weights in layer order, or "" when unknown.
        tokenizer_sha256: Hash of the tokenizer, or "" when unknown.
    """

    architecture: str
    layer_ids: tuple[int, ...]
    num_experts: int
    top_k: int
    router_sha256: str = ""
    tokenizer_sha256: str = ""

    @property
    def num_layers(self) -> int:
        """Number of MoE layers (L)."""
        return len(self.layer_ids)

    def check(self, other: ModelFingerprint, *, what: str, allow_retrained: bool = False) -> None:
        """Raise `FingerprintError` naming each field in which `other` differs.

        Empty hashes are unknown and match everything. `allow_retrained` accepts another router
        hash: the same model after further training, for which an older plan stays valid.
        """
        fields = ["layer_ids", "num_experts", "top_k", "tokenizer_sha256"]
        if not allow_retrained:
            fields.append("router_sha256")
        differing = []
        for name in fields:
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine and theirs and mine != theirs:
                differing.append(f"{name}: {_short(theirs)} instead of {_short(mine)}")
        if differing:
            only_router = len(differing) == 1 and differing[0].startswith("router_sha256")
            raise FingerprintError(
                explain(
                    f"{what} belongs to another model",
                    got="; ".join(differing),
                    do="Pass --allow-retrained if this is the same model after further training"
                    if only_router
                    else "Use artefacts made from this model",
                )
            )

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ModelFingerprint:
        """Inverse of `dataclasses.asdict` after a trip through JSON."""
        return cls(**{**data, "layer_ids": tuple(data["layer_ids"])})


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 24 else f"{text[:12]}…"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Artifact:
    """A verified artefact in memory: its manifest fields and its arrays."""

    kind: str
    fingerprint: ModelFingerprint
    arrays: dict[str, np.ndarray]
    meta: dict[str, Any]
    parents: dict[str, str]
    path: Path
    sha256: str


def write_artifact(
    path: str | os.PathLike[str],
    *,
    kind: str,
    fingerprint: ModelFingerprint,
    arrays: Mapping[str, np.ndarray],
    meta: Mapping[str, Any],
    parents: Mapping[str, str] | None = None,
) -> str:
    """Write an artefact atomically and return the sha256 of its manifest.

    Args:
        path: Directory to create or to replace. It may hold an artefact of the same kind only.
        kind: One of `KINDS`.
        fingerprint: The model that the artefact describes.
        arrays: Named arrays; written to one safetensors file.
        meta: JSON-serialisable description, free in form for each kind.
        parents: Role -> sha256 of the artefacts that this one was made from.

    Raises:
        ArtifactError: `path` holds something else, or cannot be written.
    """
    assert kind in KINDS, kind
    from safetensors.numpy import save

    directory = Path(path)
    _refuse_foreign_directory(directory, kind)
    payload = save({name: np.ascontiguousarray(array) for name, array in arrays.items()})
    digest = hashlib.sha256(payload).hexdigest()
    data_name = f"arrays-{digest[:16]}.safetensors"
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "kind": kind,
        "fingerprint": dataclasses.asdict(fingerprint),
        "files": {data_name: digest},
        "parents": dict(parents or {}),
        "meta": dict(meta),
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "versions": installed_versions(),
    }
    text = json.dumps(manifest, indent=1, sort_keys=True).encode()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        write_file_atomically(directory / data_name, payload)
        write_file_atomically(directory / MANIFEST, text)
    except OSError as error:
        raise ArtifactError(
            explain(
                f"cannot write this {kind}: {error.strerror or error}",
                where=str(directory),
                do="Free space or choose a writable directory; what was there is unchanged",
            )
        ) from error
    for stale in directory.glob("arrays-*.safetensors"):
        if stale.name != data_name:
            stale.unlink(missing_ok=True)
    return hashlib.sha256(text).hexdigest()


def read_artifact(path: str | os.PathLike[str], *, kind: str | None = None) -> Artifact:
    """Read an artefact and verify schema, kind and checksums.

    Raises:
        ArtifactError: Saying which of these differs, and in which file.
    """
    from safetensors.numpy import load

    directory = Path(path)
    manifest, digest = _read_manifest(directory)
    if kind is not None and manifest["kind"] != kind:
        raise ArtifactError(
            explain(
                f"this is a {manifest['kind']}, not a {kind}",
                where=str(directory),
                do=f"Give the directory of a {kind}",
            )
        )
    arrays: dict[str, np.ndarray] = {}
    for name, expected in manifest["files"].items():
        file = directory / name
        try:
            payload = file.read_bytes()
        except OSError as error:
            raise ArtifactError(
                explain(
                    f"a file named in the manifest cannot be read: {error.strerror}",
                    where=str(file),
                    do="Copy the whole directory again, or make the artefact anew",
                )
            ) from error
        found = hashlib.sha256(payload).hexdigest()
        if found != expected:
            raise ArtifactError(
                explain(
                    "the file was truncated or altered",
                    where=str(file),
                    got=f"sha256 {found[:12]}… of {len(payload)} bytes",
                    allowed=f"sha256 {expected[:12]}…",
                    do="Copy it again, or make the artefact anew",
                )
            )
        arrays.update(load(payload))
    return Artifact(
        kind=manifest["kind"],
        fingerprint=ModelFingerprint.from_json(manifest["fingerprint"]),
        arrays=arrays,
        meta=manifest["meta"],
        parents=manifest["parents"],
        path=directory,
        sha256=digest,
    )


def is_artifact(path: str | os.PathLike[str], *, kind: str) -> bool:
    """Whether a directory holds an artefact of this kind; its files are not verified."""
    directory = Path(path)
    return (directory / MANIFEST).is_file() and bool(_read_manifest(directory)[0]["kind"] == kind)


def write_file_atomically(path: Path, content: bytes) -> None:
    """Write `content` beside `path`, flush it to disk, then rename it over `path`."""
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(temporary, 0o666 & ~_current_umask())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise


def installed_versions() -> dict[str, str]:
    """Versions of this package, Python and the frameworks that are installed."""
    versions = {"semantic_ep": __version__, "python": platform.python_version()}
    for package in _VERSIONED_PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return versions


def hash_arrays(arrays: Iterable[np.ndarray]) -> str:
    """sha256 over dtype, shape and bytes of the arrays, in order."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _current_umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


def _refuse_foreign_directory(directory: Path, kind: str) -> None:
    if not directory.exists():
        return
    if not directory.is_dir() or (any(directory.iterdir()) and not (directory / MANIFEST).exists()):
        raise ArtifactError(
            explain(
                "the output exists and is not an artefact",
                where=str(directory),
                do="Choose another directory; nothing was overwritten",
            )
        )
    if (directory / MANIFEST).exists():
        existing = _read_manifest(directory)[0]["kind"]
        if existing != kind:
            raise ArtifactError(
                explain(
                    f"the output holds a {existing}, and a {kind} was to be written",
                    where=str(directory),
                    do="Choose another directory; nothing was overwritten",
                )
            )


def _read_manifest(directory: Path) -> tuple[dict[str, Any], str]:
    file = directory / MANIFEST
    try:
        text = file.read_bytes()
    except OSError as error:
        raise ArtifactError(
            explain(
                f"no artefact here: {error.strerror}",
                where=str(file),
                do="Give the directory that `semantic-ep` or a training run wrote",
            )
        ) from error
    try:
        manifest = json.loads(text)
        version = manifest["schema_version"]
        for key in ("kind", "fingerprint", "files", "parents", "meta"):
            manifest[key]
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(
            explain(
                "the manifest is truncated or altered",
                where=str(file),
                got=f"{type(error).__name__}: {error}",
                do="Copy it again, or make the artefact anew",
            )
        ) from error
    if version != SCHEMA_VERSION:
        raise ArtifactError(
            explain(
                "the schema of this artefact is another one",
                where=str(file),
                got=f"version {version}",
                allowed=f"version {SCHEMA_VERSION}",
                do="Make it anew with this version of semantic_ep",
            )
        )
    return manifest, hashlib.sha256(text).hexdigest()
