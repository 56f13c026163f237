"""A Ray cluster of three nodes of one core each, on this machine, until stdin ends.

python tests/ray_cluster.py         a JSON line: the address, and the pid of each node's raylet
"""

import json
import os
import sys

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

from ray.cluster_utils import Cluster

NODE = {"num_cpus": 1, "object_store_memory": 80 << 20, "include_dashboard": False}


def serve() -> None:
    cluster = Cluster(initialize_head=True, head_node_args=NODE)
    nodes = [cluster.head_node, cluster.add_node(**NODE), cluster.add_node(**NODE)]
    raylets = [node.all_processes["raylet"][0].process.pid for node in nodes]
    gcs = cluster.head_node.all_processes["gcs_server"][0].process.pid
    print(json.dumps({"address": cluster.address, "raylets": raylets, "gcs": gcs}), flush=True)
    sys.stdin.read()
    cluster.shutdown()


if __name__ == "__main__":
    serve()
