"""The plane through ckptavg: ``plane_together.py SCENE OUT POINTS``."""

from __future__ import annotations

import sys

from plane_data import WEIGHT_DECAY, loader, save_coordinates
from scene import Scene, reported


def main(directory: str, out: str, points: str) -> None:
    """Score POINTS × POINTS points; a score is (top-1, loss with L2 term on the training data)."""
    scene = Scene.load(directory)
    with reported(scene, out) as scores:
        import ckptavg

        landscape = ckptavg.plane(
            ckptavg.open_run(scene.run),
            scene.network(),
            loader(scene),
            train_data=loader(scene),
            points=int(points),
            weight_decay=WEIGHT_DECAY,
            device=scene.device,
        )
        for point in landscape.points:
            train = point.train or {}
            scores.append((point.data["top1"], train["l2_loss"]))
    save_coordinates(scene, [(point.x, point.y or 0.0) for point in landscape.points])


if __name__ == "__main__":
    main(*sys.argv[1:])
