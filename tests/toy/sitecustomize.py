"""Where this directory is on PYTHONPATH: short recipes, and instead of training a stand-in for it.

With REAL_TRAINER set, the trainer is the real one.
"""

import os
import sys

from resnet_ddp.recipe import RECIPES, Recipe

for name, iterations in (("tiny", 4), ("short", 12), ("toy", 20)):
    RECIPES[name] = Recipe(
        name=name, iterations=iterations, batch_size=16, batchnorm_group=16, drops=(6, 9)
    )

if "REAL_TRAINER" not in os.environ:
    import toy_trainer

    sys.modules["resnet_ddp.trainer"] = toy_trainer
