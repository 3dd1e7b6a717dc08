"""The proof of the recipe: `resnet-ddp audit`, and the same for the records of a run."""
