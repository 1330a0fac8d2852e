"""Names that options take. Imports nothing, so that a command's --help comes at once."""

from typing import Any

DEVICES = ("cuda", "mps", "cpu")

# And what torch calls them.
PRECISIONS = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}

# The class of each scheduler, and its settings beside the pipeline's own noise schedule.
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {}),
    # ToMe, Appendix F: pseudo linear multistep, without the Runge-Kutta steps at the start.
    "plms": ("PNDMScheduler", {"skip_prk_steps": True}),
    "euler": ("EulerDiscreteScheduler", {}),
    "dpm++": ("DPMSolverMultistepScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
}
