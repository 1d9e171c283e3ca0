"""Pinned archives from the user's own package index, and safe reading of them. Nothing fetched is executed."""

import ast
import base64
import hashlib
import html.parser
import http.client
import json
import logging
import os
import re
import shutil
import ssl
import subprocess
import sys
import tarfile
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

from filelock import FileLock
from packaging.utils import InvalidSdistFilename, InvalidWheelFilename, canonicalize_name, parse_sdist_filename
from packaging.utils import parse_wheel_filename as parse_wheel

log = logging.getLogger("deltatune.fetch")

DEFAULT_INDEX = "https://pypi.org/simple"
ACCEPT = "application/vnd.pypi.simple.v1+json, application/vnd.pypi.simple.v1+html;q=0.2, text/html;q=0.1"
CHUNK = 1 << 20
TRIES = 5
TIMEOUT_S = 60.0
PAUSE_S = 0.3  # before the second try; doubled each time
LARGEST_MEMBER = 16 << 30  # bytes; a zip bomb stops here, a large model does not
LARGEST_PAGE = 64 << 20


@dataclass(frozen=True)
class Pin:
    """One file of one release, fixed by its digest. `file` may be empty: the index is then asked for the digest."""

    name: str
    version: str
    sha256: str
    file: str = ""

    def __str__(self) -> str:
        return f"{self.name} {self.version}"


@dataclass(frozen=True)
class Link:
    """A file the index offers."""

    file: str
    url: str
    sha256: str = ""


def cache(*parts: str) -> Path:
    """A path under $DELTATUNE_CACHE, else $XDG_CACHE_HOME/deltatune, else ~/.cache/deltatune; its folder exists."""
    chosen = os.environ.get("DELTATUNE_CACHE")
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache")
    path = Path(chosen or os.path.join(home, "deltatune")).expanduser().joinpath(*parts)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


@contextmanager
def fresh_folder(target: Path) -> Iterator[Path]:
    """A temporary folder that becomes `target` when the block ends well, and is gone when it does not."""
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield work
        work.chmod(0o755)
        if target.exists():
            shutil.rmtree(target)
        work.rename(target)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def locked(target: Path) -> FileLock:
    """A lock beside `target`: two runs that start together fetch and convert once."""
    return FileLock(target.with_name(f".{target.name}.lock"))


def sha256(path: Path) -> str:
    """Digest of a file in lower-case hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_digest(path: Path, expected: str) -> None:
    """Remove `path` and raise ValueError unless its sha256 is `expected`."""
    actual = sha256(path)
    if actual == expected.lower():
        return
    path.unlink()
    raise ValueError(
        f"{path.name}: sha256 differs from the pinned one, so the file was removed\n"
        f"  expected {expected}\n  actual   {actual}\n"
        "Try again; if it happens again, the index serves another file than the one pinned: ask its administrator, "
        "or set PIP_INDEX_URL to an index you trust."
    )


# --- what pip is configured with ---


def pip_settings() -> dict[str, str]:
    """pip's effective settings for `download` (its files, then PIP_* variables), by long option name."""
    asked = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=False)
    found: dict[str, str] = {}
    for section in ("global.", "download."):
        for line in asked.stdout.splitlines():
            key, _, value = line.partition("=")
            if key.startswith(section):
                found[key.removeprefix(section)] = str(ast.literal_eval(value))
    for key, value in os.environ.items():
        if key.startswith("PIP_"):
            found[key.removeprefix("PIP_").lower().replace("_", "-")] = value
    return found


def indexes(settings: dict[str, str]) -> list[str]:
    """The index addresses in pip's order, without a slash at the end."""
    if settings.get("no-index", "").lower() in ("1", "true", "yes", "on"):
        return []
    addresses = [settings.get("index-url", DEFAULT_INDEX), *settings.get("extra-index-url", "").split()]
    return [address.rstrip("/") for address in addresses]


def shown(url: str) -> str:
    """The address without a user name or password."""
    return re.sub(r"//[^/@]*@", "//", url)


# --- addresses ---


def tls(settings: dict[str, str], host: str) -> ssl.SSLContext:
    """The certificates pip would use; none are checked for a host the user told pip to trust (digests still are)."""
    if host in settings.get("trusted-host", "").split():
        return ssl._create_unverified_context()
    if settings.get("cert"):
        return ssl.create_default_context(cafile=settings["cert"])
    if ssl.get_default_verify_paths().cafile or os.environ.get("SSL_CERT_DIR"):
        return ssl.create_default_context()
    import certifi  # python.org's macOS builds come without a certificate store

    return ssl.create_default_context(cafile=certifi.where())


def open_url(url: str, settings: dict[str, str], headers: dict[str, str]) -> Any:
    """Open http, https or file addresses as pip would: its certificates, its proxy, credentials from the address."""
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https", "file"):
        raise ValueError(f"{shown(url)}: only http, https and file addresses are fetched")
    host = parts.hostname or ""
    if parts.username:
        secret = f"{urllib.parse.unquote(parts.username)}:{urllib.parse.unquote(parts.password or '')}"
        headers = {**headers, "Authorization": "Basic " + base64.b64encode(secret.encode()).decode()}
        parts = parts._replace(netloc=parts.netloc.rpartition("@")[2])
    handlers: list[urllib.request.BaseHandler] = [urllib.request.HTTPSHandler(context=tls(settings, host))]
    if settings.get("proxy"):
        handlers.append(urllib.request.ProxyHandler({"http": settings["proxy"], "https": settings["proxy"]}))
    request = urllib.request.Request(urllib.parse.urlunsplit(parts), headers=headers)
    return urllib.request.build_opener(*handlers).open(request, timeout=TIMEOUT_S)


def resume(url: str, part: Path, settings: dict[str, str]) -> None:
    """Append to `part` what it still lacks of `url`; a server that ignores Range restarts it."""
    have = part.stat().st_size if part.exists() else 0
    headers = {"Range": f"bytes={have}-"} if have else {}
    try:
        reply = open_url(url, settings, headers)
    except urllib.error.HTTPError as error:
        if error.code != 416:
            raise
        error.close()
        part.unlink()  # longer than the file itself: not a beginning of it
        reply = open_url(url, settings, {})
    with reply:
        continued = reply.status == 206
        with part.open("ab" if continued else "wb") as file:
            shutil.copyfileobj(reply, file, CHUNK)
        expected = reply.headers.get("Content-Length")
    written = part.stat().st_size - (have if continued else 0)
    if expected is not None and written < int(expected):
        raise ConnectionError(f"{written} of {expected} bytes came")


def download(url: str, target: Path, digest: str, settings: dict[str, str]) -> Path:
    """Fetch `url` to `target`, continuing an earlier attempt; the file exists only when its digest is right."""
    part = target.with_name(target.name + ".part")
    log.info("fetching %s", target.name)
    for attempt in range(TRIES):
        try:
            resume(url, part, settings)
            break
        except (OSError, http.client.HTTPException) as error:
            if attempt == TRIES - 1 or isinstance(error, urllib.error.HTTPError | FileNotFoundError):
                raise ValueError(f"{shown(url)}: {error}. What came so far is kept; run again to go on.") from None
            time.sleep(PAUSE_S * 2**attempt)
    part = part.rename(target.with_name(target.name + ".whole"))
    check_digest(part, digest)
    return part.rename(target)


# --- the simple index (PEP 503 and PEP 691) ---


class Anchors(html.parser.HTMLParser):
    """Collects the links of an index page."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note the address of an <a>."""
        self.found += [value for key, value in attrs if tag == "a" and key == "href" and value]


def page_links(text: str, content_type: str, base: str) -> list[Link]:
    """The files that an index page lists."""
    if "json" in content_type:
        files = json.loads(text).get("files", [])
        return [Link(f["filename"], urllib.parse.urljoin(base, f["url"]), f["hashes"].get("sha256", "")) for f in files]
    anchors = Anchors()
    anchors.feed(text)
    links = []
    for href in anchors.found:
        url, fragment = urllib.parse.urldefrag(urllib.parse.urljoin(base, href))
        digest = dict(urllib.parse.parse_qsl(fragment)).get("sha256", "")
        links.append(Link(urllib.parse.unquote(url.rpartition("/")[2]), url, digest))
    return links


def read_page(url: str, settings: dict[str, str]) -> list[Link]:
    """The links of one page; a folder (file: address) is read through its index.html, or listed."""
    parts = urllib.parse.urlsplit(url)
    if parts.scheme == "file":
        folder = Path(urllib.request.url2pathname(parts.path))
        if folder.is_dir():
            if not (folder / "index.html").exists():
                return [Link(file.name, file.as_uri()) for file in sorted(folder.iterdir()) if file.is_file()]
            url = url.rstrip("/") + "/index.html"
    with open_url(url, settings, {"Accept": ACCEPT}) as reply:
        content_type = reply.headers.get("Content-Type", "")
        base = reply.url or url
        return page_links(reply.read(LARGEST_PAGE).decode("utf-8", "replace"), content_type, base)


def places(name: str, settings: dict[str, str]) -> list[str]:
    """Every page that may list `name`: the folders of --find-links, then each index."""
    local = settings.get("find-links", "").split()
    looked = [place if "://" in place else Path(place).expanduser().absolute().as_uri() for place in local]
    return [*looked, *(f"{index}/{canonicalize_name(name)}/" for index in indexes(settings))]


def is_release(file: str, pin: Pin) -> bool:
    """Whether `file` is a wheel or source archive of that name and version."""
    try:
        name, version = parse_wheel(file)[:2] if file.endswith(".whl") else parse_sdist_filename(file)
    except (InvalidWheelFilename, InvalidSdistFilename):
        return False
    return name == canonicalize_name(pin.name) and str(version) == pin.version


def offered(pin: Pin, settings: dict[str, str]) -> tuple[list[Link], list[str]]:
    """The release's files on every configured page, and why a page could not be read."""
    found, problems = [], []
    for place in places(pin.name, settings):
        try:
            found += [link for link in read_page(place, settings) if is_release(link.file, pin)]
        except (OSError, ValueError) as error:
            problems.append(f"{shown(place)}: {error}")
    return found, problems


def matching(pin: Pin, links: list[Link]) -> list[Link]:
    """The links that may be the pinned file, the surest first."""
    exact = [link for link in links if link.sha256 == pin.sha256]
    unknown = [link for link in links if not link.sha256 and pin.file in ("", link.file)]
    named = [link for link in links if link.file == pin.file]
    return list(dict.fromkeys([*exact, *named, *unknown]))


# --- a release's file ---


def pip_download(pin: Pin, folder: Path) -> str:
    """Let pip fetch the wheel into `folder`; '' or why it did not."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    quiet = [] if sys.stderr.isatty() else ["--quiet"]
    asked = subprocess.run(
        [*command, *quiet, "--disable-pip-version-check", "--dest", str(folder), f"{pin.name}=={pin.version}"],
        stdout=sys.__stderr__ if sys.stderr.isatty() else subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        env={**os.environ, "PIP_RESUME_RETRIES": str(TRIES)},  # pip >= 25.1; older ones do not know it
        text=True,
        check=False,
    )
    return "" if asked.returncode == 0 else asked.stderr.strip() or f"pip exited with {asked.returncode}"


def from_pip(pin: Pin, target: Path) -> str:
    """Fetch a pinned wheel with pip to `target`; '' or why not."""
    with tempfile.TemporaryDirectory(prefix=".pip.", dir=target.parent) as folder:
        problem = pip_download(pin, Path(folder))
        wheels = sorted(Path(folder).glob("*.whl"))
        if problem or not wheels:
            return problem or "pip saved no wheel"
        if pin.file and wheels[0].name != pin.file:
            return f"pip chose {wheels[0].name}"  # another platform's wheel was pinned
        check_digest(wheels[0], pin.sha256)
        wheels[0].rename(target)
    return ""


def from_index(pin: Pin, folder: Path, settings: dict[str, str], problems: list[str]) -> Path:
    """Fetch a release's file by its address: the way for source archives, which pip would build."""
    links, unread = offered(pin, settings)
    chosen = matching(pin, links)
    if not chosen:
        files = ", ".join(link.file for link in links) or "none of this version"
        wanted = pin.file or f"a file with sha256 {pin.sha256}"
        tried = "\n  ".join([*problems, *unread])
        raise ValueError(
            f"{pin}: {wanted} was not found; the configured indexes offer: {files}\n  {tried}\n"
            "Check the network and pip's settings: `pip config list` shows which index is asked."
        )
    return download(chosen[0].url, folder / chosen[0].file, pin.sha256, settings)


def archive(pin: Pin) -> Path:
    """The pinned wheel or source archive in the cache, fetched when it is not there.

    Wheels come through `pip download`, source archives by address from the index pip is configured with (pip would
    run their setup.py). ValueError when it is not offered or its digest differs.
    """
    folder = cache("archives", pin.sha256[:16], "x").parent
    with locked(folder):
        kept = [path for path in folder.iterdir() if is_release(path.name, pin)]
        if kept:
            return kept[0]
        settings = pip_settings()
        problems = []
        file = pin.file
        if not file:
            exact = [link.file for link in offered(pin, settings)[0] if link.sha256 == pin.sha256]
            file = exact[0] if exact else ""
        if file.endswith(".whl"):
            log.info("fetching %s", file)
            problem = from_pip(pin, folder / file)
            if not problem:
                return folder / file
            problems.append(f"pip: {problem}")
        return from_index(pin, folder, settings, problems)


# --- reading archives ---


def safe_name(name: str) -> PurePosixPath:
    """The member's path, refused when it could lead out of a folder."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name or not path.parts:
        raise ValueError(f"archive member {name!r} leads out of its folder; nothing was taken from the archive")
    return path


def copy_capped(source: IO[bytes], target: Path, name: str) -> None:
    """Copy at most LARGEST_MEMBER bytes, counted as they come: a header may lie."""
    target.parent.mkdir(parents=True, exist_ok=True)
    left = LARGEST_MEMBER
    with target.open("wb") as file:
        while block := source.read(min(CHUNK, left + 1)):
            left -= len(block)
            if left < 0:
                raise ValueError(f"archive member {name!r} is larger than {LARGEST_MEMBER} bytes; refused")
            file.write(block)


def refuse_special(name: str, regular: bool) -> None:
    """Links and devices are never followed."""
    if not regular:
        raise ValueError(f"archive member {name!r} is a link or a special file; only plain files are read")


def unpack(source: Path, into: Path, wanted: Callable[[str], bool]) -> list[str]:
    """Copy the plain files whose member name is `wanted` into `into`, under those names; returns the names.

    Every chosen member is checked before the first is written. ValueError for a path that leads out, a link, a
    special file or one over the size cap.
    """
    if zipfile.is_zipfile(source):
        with zipfile.ZipFile(source) as held:
            chosen = [m for m in held.infolist() if not m.is_dir() and wanted(m.filename)]
            for m in chosen:
                safe_name(m.filename)
                refuse_special(m.filename, (m.external_attr >> 16) & 0o170000 in (0, 0o100000))
            for m in chosen:
                with held.open(m) as stream:
                    copy_capped(stream, into / safe_name(m.filename), m.filename)
            return [m.filename for m in chosen]
    with tarfile.open(source) as tar:
        members = [m for m in tar.getmembers() if not m.isdir() and wanted(m.name)]
        for entry in members:
            safe_name(entry.name)
            refuse_special(entry.name, entry.isreg())
        for entry in members:
            plain = tar.extractfile(entry)
            assert plain is not None  # a regular file: checked above
            with plain:
                copy_capped(plain, into / safe_name(entry.name), entry.name)
        return [entry.name for entry in members]


def member_names(source: Path) -> list[str]:
    """The names an archive lists."""
    if zipfile.is_zipfile(source):
        with zipfile.ZipFile(source) as held:
            return held.namelist()
    with tarfile.open(source) as tar:
        return tar.getnames()
