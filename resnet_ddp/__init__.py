"""He et al. 2015, section 4.2, trained exactly: ResNet-20/56/110 and Plain-20/56 on CIFAR-10."""

__version__ = "0.1.0"
