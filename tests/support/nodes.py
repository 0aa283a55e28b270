"""Makes two nodes on one machine: network namespaces with addresses of their own, joined by a cable.

Everything in a namespace can be killed or stopped at once, as a node that loses its power or hangs. Needs root.
"""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

PORT = 29400


@dataclass(frozen=True)
class Node:
    """Runs processes in a network namespace."""

    name: str
    address: str

    def start(self, command: list[object], environment: Mapping[str, str] | None = None, **options) -> subprocess.Popen:
        inside = ["ip", "netns", "exec", self.name, *map(str, command)]
        own = {
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": self.name,
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
            **(environment or {}),
        }
        return subprocess.Popen(inside, env=os.environ | own, text=True, **options)

    def signal(self, number: int = signal.SIGKILL) -> None:
        """Sends a signal to every process of the node."""
        for pid in _ip("netns", "pids", self.name).split():
            try:
                os.kill(int(pid), number)
            except ProcessLookupError:
                continue


def torchrun(host: Node, node: Node, restarts: int = 0) -> list[object]:
    """Returns the words that start a process on a node of two; the rendezvous is on the host."""
    return [
        *(sys.executable, "-m", "torch.distributed.run", "--nnodes", 2, "--nproc-per-node", 1),
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", f"{host.address}:{PORT}", "--rdzv-id", "apcnet"),
        *(
            "--rdzv-conf",
            f"is_host={int(node == host)},read_timeout=20",
            "--max-restarts",
            restarts,
            "--local-addr",
            node.address,
        ),
    ]


def unavailable() -> str | None:
    """Returns why this machine cannot have such nodes, or None."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        return "needs root and the command ip"
    made = subprocess.run(["ip", "netns", "add", "apcnet-try"], capture_output=True, text=True)
    if made.returncode == 0:
        _ip("netns", "del", "apcnet-try")
    return made.stderr.strip() or None


@contextmanager
def two_nodes() -> Iterator[tuple[Node, Node]]:
    """Gives two nodes until the block ends, which kills what still runs on them."""
    number = os.getpid() % 60_000
    subnet = f"10.{77 + number // 256 % 100}.{number % 256}"
    nodes = tuple(Node(f"apc{letter}{number}", f"{subnet}.{host}") for letter, host in (("a", 1), ("b", 2)))
    try:
        for node in nodes:
            _ip("netns", "add", node.name)
        _ip("link", "add", nodes[0].name, "type", "veth", "peer", "name", nodes[1].name)
        for node in nodes:
            _ip("link", "set", node.name, "netns", node.name)
            _ip("-n", node.name, "addr", "add", f"{node.address}/24", "dev", node.name)
            for device in (node.name, "lo"):
                _ip("-n", node.name, "link", "set", device, "up")
        yield nodes
    finally:
        for node in nodes:
            if Path("/run/netns", node.name).exists():
                node.signal()
                _ip("netns", "del", node.name)


def _ip(*words: str) -> str:
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout
