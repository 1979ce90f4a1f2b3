"""Engine directories: what an export writes, sealed so that no byte reaches a runtime that its manifest doesn't list.

An engine is code: whoever can change one runs what they like in the process that loads it. An engine directory holds

config.json  preprocessing.json  labels.json  MODEL_CARD.md
ood.json                  optional: which studies are unlike the training images, see `deploy.ood`
NAME.onnx                 one or more, weights inside: external data would be read by path, past every check
engines/NAME.plan         or .engine, with NAME.json beside it if there is something to say about it
golden/NAME.npz, .json    inputs, expected outputs, tolerances
MANIFEST.json             size and SHA-256 of every file, and for every engine what it was built from and for
MANIFEST.sig              optional: Ed25519 over the exact bytes of MANIFEST.json, 64 bytes

and nothing else. `seal` writes the last two, `open_sealed` checks them, `SealedDirectory.read` returns bytes that were
hashed after they were read, so that a file that is replaced meanwhile can't slip through. Without a signature the
manifest shows damage, mistakes and mixed-up files; only a public key from elsewhere shows that somebody rewrote it.
A key pair: `openssl genpkey -algorithm ed25519 -out key.pem`, `openssl pkey -in key.pem -pubout -out public.pem`.

Standard library alone, and `cryptography` where a key is given. POSIX: files are opened relative to open folders.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import platform
import re
import reprlib
import shlex
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO

from cldf_fast import __version__
from cldf_fast.deploy import signature
from cldf_fast.errors import ConfigError, EngineMismatchError, IntegrityError
from cldf_fast.files import atomic_write_bytes

MANIFEST = "MANIFEST.json"
SIGNATURE = "MANIFEST.sig"

_FORMAT = 1
_REQUIRED = ("MODEL_CARD.md", "config.json", "labels.json", "preprocessing.json")
_FOLDERS = ("engines", "golden")
_NAME = r"[A-Za-z0-9][A-Za-z0-9._+-]{0,199}"
_LAYOUT = re.compile(rf"ood\.json|{_NAME}\.onnx|engines/{_NAME}\.(plan|engine|json)|golden/{_NAME}\.(npz|json)")
_ENGINE = re.compile(r"engines/.+\.(plan|engine)")
_CAPABILITIES = re.compile(r"[0-9]{1,3}\.[0-9]{1,3}(\+|(,[0-9]{1,3}\.[0-9]{1,3}){0,30})")
_MAX_JSON = 1 << 20  # bytes; a manifest of a thousand files has a fifth of it
_MAX_SIZE = 1 << 34  # bytes of one file
_CHUNK = 1 << 20
_REPR = reprlib.Repr()
_REPR.maxlevel, _REPR.maxstring, _REPR.maxother = 2, 100, 100

Shape = tuple[int, ...]


@dataclass(frozen=True)
class FileEntry:
    """What the manifest says about a file. sha256: 64 lower-case hexadecimal digits; size: bytes."""

    sha256: str
    size: int


@dataclass(frozen=True)
class EngineKey:
    """What an engine was built from and for. Texts are printable ASCII, 1 to 200 characters.

    weights_sha256: of the weights in the run that was exported; onnx_sha256: of an ONNX file in the directory;
    precision: of the arithmetic, e.g. "fp16"; opset: of the ONNX file;
    shapes: input name to its smallest, best and largest shape;
    flavour: "tensorrt" or "tensorrt_rtx"; version: of it, e.g. "11.4.0.1"; cuda: version of its runtime;
    compute_capability: "8.6" for that one, "8.0,8.6" for several in one engine, "8.0+" for it and all later ones (an
    engine built for compatibility);
    gpu_name: of the GPU that built it; os: as `operating_system` gives it;
    builder_flags: of the builder, in any order that its caller keeps.
    """

    weights_sha256: str
    onnx_sha256: str
    precision: str
    opset: int
    shapes: dict[str, tuple[Shape, Shape, Shape]]
    flavour: str
    version: str
    cuda: str
    compute_capability: str
    gpu_name: str
    os: str
    builder_flags: tuple[str, ...]


@dataclass(frozen=True)
class Runtime:
    """What an engine would run on: fields as in `EngineKey`, compute_capability of the GPU, so without a plus.

    gpu_name chooses between engines that all fit; unlike the rest it excludes none.
    """

    flavour: str
    version: str
    compute_capability: str
    os: str
    gpu_name: str = ""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[0-9]{1,3}\.[0-9]{1,3}", self.compute_capability):
            raise ConfigError(f"compute_capability: expected a number such as 9.0, got {self.compute_capability!r}")


def operating_system() -> str:
    """This system in the form that engines are keyed by, e.g. "linux-x86_64"."""
    return f"{platform.system()}-{platform.machine()}".lower()


@dataclass(frozen=True)
class Manifest:
    """The content of MANIFEST.json, valid: package_version wrote it; signer is the SHA-256 of the raw public key."""

    package_version: str
    files: Mapping[str, FileEntry]
    engines: Mapping[str, EngineKey]
    signer: str | None

    @property
    def sha256(self) -> str:
        """SHA-256 of MANIFEST.json: it stands for all that was deployed, in logs for instance."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    def to_bytes(self) -> bytes:
        """MANIFEST.json: ASCII, keys sorted, the only bytes that `from_bytes` takes for this content."""
        document = {"format": _FORMAT, **asdict(self)}
        return (json.dumps(document, indent=2, separators=(",", ": "), sort_keys=True) + "\n").encode()

    @classmethod
    def from_bytes(cls, data: bytes, source: str | Path = MANIFEST) -> Manifest:
        """Raises IntegrityError, naming `source` and the entry, for anything but what `to_bytes` makes."""
        document = parse_json(data, source)
        if isinstance(document, dict) and document.get("format", _FORMAT) != _FORMAT:
            found = _short(document["format"])
            raise IntegrityError(f"{source}: expected format {_FORMAT}, got {found}; update cldf-fast or export again")
        _check(document, _DOCUMENT, str(source))
        entries, keys = document["files"], document["engines"]
        check_names(entries, source)
        for name, entry in entries.items():
            _check(entry, _ENTRY, f"{source}, {name}")
        if set(keys) != {name for name in entries if _ENGINE.fullmatch(name)}:
            raise IntegrityError(f"{source}: engines: expected a key for every listed engine and for no other file")
        for name, key in keys.items():
            _check(key, _KEY, f"{source}, {name}")
            if key["onnx_sha256"] not in {entries[file]["sha256"] for file in entries if file.endswith(".onnx")}:
                raise IntegrityError(
                    f"{source}, {name}: was built from an ONNX file that is not listed; build it again"
                )
        files = {name: FileEntry(**entry) for name, entry in entries.items()}
        engines = {name: _engine_key(key) for name, key in keys.items()}
        manifest = cls(document["package_version"], files, engines, document["signer"])
        if manifest.to_bytes() != data:
            raise IntegrityError(f"{source}: is not in the form that cldf-fast writes: it was edited; export again")
        return manifest


@dataclass(frozen=True)
class SealedDirectory:
    """An engine directory whose manifest and list of files were checked; contents are checked as they are read.

    signature: what MANIFEST.sig holds; verified: whether it was checked against a public key.
    """

    folder: Path
    manifest: Manifest
    signature: bytes | None
    verified: bool

    def read(self, name: str) -> bytes:
        """A file's bytes, which are those that the manifest lists.

        Raises IntegrityError, and returns nothing, for a name that isn't listed, a file that is missing, a symbolic
        link or behind one, not a regular file, or of another size or content.
        """
        entry = self._entry(name)
        with self._opened(name, entry) as file:
            # One byte more than listed shows that a file grew since its size was asked for.
            data = file.read(entry.size + 1)
        self._compare(name, FileEntry(hashlib.sha256(data).hexdigest(), len(data)))
        return data

    def read_json(self, name: str) -> Any:
        """A file's content as JSON, at most 1 MiB; a key that appears twice, NaN and infinities are refused."""
        if self._entry(name).size > _MAX_JSON:
            raise IntegrityError(f"{self.folder / name}: expected JSON of at most {_MAX_JSON} bytes")
        return parse_json(self.read(name), self.folder / name)

    def engine(self, runtime: Runtime, *, onnx: str) -> str:
        """Name of the engine built from this ONNX file for this runtime.

        Of several that fit, one that was built on the same model of GPU, then the first by name. Raises
        EngineMismatchError with all fields in which the nearest engine differs.
        """
        source = self._entry(onnx).sha256
        keys = {name: key for name, key in self.manifest.engines.items() if key.onnx_sha256 == source}
        command = _export(self.folder, "tensorrt")
        if not keys:
            raise EngineMismatchError(
                f"{self.folder}: holds no engine of {onnx}; build one on this machine with {command}"
            )
        differences = {name: _differences(key, runtime) for name, key in keys.items()}
        name = min(keys, key=lambda name: (len(differences[name]), keys[name].gpu_name != runtime.gpu_name, name))
        if differences[name]:
            raise EngineMismatchError(
                f"{self.folder / name}: was built for {' and '.join(differences[name])}; build it again on this "
                f"machine with {command}"
            )
        return name

    def verify_all(self) -> None:
        """Check every file's content and that no file was added, without holding a file in memory."""
        _check_listing(self.folder, self.manifest)
        for name, entry in self.manifest.files.items():
            with self._opened(name, entry) as file:
                found = _measure(file, entry.size + 1)
            self._compare(name, found)

    def check_outside(self, out: Path) -> None:
        """Raise ConfigError for a place in the directory, which would not be as it was sealed with a file more."""
        if self.folder in (place := out.resolve()).parents or place == self.folder:
            raise ConfigError(
                f"out: expected a folder outside of the engine directory {self.folder}, whose seal a further file "
                f"breaks, got {out}"
            )

    def copy_to(self, folder: Path) -> None:
        """Write all of it, every byte checked, to a folder, which is an engine directory then."""
        for name in self.manifest.files:
            atomic_write_bytes(folder / name, self.read(name))
        atomic_write_bytes(folder / MANIFEST, self.manifest.to_bytes())
        if self.signature is not None:
            atomic_write_bytes(folder / SIGNATURE, self.signature)

    def _entry(self, name: str) -> FileEntry:
        try:
            return self.manifest.files[name]
        except KeyError:
            raise IntegrityError(f"{self.folder}: {MANIFEST} lists no file {_short(name)}") from None

    @contextmanager
    def _opened(self, name: str, entry: FileEntry) -> Iterator[BinaryIO]:
        with _opened(self.folder, name) as file:
            # Refused before memory is taken for it.
            size = os.fstat(file.fileno()).st_size
            if size != entry.size:
                raise self._differs(name, f"{entry.size} bytes", f"{size}")
            yield file

    def _compare(self, name: str, found: FileEntry) -> None:
        entry = self.manifest.files[name]
        if found.size != entry.size:
            raise self._differs(name, f"{entry.size} bytes", "another number while it was read")
        if found.sha256 != entry.sha256:
            raise self._differs(name, f"content with SHA-256 {entry.sha256[:16]}...", f"{found.sha256[:16]}...")

    def _differs(self, name: str, expected: str, found: str) -> IntegrityError:
        command = _export(self.folder, "tensorrt" if _ENGINE.fullmatch(name) else "onnx")
        return IntegrityError(
            f"{self.folder / name}: expected {expected} as {MANIFEST} lists it, got {found}; take a fresh copy, or "
            f"make it again with {command}"
        )


def seal(folder: str | Path, *, engines: Mapping[str, EngineKey], signing_key: Path | None = None) -> Manifest:
    """Write MANIFEST.json for all that is in the folder, and MANIFEST.sig if there is a key to sign with.

    engines: the key of every file engines/*.plan and *.engine, by its path in the folder.
    signing_key: file of an Ed25519 private key, PEM without a password.
    Raises IntegrityError for a file that doesn't belong in an engine directory, by its name or its kind, one that is
    missing, and a key of an engine that is wrong in itself; ConfigError for a key file that can't be used.
    """
    folder = _resolved(folder)
    private = None if signing_key is None else signature.private_key(signing_key)
    names = _listing(folder) - {MANIFEST, SIGNATURE}
    check_names(names, folder)
    entries = {}
    for name in names:
        with _opened(folder, name) as file:
            entries[name] = _measure(file, _MAX_SIZE + 1)
    signer = None if private is None else signature.fingerprint(private.public_key())
    data = Manifest(__version__, entries, dict(engines), signer).to_bytes()
    manifest = Manifest.from_bytes(data, folder / MANIFEST)
    # Stopped at any point, what is there does not pass: an old signature never stands beside a new manifest unnoticed.
    (folder / SIGNATURE).unlink(missing_ok=True)
    atomic_write_bytes(folder / MANIFEST, data)
    if private is not None:
        atomic_write_bytes(folder / SIGNATURE, private.sign(data))
    return manifest


def open_sealed(
    folder: str | Path, *, public_key: Path | None = None, require_signature: bool = False
) -> SealedDirectory:
    """Check an engine directory's manifest, its signature and that exactly the listed files are there.

    public_key: file of an Ed25519 public key, PEM; with it, a directory that isn't signed by its owner is refused.
    require_signature: refuse to go on without a public key, for callers to whom it may not have been given.
    Raises IntegrityError where anything is not as it should be; ConfigError for a key file that can't be used. File
    contents are checked when they are read, or all at once by `verify_all`.
    """
    if require_signature and public_key is None:
        raise ConfigError("public_key: a signature is required, but no public key was given to check it with")
    folder = _resolved(folder)
    data = _read_small(folder, MANIFEST)
    manifest = Manifest.from_bytes(data, folder / MANIFEST)
    signed = _read_small(folder, SIGNATURE) if os.path.lexists(folder / SIGNATURE) else None
    if manifest.signer is None and signed is not None:
        raise IntegrityError(f"{folder / SIGNATURE}: is there, but {MANIFEST} says that it is not signed")
    if manifest.signer is not None and signed is None:
        raise IntegrityError(f"{folder / SIGNATURE}: is missing, but {MANIFEST} says that it is signed")
    if public_key is not None:
        _check_signature(folder, manifest, data, signed, public_key)
    _check_listing(folder, manifest)
    return SealedDirectory(folder, manifest, signed, verified=public_key is not None)


def parse_json(data: bytes, source: str | Path) -> Any:
    """Strict JSON in UTF-8: raises IntegrityError also for a key that appears twice, NaN, infinities, deep nesting."""
    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_finite, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise IntegrityError(f"{source}: can't be read as strict JSON ({error})") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {_short(twice)} appears twice")
    return content


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:20]} is not a finite number")
    return number


def _short(value: object) -> str:
    """A value for an error message: a short line of ASCII, whatever it is and however deep it is nested."""
    return _REPR.repr(value).encode("ascii", "backslashreplace").decode()


def _is_text(value: object) -> bool:
    return isinstance(value, str) and 1 <= len(value) <= 200 and value.isascii() and value.isprintable()


def _is_hash(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value) is not None


def _is_integer(value: object, low: int, high: int) -> bool:
    return type(value) is int and low <= value <= high  # a bool is an int too


def _is_shapes(value: object) -> bool:
    """{input: [smallest, best, largest]}, three shapes of one rank, each size no larger than the next shape's."""
    if not isinstance(value, dict) or not value or not all(map(_is_text, value)):
        return False
    for shapes in value.values():
        if not isinstance(shapes, list) or len(shapes) != 3 or not all(isinstance(shape, list) for shape in shapes):
            return False
        if not 1 <= len(shapes[0]) <= 8 or len({len(shape) for shape in shapes}) != 1:
            return False
        for sizes in zip(*shapes, strict=True):
            if not all(_is_integer(size, 1, 1 << 20) for size in sizes) or list(sizes) != sorted(sizes):
                return False
    return True


_TEXT = (_is_text, "a printable ASCII text of 1 to 200 characters")
_HASH = (_is_hash, "64 lower-case hexadecimal digits")
_OBJECT = (lambda value: isinstance(value, dict), "an object")
# What each object of the manifest holds: all these keys and no others; of each a test, and its meaning in words.
_Schema = dict[str, tuple[Callable[[Any], bool], str]]
_DOCUMENT: _Schema = {
    "format": (lambda value: type(value) is int, "an integer"),
    "package_version": _TEXT,
    "files": _OBJECT,
    "engines": _OBJECT,
    "signer": (lambda value: value is None or _is_hash(value), f"null or {_HASH[1]}"),
}
_ENTRY: _Schema = {
    "sha256": _HASH,
    "size": (lambda value: _is_integer(value, 0, _MAX_SIZE), f"an integer from 0 to {_MAX_SIZE}"),
}
_KEY: _Schema = {
    **{field.name: _TEXT for field in fields(EngineKey)},
    "weights_sha256": _HASH,
    "onnx_sha256": _HASH,
    "opset": (lambda value: _is_integer(value, 1, 99), "an integer from 1 to 99"),
    "shapes": (_is_shapes, "for every input its smallest, best and largest shape"),
    "compute_capability": (
        lambda value: isinstance(value, str) and _CAPABILITIES.fullmatch(value) is not None,
        "a number such as 9.0, several as in 8.0,8.6, or 8.0+",
    ),
    "builder_flags": (
        lambda value: isinstance(value, list) and len(value) <= 99 and all(map(_is_text, value)),
        "a list of texts",
    ),
}


def _check(content: object, schema: _Schema, source: str) -> None:
    if not isinstance(content, dict) or set(content) != set(schema):
        got = sorted(content) if isinstance(content, dict) else content
        raise IntegrityError(
            f"{source}: expected an object with the keys {', '.join(sorted(schema))}, got {_short(got)}"
        )
    for key, (test, meaning) in schema.items():
        if not test(content[key]):
            raise IntegrityError(f"{source}: {key}: expected {meaning}, got {_short(content[key])}")


def check_names(names: Iterable[str], source: str | Path) -> None:
    """All names are of the layout, none is missing that has to be there, no two differ by case alone."""
    seen: dict[str, str] = {}
    for name in sorted(names):
        if name not in _REQUIRED and not _LAYOUT.fullmatch(name):
            raise IntegrityError(f"{source}: {_short(name)} does not belong in an engine directory; remove it")
        # Where a file system ignores case, one would be read for the other.
        other = seen.setdefault(name.lower(), name)
        if other != name:
            raise IntegrityError(f"{source}: {other} and {name} differ by upper and lower case alone; rename one")
    for name in _REQUIRED:
        if name not in names:
            raise IntegrityError(f"{source}: {name} is missing; export again")


def _engine_key(content: dict[str, Any]) -> EngineKey:
    shapes = {name: tuple(map(tuple, profile)) for name, profile in content["shapes"].items()}
    return EngineKey(**{**content, "shapes": shapes, "builder_flags": tuple(content["builder_flags"])})


def _differences(key: EngineKey, runtime: Runtime) -> list[str]:
    """Each field that keeps the engine from running here, in words."""
    pairs = [
        ("TensorRT flavour", key.flavour, runtime.flavour),
        ("TensorRT version", key.version, runtime.version),
        ("compute capability", key.compute_capability, runtime.compute_capability),
        ("operating system", key.os, runtime.os),
    ]
    return [
        f"{field} {built}, not {_short(here)}"
        for field, built, here in pairs
        if built != here and not (field == "compute capability" and _serves(built, here))
    ]


def _serves(capabilities: str, here: str) -> bool:
    if capabilities.endswith("+"):
        return _number(capabilities[:-1]) <= _number(here)
    return here in capabilities.split(",")


def _number(capability: str) -> tuple[int, ...]:
    return tuple(map(int, capability.split(".")))


def _export(folder: Path, kind: str) -> str:
    return f"`cldf-fast export RUN --format {kind} --out {shlex.quote(str(folder))}`"


def _resolved(folder: str | Path) -> Path:
    """The folder itself may be reached through links; nothing in it may."""
    path = Path(folder).resolve()
    if not path.is_dir():
        raise IntegrityError(f"{folder}: is no engine directory: it is missing or no folder")
    return path


@contextmanager
def _opened(folder: Path, name: str) -> Iterator[BinaryIO]:
    """A regular file in the folder, open for reading; no component below the folder is a link."""
    *parents, last = name.split("/")
    # Without O_NONBLOCK, opening a pipe waits for its other end.
    steps = [*((part, os.O_DIRECTORY) for part in parents), (last, os.O_NONBLOCK)]
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        for part, kind in steps:
            above = descriptor
            try:
                descriptor = os.open(part, os.O_RDONLY | os.O_NOFOLLOW | kind, dir_fd=above)
            finally:
                os.close(above)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise OSError(errno.ELOOP, "")
        with open(descriptor, "rb") as file:
            yield file
    except OSError as error:
        if error.errno == errno.ENOENT:
            reason = "is missing"
        elif error.errno in (errno.ELOOP, errno.ENOTDIR, errno.ENXIO):
            reason = "expected a regular file, got a symbolic link, something behind one, or no file"
        else:
            reason = f"can't be read ({error.strerror})"
        raise IntegrityError(f"{folder / name}: {reason}; take a fresh copy, or export it again") from error


def _read_small(folder: Path, name: str) -> bytes:
    with _opened(folder, name) as file:
        data = file.read(_MAX_JSON + 1)
    if len(data) > _MAX_JSON:
        raise IntegrityError(f"{folder / name}: expected at most {_MAX_JSON} bytes, got more")
    return data


def _measure(file: BinaryIO, limit: int) -> FileEntry:
    """Hash and size of at most `limit` bytes of a file, and up to one chunk more."""
    digest, size, buffer = hashlib.sha256(), 0, memoryview(bytearray(_CHUNK))
    while size < limit and (count := file.readinto(buffer)):  # type: ignore[attr-defined]
        digest.update(buffer[:count])
        size += count
    return FileEntry(digest.hexdigest(), size)


def _listing(folder: Path) -> set[str]:
    """Names of all files, relative to the folder; a link, a special file or another folder than the layout's raises."""
    names: set[str] = set()
    folders = [""]
    for prefix in folders:
        with os.scandir(folder / prefix) as entries:
            for entry in entries:
                name = f"{prefix}{entry.name}"
                if entry.is_file(follow_symlinks=False):
                    names.add(name)
                elif entry.is_dir(follow_symlinks=False) and name in _FOLDERS:
                    folders.append(f"{name}/")
                else:
                    raise IntegrityError(
                        f"{folder}: {_short(name)} is a link, a folder or a special file that does not belong in an "
                        "engine directory; remove it"
                    )
    return names


def _check_listing(folder: Path, manifest: Manifest) -> None:
    found = _listing(folder) - {MANIFEST, SIGNATURE}
    for name in sorted(manifest.files.keys() - found):
        raise IntegrityError(
            f"{folder / name}: is missing, {MANIFEST} lists it; take a fresh copy, or make it again with "
            f"{_export(folder, 'tensorrt' if _ENGINE.fullmatch(name) else 'onnx')}"
        )
    for name in sorted(found - manifest.files.keys()):
        raise IntegrityError(f"{folder}: {_short(name)} is there, {MANIFEST} does not list it; remove it")


def _check_signature(folder: Path, manifest: Manifest, data: bytes, signed: bytes | None, public_key: Path) -> None:
    key = signature.public_key(public_key)
    expected = signature.fingerprint(key)
    if manifest.signer is None or signed is None:
        raise IntegrityError(f"{folder}: is not signed, expected a signature by the owner of {public_key}")
    if manifest.signer != expected:
        raise IntegrityError(
            f"{folder}: was signed with the key {manifest.signer[:16]}..., expected {expected[:16]}... of {public_key}"
        )
    if not signature.fits(key, signed, data):
        raise IntegrityError(
            f"{folder / SIGNATURE}: does not fit {MANIFEST}: one of them was changed after signing; take a fresh copy"
        )
