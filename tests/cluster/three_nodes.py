"""A cluster of three raylets on this machine with a job server, in a process of its own.

    python -m tests.cluster.three_nodes

It prints one line of JSON once the nodes are up: `url` of the job server, `client`, the address of
the Ray Client server, and `special`, the id of the one node that has a resource of this name.
`remove` on its stdin takes another node away, as when its machine fails; the end of stdin ends the
cluster.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import tempfile
from typing import Any

# Everything on the loopback address; see eevp_batch/cluster/local_ray.py.
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"

from ray.cluster_utils import Cluster

STORE_BYTES = 80 << 20


def main() -> None:
    """Serve until stdin ends."""
    node = {"num_cpus": 1, "object_store_memory": STORE_BYTES, "node_ip_address": "127.0.0.1"}
    head: dict[str, Any] = {"include_dashboard": True, "dashboard_port": free_port()}
    head["ray_client_server_port"] = client_port = free_port()
    agent = {"dashboard_agent_listen_port": free_port()}  # Ray's own choice is one for all
    with contextlib.ExitStack() as stack:
        # Nodes that share a folder for sessions delete each other's working folders.
        folders = [stack.enter_context(short_folder()) for _ in range(3)]
        head["temp_dir"] = folders.pop()
        cluster = Cluster(initialize_head=True, head_node_args={**node, **head, **agent})
        stack.callback(cluster.shutdown)
        special = cluster.add_node(**node, temp_dir=folders.pop(), resources={"special": 1})
        nodes = [cluster.add_node(**node, temp_dir=folder) for folder in folders]
        said = {"url": f"http://{cluster.webui_url}", "client": f"ray://127.0.0.1:{client_port}"}
        print(json.dumps({**said, "special": special.node_id}), flush=True)
        for line in sys.stdin:
            if line.strip() == "remove":
                cluster.remove_node(nodes.pop(), allow_graceful=False)
                print("removed", flush=True)


def short_folder() -> tempfile.TemporaryDirectory[str]:
    """Paths of sockets end at 107 characters."""
    return tempfile.TemporaryDirectory(prefix="eevp-", dir="/tmp", ignore_cleanup_errors=True)


def free_port() -> int:
    """A port of 127.0.0.1 that nobody has now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


if __name__ == "__main__":
    main()
