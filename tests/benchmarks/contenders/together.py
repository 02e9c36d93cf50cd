"""All averages at once, through ckptavg: ``together.py SCENE OUT COUNT``."""

from __future__ import annotations

import sys

from scene import Scene, reported


def main(directory: str, out: str, count: str) -> None:
    scene = Scene.load(directory)
    with reported(scene, out) as scores:
        import ckptavg
        from ckptavg.averaging.plan import plan_average

        run = ckptavg.open_run(scene.run)
        candidates = [
            ckptavg.Candidate.of_average(plan_average(run, scheme), scheme, recompute=True)
            for scheme in scene.schemes[: int(count)]
        ]
        found = ckptavg.evaluate(
            candidates,
            scene.network(),
            scene.loader(shuffle=False),
            train_loader=scene.loader(shuffle=True),
            device=scene.device,
        )
        scores += [(result.metrics["top1"], result.metrics["nll"]) for result in found]


if __name__ == "__main__":
    main(*sys.argv[1:])
