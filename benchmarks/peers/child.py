"""The PyTorch side of a comparison: a process that does one piece of work each time it is asked.

    python child.py          (`process.Peer` starts it, perhaps with the Python of an environment of
                              its own)

So this file and the two next to it that it imports (torch_twin, llama) need torch, numpy and
transformers, but nothing of this repository. A request is one line of stdin, a JSON object:
{"call": name, "arguments": {...}}. The answer is one line of stdout: {"value": ...}, or
{"missing": name} for a package that is not installed, or {"error": stack trace}.
"""

import importlib
import json
import os
import platform
import sys
import time
import traceback

models = {}


def start(packages, threads):
    """Imports the packages, and returns their versions and that of Python."""
    found = {name: importlib.import_module(name).__version__ for name in packages}
    if "torch" in found:
        sys.modules["torch"].set_num_threads(threads)
    return {"python": platform.python_version(), **found}


def product(size, times):
    """Seconds of a product of two square matrices, the mean of `times` of them."""
    import torch

    a = torch.randn(size, size, generator=torch.Generator().manual_seed(0))
    torch.mm(a, a)
    begin = time.perf_counter()
    for _ in range(times):
        torch.mm(a, a)
    return (time.perf_counter() - begin) / times


def make(name, module, sizes, weights):
    """Makes a model, which later calls name. module: torch_twin or llama. weights: an .npz file
    with its parameters."""
    import numpy as np

    with np.load(weights) as arrays:
        models[name] = importlib.import_module(module).Model(sizes, dict(arrays))


def use(name, method, **arguments):
    """Calls a method of a model."""
    return getattr(models[name], method)(**arguments)


CALLS = {function.__name__: function for function in (start, product, make, use)}


def answer(line):
    request = json.loads(line)
    try:
        return {"value": CALLS[request["call"]](**request["arguments"])}
    except ModuleNotFoundError as error:
        return {"missing": error.name, "error": traceback.format_exc()}
    except Exception:
        return {"error": traceback.format_exc()}


def main():
    # What other packages print must not come between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        print(json.dumps(answer(line)), file=answers, flush=True)


if __name__ == "__main__":
    main()
