"""A child process that only plays the check of a kernel, without jax, so that it starts at once.

The name of the implementation says what happens in which operation in bfloat16, as in
"crash-decode_cross", or in the part in float32, as in "fail-float32".
"""

import json
import os
import signal
import sys
import time

OPERATIONS = ("window_attention", "cross_attention", "decode_window", "decode_cross")
PARTS = (*(f"{operation} in bfloat16" for operation in OPERATIONS), "decode_cross in float32")


def say(**row):
    print(json.dumps(row), flush=True)


def found(part: str, reason: str | None):
    say(part=part, reason=reason, supported=True)


def main(name: str, *known: str):
    what, _, at = name.partition("-")
    if what == "start":
        sys.exit("RuntimeError: no device here.")
    print("A line of another program.\n[1]\n{", flush=True)
    say(platform="gpu", kind="Fake 1", parts=PARTS)
    with open(os.environ["YOCOU_JAX_CACHE"] + "/started", "a", encoding="utf-8") as file:
        file.write(f"{name} {len(known)}\n")
    for part in (p for p in PARTS if p not in known):
        here = at in (part.removesuffix(" in bfloat16"), part.partition(" in ")[2])
        if here and what == "hang":
            time.sleep(1000)
        if here and what == "crash":
            os.abort()
        if here and what == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if here and what == "memory":
            print("MemoryError: no memory", file=sys.stderr)
            sys.exit(4)
        if here and what == "fail":
            found(part, "It failed.")
            sys.exit(3)
        found(part, "It is wrong." if what == "wrong" else None)


if __name__ == "__main__":
    main(*sys.argv[1:])
