"""An engine directory as one file to send: a zip archive, stored, whose every byte is checked on the way out and in."""

from __future__ import annotations

import shutil
import stat
import struct
import tempfile
import zipfile
from pathlib import Path

from cldf_fast.deploy.manifest import MANIFEST, SIGNATURE, SealedDirectory, check_names, open_sealed
from cldf_fast.errors import CLDFError, IntegrityError
from cldf_fast.files import atomic_write

_MAX_FILES = 1000


def pack(folder: str | Path, archive: str | Path) -> None:
    """Write a sealed engine directory into a new zip file; the same directory always gives the same bytes.

    Raises IntegrityError where a file is not what the manifest lists, or `archive` is there already.
    """
    sealed, archive = open_sealed(folder), Path(archive)
    if archive.exists():
        raise IntegrityError(f"{archive}: is there already; remove it or take another name")
    with atomic_write(archive) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as target:
        target.writestr(zipfile.ZipInfo(MANIFEST), sealed.manifest.to_bytes())
        if sealed.signature is not None:
            target.writestr(zipfile.ZipInfo(SIGNATURE), sealed.signature)
        for name in sorted(sealed.manifest.files):
            target.writestr(zipfile.ZipInfo(name), sealed.read(name))


def unpack(archive: str | Path, folder: str | Path, *, public_key: Path | None = None) -> SealedDirectory:
    """Extract what `pack` wrote to a folder that doesn't exist yet, and give it opened as by `open_sealed`.

    All is checked in a temporary folder beside it, which takes its name last. Raises IntegrityError, and leaves
    nothing, for an archive that is damaged, or holds anything but a sealed engine directory.
    """
    archive, folder = Path(archive), Path(folder)
    if folder.exists() or folder.is_symlink():
        raise IntegrityError(f"{folder}: is there already; remove it or take another name")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=folder.parent.resolve()) as temporary:
        inside = Path(temporary) / "content"
        try:
            with zipfile.ZipFile(archive) as source:
                _extract(source, archive, inside)
            open_sealed(inside, public_key=public_key).verify_all()
        except CLDFError as error:
            # When the message is read, the temporary folder is gone.
            raise type(error)(str(error).replace(str(inside), str(archive))) from error
        # What zipfile raises for damaged archives is not documented in full.
        except (OSError, ValueError, RuntimeError, EOFError, struct.error, zipfile.BadZipFile) as error:
            raise IntegrityError(f"{archive}: can't be read as a zip archive ({error}); take a fresh copy") from error
        inside.rename(folder)
    return open_sealed(folder, public_key=public_key)


def _extract(source: zipfile.ZipFile, archive: Path, folder: Path) -> None:
    entries = source.infolist()
    names = [entry.filename for entry in entries]
    check_names(set(names) - {MANIFEST, SIGNATURE}, archive)
    if len(entries) > _MAX_FILES or len(set(names)) < len(names):
        raise IntegrityError(f"{archive}: expected at most {_MAX_FILES} files and each once, got {len(entries)}")
    for entry in entries:
        kind = stat.S_IFMT(entry.external_attr >> 16)
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1 or kind not in (0, stat.S_IFREG):
            raise IntegrityError(
                f"{archive}: {entry.filename}: expected a plain file, neither compressed nor encrypted"
            )
    # Nothing is compressed, so that no archive grows when it is extracted, and entries that overlap don't fit in.
    if sum(entry.file_size for entry in entries) > archive.stat().st_size:
        raise IntegrityError(f"{archive}: the files are larger than the archive; it is damaged or made up")
    for entry in entries:
        path = folder / entry.filename
        path.parent.mkdir(parents=True, exist_ok=True)
        with source.open(entry) as packed, path.open("xb") as file:
            shutil.copyfileobj(packed, file)  # no more than file_size, whatever is there
