"""The loaders alone, once for training and once for evaluation: ``bare_loader.py SCENE OUT``."""

from __future__ import annotations

import sys

from scene import Scene, reported


def main(directory: str, out: str) -> None:
    scene = Scene.load(directory)
    with reported(scene, out):
        for shuffle in (True, False):
            for _ in scene.loader(shuffle=shuffle):
                pass


if __name__ == "__main__":
    main(*sys.argv[1:])
