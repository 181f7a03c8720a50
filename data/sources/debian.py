"""The text of files that Debian packages carry: fetched by apt, unpacked by dpkg-deb, nothing installed.

A package is a part, and each text file in it a document, or several if it is long, in the order of the archive.
"""

import gzip
import lzma
import re
import subprocess
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import IO

from common.errors import ConfigError
from common.files import sha256_of
from data.config import DebianPackage, DebianSource
from data.sources.prose import cut, prose_of, text_of_page, tidy
from data.sources.stored import Part, Rows

PAGES = (".html", ".htm", ".xhtml", ".page")  # the last is Mallard, of GNOME's manuals: paragraphs are <p> there too
PACKED = (".gz", ".dz", ".xz")
NO_PROSE = ("*/changelog*", "*/copyright*", "*/NEWS*", "*/README.Debian*", "*/TODO*", "usr/share/man/*")
MOST_FILE = 1 << 26  # bytes of a file, packed or not


@dataclass(frozen=True)
class Package(Part):
    """A .deb file, and what of it is taken."""

    package: str = ""
    version: str = ""
    sha256: str = ""
    installed: int = 0  # bytes of its files, about
    files: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    document_chars: int = 0
    prose: float = 0.0

    @property
    def identity(self) -> list[str | int]:
        """Package and version, size and SHA-256: the same wherever the file lies."""
        return [f"{self.package}={self.version}", self.size, self.sha256]

    def takes(self, path: str) -> bool:
        """Whether the file at this path in the package is asked for."""
        return any(fnmatchcase(path, pattern) for pattern in self.files) and not any(
            fnmatchcase(path, pattern) for pattern in (*NO_PROSE, *self.skip)
        )


def missing_packages(source: DebianSource) -> list[str]:
    """Names of the packages that are not in the source's folder yet. Raises ConfigError if one is there twice."""
    folder = Path(source.folder).expanduser()
    return [package.name for package in source.packages if _file_of(package, folder) is None]


def debian_parts(source: DebianSource) -> list[Part]:
    """The packages, in the order given; those that are not in the source's folder are fetched into it.

    Raises:
        ConfigError: a package cannot be had, is there in several versions, or its file is no package.
    """
    folder = Path(source.folder).expanduser()
    return [
        _opened(source, package, _file_of(package, folder) or _fetch(package, folder)) for package in source.packages
    ]


def package_rows(part: Package, first: int) -> Rows:
    """The documents of a package from document `first` on. Raises ConfigError that names package and file."""
    found = 0
    for found, row in enumerate(_documents(part), start=1):
        if found > first:
            yield row
    if not found:
        raise ConfigError(
            f"{part.name}: no file that data.source.packages asks for ({', '.join(part.files)}) holds prose; "
            f"`dpkg-deb --contents {part.name}` tells what there is"
        )


def _documents(part: Package) -> Rows:
    read = 0
    for path, content in _files(part):
        read += len(content)
        share = min(1.0, read / max(1, part.installed))
        if not part.takes(path):
            continue
        text, of_prose = prose_of(_text(part, path, content))
        if text and of_prose >= part.prose:
            yield from ((document, share) for document in cut(text, part.document_chars))


def _text(part: Package, path: str, content: bytes) -> str:
    """A file's text; empty for one that is none. UTF-8, or Latin-1 where it is no UTF-8."""
    name = PurePosixPath(path)
    if name.suffix in PACKED:
        try:
            with (lzma.open if name.suffix == ".xz" else gzip.open)(BytesIO(content)) as file:
                content = file.read(MOST_FILE + 1)
        except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
            raise ConfigError(f"{part.name}, {path}: cannot be unpacked ({error}); {REPLACE}") from None
        if len(content) > MOST_FILE:
            raise ConfigError(_too_large(part, path))
        name = name.with_suffix("")
    if b"\0" in content:
        return ""
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError:
        text = content.decode("latin-1")
    return text_of_page(text) if name.suffix.lower() in PAGES else tidy(text)


# ---- packages


REPLACE = "delete the file, so that it is fetched anew, or replace it by a whole copy"


def _file_of(package: DebianPackage, folder: Path) -> Path | None:
    """The package's file in the folder; None if there is none."""
    version = "*" if package.version is None else package.version.replace(":", "%3a")
    found = sorted(folder.glob(f"{package.name}_{version}_*.deb"))
    if len(found) > 1:
        raise ConfigError(
            f"{folder}: {package.name} is there {len(found)} times ({', '.join(file.name for file in found)}); set the "
            "version of that package in data.source.packages, or delete all but one"
        )
    return found[0] if found else None


def _fetch(package: DebianPackage, folder: Path) -> Path:
    """Downloads a package into the folder. apt compares it with the hashes of its signed lists."""
    wanted = package.name if package.version is None else f"{package.name}={package.version}"
    remedy = (
        f"check the network and the package's name (`apt-cache policy {package.name}`; `apt-get update` renews the "
        f"lists), or put its .deb file into {folder}, as data.source.folder says"
    )
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".draft-") as draft:
        _tool(["apt-get", "download", "--quiet", wanted], f"package {wanted}", remedy, cwd=draft)
        for file in Path(draft).glob("*.deb"):
            file.replace(folder / file.name)
    fetched = _file_of(package, folder)
    if fetched is None:
        raise ConfigError(f"package {wanted}: apt-get download left no {package.name}_*.deb; {remedy}")
    return fetched


def _opened(source: DebianSource, package: DebianPackage, file: Path) -> Package:
    told = _tool(["dpkg-deb", "--show", "--showformat", FIELDS, str(file)], str(file), REPLACE)
    name, version, kib = [*told.split("\n"), "", ""][:3]
    if name != package.name:
        raise ConfigError(f"{file}: this is the package {name!r}, not {package.name}; {REPLACE}")
    return Package(
        str(file),
        file.stat().st_size,
        package=name,
        version=version,
        sha256=sha256_of(file),
        installed=1024 * int(kib) if kib.isdigit() else 0,
        files=package.files,
        skip=package.skip,
        document_chars=source.document_chars,
        prose=source.prose,
    )


FIELDS = "${Package}\n${Version}\n${Installed-Size}"


def _tool(command: list[str], what: str, remedy: str, cwd: str | None = None) -> str:
    """What a program of Debian's prints. Raises ConfigError if there is no such program, or it fails."""
    try:
        ran = subprocess.run(command, cwd=cwd, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    except FileNotFoundError:
        raise _no_tool(command[0]) from None
    if ran.returncode:
        raise ConfigError(f"{what}: {command[0]} failed ({' '.join(ran.stderr.split()) or ran.returncode}); {remedy}")
    return ran.stdout


def _no_tool(name: str) -> ConfigError:
    package = {"apt-get": "apt", "dpkg-deb": "dpkg"}[name]
    return ConfigError(
        f"data.source.kind=debian needs the program {name}, which is not here; install it (package {package}), or "
        "prepare the data on a machine with Debian or Ubuntu and copy the folder"
    )


def _files(part: Package) -> Iterator[tuple[str, bytes]]:
    """Path and content of each regular file in a package, in the archive's order; the content of those not asked for
    is empty.
    """
    try:
        unpacking = subprocess.Popen(
            ["dpkg-deb", "--fsys-tarfile", part.name], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
    except FileNotFoundError:
        raise _no_tool("dpkg-deb") from None
    with unpacking:
        assert unpacking.stdout is not None and unpacking.stderr is not None
        try:
            yield from _members(part, unpacking.stdout)
            unpacking.stdout.read()  # what pads the archive
            if unpacking.wait():
                raise tarfile.ReadError(" ".join(unpacking.stderr.read().decode(errors="replace").split()))
        except (tarfile.TarError, EOFError) as error:
            raise ConfigError(f"{part.name}: not a whole package ({error}); {REPLACE}") from None
        finally:
            unpacking.kill()


def _too_large(part: Package, path: str) -> str:
    return f"{part.name}: {path} has more than {MOST_FILE} bytes; name it in `skip` of that package"


def _members(part: Package, stream: IO[bytes]) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(fileobj=stream, mode="r|") as archive:
        for member in archive:
            path = re.sub(r"^(\./)+", "", member.name)
            if not member.isfile():
                continue
            if not part.takes(path):
                yield path, b""
                continue
            if member.size > MOST_FILE:
                raise ConfigError(_too_large(part, path))
            content = archive.extractfile(member)
            assert content is not None
            yield path, content.read()
