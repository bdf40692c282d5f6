"""A cluster of Ray whose nodes are processes of this machine. As a script: prints its address, obeys stdin."""

from __future__ import annotations

import os
import sys

from ray.cluster_utils import Cluster


def main() -> None:
    """``add CORES`` adds a node, ``kill PLACE`` kills one as a power cut would; each is answered by its line."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    nodes = []
    print(cluster.address, flush=True)
    for line in sys.stdin:
        word, number = line.split()
        if word == "add":
            nodes.append(cluster.add_node(num_cpus=int(number)))
        else:
            cluster.remove_node(nodes[int(number)], allow_graceful=False)
        print(line.strip(), flush=True)
    cluster.shutdown()


if __name__ == "__main__":
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
    main()
