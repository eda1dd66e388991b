"""Custom nodes for ComfyUI: *JiT Apply* and *JiT Sigmas*.

Install jitaccel in ComfyUI's Python, then link or copy this folder into `ComfyUI/custom_nodes/`. The nodes call
`jitaccel.apply` on a clone of the model, and `jitaccel.noise_levels`.
"""

from jitaccel.patches.comfyui.nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
