"""`python -m resnet_ddp` is `resnet-ddp`."""

from resnet_ddp.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
