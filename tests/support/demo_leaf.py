"""A leaf without a framework, with the arguments of the demo's example scripts: quick enough to be killed in tests.

Its one layer is a vector. Each "epoch" adds the first class of the leaf to it; its "accuracy" is made up.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import time

import numpy as np

from branchkey_integrations import Client
from branchkey_integrations.errors import RoundTimeoutError


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("classes", "credentials", "host", "rbmq-host", "checkpoint", "report"):
        parser.add_argument(f"--{name}")
    for name in ("rounds", "seed", "rbmq-port", "first-round"):
        parser.add_argument(f"--{name}", type=int, default=0)
    parser.add_argument("--timeout-s", type=float)
    parser.add_argument("--alone", action="store_true")
    args = parser.parse_args()

    def report(**fields: object) -> None:
        with open(args.report, "a", encoding="utf-8") as file:
            file.write(json.dumps(fields) + "\n")

    vector = np.zeros(3, np.float32)
    if args.checkpoint and os.path.exists(args.checkpoint):
        vector = np.load(args.checkpoint)
    if os.environ.get("DEMO_LEAF_FAILS") and args.classes.startswith("4"):
        print("error: the disk with the images is not mounted")
        sys.exit(3)
    client = None
    if not args.alone:
        client = Client(args.credentials, host=args.host, rbmq_host=args.rbmq_host, rbmq_port=args.rbmq_port or 5672)
    first = args.first_round or 1
    report(event="ready", images=10, parameters=3, first_round=first)
    for number in range(first, args.rounds + 1):
        vector += float(args.classes[0])
        fields: dict[str, object] = {"own_accuracy": 0.3, "accuracy": 0.3}
        if client is not None:
            time.sleep(0.05)  # a round that takes its time can be interrupted
            mark = client.mark()
            client.upload([vector], 10.0)
            try:
                aggregate = client.wait_for_aggregation(args.timeout_s, newer_than=mark)
                vector = client.load_aggregation(aggregate)[0]
                accuracy = 0.2 if os.environ.get("DEMO_LEAF_IS_WORSE") else 0.9
                fields.update(status="applied", aggregation_id=aggregate, accuracy=accuracy)
                if os.environ.get("DEMO_LEAF_DRIFTS") and args.classes.startswith("4"):
                    vector[0] += 1e-6
            except RoundTimeoutError as error:
                fields.update(status="timeout", aggregation_id=None, reason=str(error))
            with open(args.checkpoint, "wb") as file:
                np.save(file, vector)
        report(event="round", round=number, digest=hashlib.sha256(vector.tobytes()).hexdigest(), **fields)
    report(event="end")
    if client is not None:
        client.close()


if __name__ == "__main__":
    main()
