"""A child process that only plays the check of a kernel, without jax, so that it starts at once.

The name of the implementation says what happens in which operation, as in "crash-decode_cross".
"""

import json
import os
import sys
import time

OPERATIONS = ("window_attention", "cross_attention", "decode_window", "decode_cross")


def say(**row):
    print(json.dumps(row), flush=True)


def found(operation: str, reason: str | None):
    say(operation=operation, reason=reason, supported=True)


def main(name: str, *known: str):
    what, _, at = name.partition("-")
    if what == "start":
        sys.exit("RuntimeError: no device here.")
    print("A line of another program.\n[1]\n{", flush=True)
    say(platform="gpu", kind="Fake 1", operations=OPERATIONS)
    with open(os.environ["YOCOU_JAX_CACHE"] + "/started", "a", encoding="utf-8") as file:
        file.write(f"{name} {len(known)}\n")
    for operation in (o for o in OPERATIONS if o not in known):
        if operation == at and what == "hang":
            time.sleep(1000)
        if operation == at and what == "crash":
            os.abort()
        if operation == at and what == "fail":
            found(operation, "It failed.")
            sys.exit(3)
        found(operation, "It is wrong." if what == "wrong" else None)


if __name__ == "__main__":
    main(*sys.argv[1:])
