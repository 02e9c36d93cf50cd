"""Where models can run, and what with, as JSON: ``device.py auto|cpu|cuda``."""

from __future__ import annotations

import importlib.metadata
import json
import sys

_NEEDED = ("torch", "torchvision", "PIL", "ckptavg")
_REMEDY = 'pip install ".[benchmarks]"'


def main(asked: str) -> None:
    """Print ``device``, and ``about``: the names and versions of what there is."""
    for name in _NEEDED:
        try:
            __import__(name)
        except ImportError as error:
            sys.exit(f"{name} cannot be imported ({error}): {_REMEDY}")
    import torch

    cuda = torch.cuda.is_available()
    if asked == "cuda" and not cuda:
        sys.exit("there is no CUDA device: take --device cpu, or auto")
    device = "cuda" if cuda and asked != "cpu" else "cpu"
    about = {"GPU": torch.cuda.get_device_name()} if device == "cuda" else {}
    about |= {"threads": str(torch.get_num_threads())}
    about |= {name: importlib.metadata.version(name) for name in _packages()}
    print(json.dumps({"device": device, "about": about}))


def _packages() -> list[str]:
    found = ["ckptavg", "torch", "torchvision", "pillow"]
    try:
        import fvcore.nn  # noqa: F401
    except ImportError:
        return found
    return [*found, "fvcore"]


if __name__ == "__main__":
    main(sys.argv[1])
