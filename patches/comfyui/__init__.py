"""Custom nodes for ComfyUI: *JiT Apply* and *JiT Sigmas*.

Link or copy this folder into `ComfyUI/custom_nodes/`, with jitaccel installed in ComfyUI's Python. What the nodes do is
`jitaccel.apply` on a clone of the model, and `jitaccel.noise_levels`.
"""

from jitaccel.patches.comfyui.nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
