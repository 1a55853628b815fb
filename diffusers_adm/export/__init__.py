"""Export of the networks to other runtimes: ONNX, and programs of torch.export."""

from .networks import export_network


__all__ = ["export_network"]
