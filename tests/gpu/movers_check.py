"""Round trips with every mover on a real GPU, as a plain script: for compute-sanitizer, or by hand.

    python tests/gpu/movers_check.py [--mover NAME] [--rounds N]
    compute-sanitizer --tool memcheck python tests/gpu/movers_check.py --mover triton --rounds 1
    compute-sanitizer --tool racecheck python tests/gpu/movers_check.py --mover triton --rounds 1

Exits 0 when every byte and every checksum was right, 1 when not, 77 where there is no CUDA device. A
mover this machine lacks is named and left out; asking for it by name is an error.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

NO_DEVICE = 77


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--mover", default="", help="plain, batch, staged or triton; default: all")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    import torch

    if not torch.cuda.is_available():
        print("no CUDA device")
        return NO_DEVICE
    from tests.gpu.devices import LAYOUTS, Device, available, round_trip

    here = available()
    print("movers here:", " ".join(here))
    names = [args.mover] if args.mover else here
    missing = [n for n in names if n not in here]
    if missing:
        print("not available:", " ".join(missing))
        return 1
    for name in names:
        for i, layout in enumerate(LAYOUTS):
            start = time.monotonic()
            with Device(layout, mover=name) as device:
                for seed in range(args.rounds):
                    round_trip(device, seed)
                device.assert_served(name)
            print(f"{name:8} layout {i}: ok, {time.monotonic() - start:.2f} s", flush=True)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except AssertionError:
        import traceback

        traceback.print_exc()
        sys.exit(1)
