"""The image of a host: found, judged stale or fresh, and built from this checkout.

Rule 1: an image is fresh when its label carries the digest of everything that went into it; nothing else counts,
        no name and no date.
Rule 2: the build context is exactly what goes in: the packages, pyproject.toml and deploy/, and never a folder as
        it happens to lie there.
Rule 3: a build says what it does, step by step; when it fails, the last lines of it and what to do are the error.
"""

from __future__ import annotations

import contextlib
import hashlib
import sys
import tarfile
import tempfile
import tomllib
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final

from docker.errors import BuildError, DockerException, ImageNotFound

from testbed.errors import MachineCannotError, TestbedError
from testbed.hosts.engine import connect

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from docker import DockerClient

ROOT: Final = Path(__file__).resolve().parents[2]
REPOSITORY: Final = "ballast-host"
SOURCES_LABEL: Final = "ballast.sources"
MADE_BASE: Final = "ballast-base:bookworm"  # deploy/make-base-image
PULLED_BASE: Final = "python:3.12-slim"  # the Dockerfile's own default
SINGLE_FILES: Final = (
    "pyproject.toml",
    "README.md",
    "LICENSE",
    "deploy/Dockerfile",
    "deploy/host-entrypoint",
)
WORDS: Final = ("README.md", "LICENSE")  # the build asks for them; what they say changes no image
SUFFIXES: Final = {".py", ".pyi", ".typed", ".toml"}
WHEELHOUSE: Final = "deploy/wheelhouse"
DIGEST_CHARACTERS: Final = 16
LAST_LINES: Final = 6
KEPT_IMAGES: Final = 8
BUILD_S: Final = 1800  # a build downloads 100 MB of wheels


class ImageSources:
    """What goes into the image, from a checkout of Ballast."""

    def __init__(self, root: Path = ROOT) -> None:
        self.root = root

    def files(self) -> list[Path]:
        """Sources, relative to the root, in order; wheels are not among them: pyproject.toml decides those.

        Raises MachineCannotError where this is no checkout.
        """
        if not (self.root / "deploy/Dockerfile").is_file():
            raise MachineCannotError(
                f"{self.root} is no checkout of Ballast: hosts in containers are built from deploy/Dockerfile; "
                "run ballast from a clone"
            )
        project = tomllib.loads((self.root / "pyproject.toml").read_text(encoding="utf-8"))
        packages = project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
        found = [
            path for name in packages for path in (self.root / name).rglob("*") if path.suffix in SUFFIXES
        ]
        return [Path(name) for name in SINGLE_FILES] + sorted(path.relative_to(self.root) for path in found)

    def wheels(self) -> list[Path]:
        """The wheelhouse, relative to the root; empty when packages come from an index."""
        return sorted(path.relative_to(self.root) for path in (self.root / WHEELHOUSE).glob("*.whl"))

    def digest(self, base: str) -> str:
        """Of the sources and the base's name."""
        hashed = hashlib.sha256(base.encode())
        for path in self.files():
            if path.name in WORDS:
                continue
            hashed.update(f"\0{path}\0".encode())
            hashed.update((self.root / path).read_bytes())
        return hashed.hexdigest()[:DIGEST_CHARACTERS]

    def write_context(self, file: IO[bytes]) -> None:
        """The build context as a tar archive."""
        with tarfile.open(fileobj=file, mode="w") as archive:
            for path in (*self.files(), *self.wheels()):
                archive.add(self.root / path, arcname=str(path), filter=_plain)


def base_of(client: DockerClient) -> str:
    """The base that a build would start from: one that was made here, else the one that everybody pulls."""
    return MADE_BASE if _labels(client, MADE_BASE) is not None else PULLED_BASE


def freshness(client: DockerClient, sources: ImageSources) -> tuple[str, str]:
    """(reference, why it must be built): the second is "" when a fresh image is there."""
    digest = sources.digest(base_of(client))
    reference = f"{REPOSITORY}:{digest}"
    labels = _labels(client, reference)
    if labels is not None and labels.get(SOURCES_LABEL) == digest:
        return reference, ""
    older = client.images.list(filters={"label": SOURCES_LABEL})
    return reference, "stale: the sources changed" if older else "missing"


def ensure(client: DockerClient, say: Callable[..., object], sources: ImageSources | None = None) -> str:
    """The reference of a fresh image, built if need be. `say` is told (event, fields) while it is.

    Raises MachineCannotError when it cannot be built.
    """
    sources = sources or ImageSources()
    reference, reason = freshness(client, sources)
    if not reason:
        return reference
    base = base_of(client)
    say("image_build_started", image=reference, reason=reason, base=base, wheels=len(sources.wheels()))
    digest = reference.rpartition(":")[2]
    with tempfile.TemporaryFile() as context:
        sources.write_context(context)
        context.seek(0)
        try:
            steps = client.api.build(
                fileobj=context,
                custom_context=True,
                dockerfile="deploy/Dockerfile",
                tag=reference,
                labels={SOURCES_LABEL: digest},
                buildargs={"BASE_IMAGE": base},
                network_mode="host",
                rm=True,
                forcerm=True,
                decode=True,
                timeout=BUILD_S,
            )
            _follow(steps, say)
        except (DockerException, OSError) as error:
            raise MachineCannotError(_refusal(error, base, sources)) from error
    say("image_built", image=reference)
    _forget_older(client)
    return reference


def _follow(steps: Iterable[dict[str, Any]], say: Callable[..., object]) -> None:
    lines: list[str] = []
    for step in steps:
        if "error" in step:
            tail = " / ".join(line for line in lines[-LAST_LINES:] if line)
            raise BuildError(f"{str(step['error']).strip()}{f' ({tail})' if tail else ''}", iter(()))
        for line in _lines(step):
            lines.append(line)
            if line.startswith("Step "):
                say("image_build_step", step=line)


def _lines(step: dict[str, Any]) -> Iterator[str]:
    text = step.get("stream") or step.get("status") or ""
    return (line.strip() for line in str(text).splitlines())


def _refusal(error: Exception, base: str, sources: ImageSources) -> str:
    text = " ".join(str(getattr(error, "msg", error)).split())
    if base == PULLED_BASE and (
        "pull" in text or "manifest" in text or "dial tcp" in text or "lookup" in text
    ):
        remedy = "where nothing can be pulled: deploy/make-base-image"
        return f"the image could not be built from {base}: {text}; {remedy}"
    if sources.wheels():
        remedy = "deploy/make-wheelhouse fetches the packages again when the dependencies changed"
    else:
        remedy = "where containers reach no package index: deploy/make-wheelhouse"
    return f"the image could not be built: {text}; {remedy}"


def _forget_older(client: DockerClient) -> None:
    """Images of older sources beyond a few, which other checkouts may be using; layers are shared between them."""
    images = client.images.list(REPOSITORY, filters={"label": SOURCES_LABEL})
    newest_first = sorted(images, key=lambda image: str(image.attrs["Created"]), reverse=True)
    for tag in (tag for image in newest_first[KEPT_IMAGES:] for tag in image.tags):
        with contextlib.suppress(DockerException):  # a container still uses it
            client.images.remove(tag)


def _labels(client: DockerClient, reference: str) -> dict[str, str] | None:
    try:
        return client.images.get(reference).labels or {}
    except ImageNotFound:
        return None


def _plain(member: tarfile.TarInfo) -> tarfile.TarInfo:
    """Without what differs between two checkouts of the same sources."""
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    member.mtime = 0
    member.mode = 0o755 if member.mode & 0o100 else 0o644
    return member


def main() -> int:
    """`python -m testbed.hosts.image`: builds the image now, where it is missing or stale."""

    def say(event: str, **fields: object) -> None:
        sys.stderr.write(f"{event.replace('_', ' ')}: {', '.join(str(value) for value in fields.values())}\n")

    try:
        engine = connect()
        sys.stdout.write(f"{ensure(engine.client, say)}\n")
        engine.close()
    except TestbedError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
