"""Universal YOCO on a laptop: does it learn Python from Python's own standard library?

python -m experiments.train --config=configs/yocou_small.py             (or: make train)
python -m experiments.train --config=configs/yocou_small.py:transformer (any architecture)
"""

from configs import base


def get_config(architecture: str = "yoco_u"):
    c = base.get_config()
    c.model.architecture = architecture
    return c
