"""A SuperLink and SuperNodes on loopback, with TLS: the bits of the reference."""

from __future__ import annotations

import datetime as dt
import ipaddress
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch

import isthmus
from isthmus.federated.flower import QUIET
from isthmus.run.build import build
from isthmus.run.config import Config
from isthmus.wire.ledger import Ledger

pytest.importorskip("flwr")
psutil = pytest.importorskip("psutil")

APP = Path(__file__).parents[3] / "examples" / "flower"
KEYS: dict[str, Any] = {
    "method": "scaffold",
    "clients": 2,
    "rounds": 2,
    "seed": 4,
    "codec": "int8",
    "clip": 0.2,
    "privacy": "local",
    "noise": 0.01,
    "public": "[examples]",
}


def certificates(folder: Path) -> None:
    """`ca.pem`, and `server.pem` with `server.key` for this machine, signed by it."""
    x509 = pytest.importorskip("cryptography.x509")
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    now = dt.datetime.now(dt.UTC)
    own, other = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())

    def named(name: str) -> Any:
        return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])

    def made(name: str, key: Any, ca: bool) -> Any:
        to = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
        builder = (
            x509.CertificateBuilder(named("authority"), named(name), key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - dt.timedelta(minutes=5))
            .not_valid_after(now + dt.timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca, None), critical=True)
            .add_extension(
                x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False
            )
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(own.public_key()),
                critical=False,
            )
        )
        if ca:
            sign = x509.KeyUsage(True, False, False, False, False, True, True, False, False)
            builder = builder.add_extension(sign, critical=True)
        else:
            builder = builder.add_extension(x509.SubjectAlternativeName(to), critical=False)
        return builder.sign(own, hashes.SHA256())

    pem = serialization.Encoding.PEM
    (folder / "ca.pem").write_bytes(made("authority", own, True).public_bytes(pem))
    (folder / "server.pem").write_bytes(made("localhost", other, False).public_bytes(pem))
    (folder / "server.key").write_bytes(
        other.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )


def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextmanager
def started(command: list[str], folder: Path, environment: dict[str, str]) -> Iterator[Any]:
    """A process, ended with all that it has started."""
    with open(folder / f"{Path(command[0]).name}-{port()}.log", "wb") as log:
        process = psutil.Popen(
            command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT
        )
    try:
        yield process
    finally:
        family = [process, *process.children(recursive=True)] if process.is_running() else []
        for one in family:
            with suppress(psutil.NoSuchProcess):
                one.terminate()
        _, left = psutil.wait_procs(family, timeout=10)
        for one in left:
            with suppress(psutil.NoSuchProcess):
                one.kill()


def logs(folder: Path) -> str:
    return "\n".join(f"== {p.name}\n{p.read_text()[-3000:]}" for p in folder.glob("*.log"))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_deployment_with_tls_gives_the_bits_of_the_reference(tmp_path: Path) -> None:
    bin = Path(sys.executable).parent
    if not (bin / "flower-superlink").exists():
        pytest.skip("flower-superlink is not beside this Python")
    certificates(tmp_path)
    home = tmp_path / "home"
    home.mkdir()
    link = f"127.0.0.1:{port()}"
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "here"\n[superlink.here]\naddress = "{link}"\n'
        f'root-certificates = "{tmp_path / "ca.pem"}"\n'
    )
    environment = {
        **os.environ,
        **QUIET,
        "FLWR_HOME": str(home),
        "OMP_NUM_THREADS": "1",
        "PATH": f"{bin}:{os.environ['PATH']}",
        "PYTHONPATH": str(Path(isthmus.__file__).parents[1]),
    }
    tls = ["--ssl-certfile", "server.pem", "--ssl-keyfile", "server.key"]
    tls += ["--ssl-ca-certfile", "ca.pem"]
    host, number = link.split(":")
    commands = [
        [str(bin / "flower-superlink"), "--host", host, "--port", number, *tls,
         "--disable-runtime-dependency-installation"],
        *(
            [str(bin / "flower-supernode"), "--superlink", link, "--root-certificates", "ca.pem",
             "--port", str(port()), *tls,
             "--node-config", f"partition-id={i} num-partitions={KEYS['clients']}"]
            for i in range(KEYS["clients"])
        ),
    ]  # fmt: skip
    app, out = tmp_path / "app", tmp_path / "run"
    shutil.copytree(APP, app)
    words = " ".join(f"{k}='{v}'" if isinstance(v, str) else f"{k}={v}" for k, v in KEYS.items())
    with ExitStack() as stack:
        for command in commands:
            stack.enter_context(started(command, tmp_path, environment))
        for _ in range(600):  # the link is up once it takes connections
            if socket.socket().connect_ex((host, int(number))) == 0:
                break
            subprocess.run(["sleep", "0.2"], check=True)
        plain = subprocess.run(
            [sys.executable, "-c", f"import http.client as h; c = h.HTTPConnection('{link}', "
             "timeout=20); c.request('GET', '/health'); print(c.getresponse().status)"],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert plain.returncode, f"the link talks without TLS: {plain.stdout}"
        run = [str(bin / "flwr"), "run", str(app), "here", "--stream", "-c"]
        run.append(f"{words} noise-source='seed' out='{out}'")
        with started(run, tmp_path, environment) as streamed:
            streamed.wait(800)
        done = (out / "model").is_dir()
        said = "" if done else logs(tmp_path)
    assert done, said
    config = Config.make(
        {**KEYS, "public": ("examples",), "task": "digits", "executor": "sequential"}
    )
    fed = build(config, Ledger()).federation
    for _ in range(config.rounds):
        fed.step()
    model = isthmus.load(out).state_dict()
    assert set(fed.state["shared"]) <= set(model) and len(fed.state["shared"]) >= 2
    for name, x in fed.state["shared"].items():
        assert torch.equal(model[name], x), name
    rows = [{**row, "id": 0} for row in Ledger.read(out / "ledger.jsonl").rows()]
    assert rows == [{**row, "id": 0} for row in fed.ledger.rows()]
    assert sum("event" in row for row in rows) == KEYS["clients"] * KEYS["rounds"]
