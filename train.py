"""accelerate launch train.py resnet20 --data shapes --recipe he2015-tiny."""

from resnet_ddp.cli import train_main

if __name__ == "__main__":
    raise SystemExit(train_main())
