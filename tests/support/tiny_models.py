"""The names that tests/benchmarks still imports; everything is in the modules below."""

from tests.support.recorders import count_hooks as hooks
from tests.support.tiny_pipelines import scheduler, sd_pipeline
from tests.support.tiny_unets import sd_unet, unet_inputs

__all__ = ["hooks", "scheduler", "sd_pipeline", "sd_unet", "unet_inputs"]
